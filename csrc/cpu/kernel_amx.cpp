// bf16 on x86-64 processors with matrix units (AMX-BF16: Sapphire Rapids and newer), Linux.
//
// The same walk over lines as line_kernels.h, with every product done by 16 x 16 tiles: fp32 accumulators, bf16
// operands of 32 numbers a row. The left operand of a tile product is row-major; the right one has pairs of rows
// interleaved, so that a 32-bit unit holds two successive k of one column. Two packings produce it:
//   pack_pairs        B[k, n] = src[k, n]   rows 2k and 2k+1 interleaved. The unpack instructions work within 128-bit
//                                           lanes, which permutes the columns in each 32; store_rows undoes it.
//   pack_transposed   B[k, n] = src[n, k]   a transpose of 32-bit units, columns in order.
// Everything is padded with zeros to whole tiles. Weights and their gradients are rounded to bf16 between products,
// as in plain PyTorch; energies, softmax, sums and accumulators are fp32.
#include "common.h"

#if defined(CCNET_X86_DISPATCH) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(                                                           \
                                 "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")
#endif

namespace ccnet {
namespace cpu {
namespace {

#include "storage.h"
#include "vector_avx512.h"
#include "work.h"
#include "merge_rows.h"

using V = Avx512;
using reg = __m512;

constexpr int64_t kTile = 16;   // rows of a tile, columns of an accumulator
constexpr int64_t kDepth = 32;  // bf16 numbers in a tile's row
constexpr int64_t kPanel = 64;  // output columns per pass

// ---------------------------------------------------------------------------------------------------- tiles

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Eight full tiles for as long as it lives; whatever configuration the thread had is put back.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = kTile;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfig before_;
};

// Memory to ask for while tiles multiply: the next line, whose rows may be far apart. A core has few misses under way
// at once, so the requests are spread evenly.
class Ahead {
 public:
  // cols numbers of each of `rows` rows, `row` numbers apart.
  void add(const BFloat16* first, int64_t row, int64_t rows, int64_t cols) {
    if (rows <= 0 || cols <= 0) return;
    streams_[count_++] = {reinterpret_cast<const char*>(first), row * 2, rows, cols * 2};
    left_ += rows * ((cols * 2 + kStep - 1) / kStep);
  }
  // Spread what was added over so many calls of ask.
  void spread(int64_t calls) { quota_ = calls > 0 ? (left_ + calls - 1) / calls : left_; }
  void ask() {
    for (int64_t n = quota_; n > 0 && current_ < count_; --n) {
      Stream& s = streams_[current_];
      CCNET_PREFETCH(s.at + offset_);
      offset_ += kStep;
      if (offset_ >= s.bytes) {
        offset_ = 0;
        s.at += s.step;
        if (--s.rows == 0) ++current_;
      }
    }
  }

 private:
  static constexpr int64_t kStep = 64;
  struct Stream {
    const char* at;
    int64_t step, rows, bytes;
  };
  Stream streams_[5];
  int count_ = 0, current_ = 0;
  int64_t offset_ = 0, left_ = 0, quota_ = 0;
};

// C[16 * MT, 16 * NT] = A B over `depth` steps of 32; lda and ldb in bytes, ldc in floats.
template <int MT, int NT>
void tile_product(int64_t depth, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                  int64_t ldc, Ahead* ahead) {
  const char* pa = reinterpret_cast<const char*>(a);
  const char* pb = reinterpret_cast<const char*>(b);
  _tile_zero(0);
  if (NT > 1) _tile_zero(1);
  if (MT > 1) _tile_zero(2);
  if (MT > 1 && NT > 1) _tile_zero(3);
  for (int64_t k = 0; k < depth; ++k) {
    _tile_loadd(4, pa, lda);
    _tile_loadd(6, pb, ldb);
    _tile_dpbf16ps(0, 4, 6);
    if (NT > 1) {
      _tile_loadd(7, pb + 64, ldb);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (MT > 1) {
      _tile_loadd(5, pa + kTile * lda, lda);
      _tile_dpbf16ps(2, 5, 6);
      if (NT > 1) _tile_dpbf16ps(3, 5, 7);
    }
    ahead->ask();
    pa += 64;
    pb += kTile * ldb;
  }
  const int64_t stride = ldc * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, c, stride);
  if (NT > 1) _tile_stored(1, c + kTile, stride);
  if (MT > 1) _tile_stored(2, c + kTile * ldc, stride);
  if (MT > 1 && NT > 1) _tile_stored(3, c + kTile * ldc + kTile, stride);
}

// C[M, N] = A B with M, N multiples of 16; lda in numbers, ldb in 32-bit units. Asks depth_steps(M, N, depth) times.
void product(int64_t M, int64_t N, int64_t depth, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb,
             float* c, int64_t ldc, Ahead* ahead) {
  for (int64_t n = 0; n < N; n += 2 * kTile) {
    const bool wide = n + kTile < N;
    for (int64_t m = 0; m < M; m += 2 * kTile) {
      const bool tall = m + kTile < M;
      const auto run = tall ? (wide ? tile_product<2, 2> : tile_product<2, 1>)
                            : (wide ? tile_product<1, 2> : tile_product<1, 1>);
      run(depth, a + m * lda, lda * 2, b + n, ldb * 4, c + m * ldc + n, ldc, ahead);
    }
  }
}

int64_t depth_steps(int64_t M, int64_t N, int64_t depth) { return (M + 31) / 32 * ((N + 31) / 32) * depth; }

// Row strides of an odd number of cache lines (see `leading`): of bf16 rows, in numbers.
int64_t words_leading(int64_t n) { return 2 * leading<V>(n / 2); }

// -------------------------------------------------------------------------------------------------- packing

inline __mmask32 first_words(int64_t n) {
  return n >= 32 ? ~__mmask32(0) : static_cast<__mmask32>((1u << n) - 1u);
}

inline __m512i load_words(const BFloat16* p, int64_t n) {
  return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first_words(n), p);
}

// dst[i, c] = src[i, c], i < rows, c < cols, zeros up to padded_rows and to a multiple of 32 columns.
void pack_plain(const BFloat16* src, int64_t row, int64_t rows, int64_t cols, int64_t padded_rows, BFloat16* dst,
                int64_t ld) {
  for (int64_t i = 0; i < padded_rows; ++i) {
    for (int64_t c = 0; c < cols; c += 32) {
      const __m512i x = i < rows ? load_words(src + i * row + c, cols - c) : _mm512_setzero_si512();
      _mm512_storeu_si512(dst + i * ld + c, x);
    }
  }
}

// dst[r, c] = (src[2r, c], src[2r+1, c]) for c < cols padded to 32, 2r < padded_rows; columns permuted (see above).
void pack_pairs(const BFloat16* src, int64_t row, int64_t rows, int64_t cols, int64_t padded_rows, uint32_t* dst,
                int64_t ld) {
  for (int64_t i = 0; i < padded_rows; i += 2) {
    const BFloat16* p = src + i * row;
    uint32_t* d = dst + i / 2 * ld;
    for (int64_t c = 0; c < cols; c += 32) {
      const __m512i a = i < rows ? load_words(p + c, cols - c) : _mm512_setzero_si512();
      const __m512i b = i + 1 < rows ? load_words(p + row + c, cols - c) : _mm512_setzero_si512();
      _mm512_storeu_si512(d + c, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(d + c + 16, _mm512_unpackhi_epi16(a, b));
    }
  }
}

// dst[k, i] = (src[i, 2k], src[i, 2k+1]) for i < padded_rows (a multiple of 16), 2k < cols padded to 32.
void pack_transposed(const BFloat16* src, int64_t row, int64_t rows, int64_t cols, int64_t padded_rows,
                     uint32_t* dst, int64_t ld) {
  for (int64_t i = 0; i < padded_rows; i += kTile) {
    for (int64_t c = 0; c < cols; c += 32) {
      reg t[16];
      CCNET_UNROLL
      for (int r = 0; r < 16; ++r) {
        t[r] = i + r < rows ? _mm512_castsi512_ps(load_words(src + (i + r) * row + c, cols - c)) : V::zero();
      }
      V::transpose(t);
      CCNET_UNROLL
      for (int r = 0; r < 16; ++r) _mm512_storeu_ps(dst + (c / 2 + r) * ld + i, t[r]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- storing

inline __m512i words_in_order(reg lo, reg hi) {
  const __m512i order = _mm512_set_epi16(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8,  //
                                         23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
}

// dst[r, c] = old * dst[r, c] + fresh * tile[r, c], columns of `tile` in the order of pack_pairs. old is not read
// from memory where it is 0 for all rows (first).
inline void store_row(const float* tile, int64_t cols, bool first, float old, float fresh, BFloat16* dst) {
  const reg f = V::set1(fresh), o = V::set1(old);
  for (int64_t c = 0; c < cols; c += 32) {
    reg lo = V::mul(V::load(tile + c), f), hi = V::mul(V::load(tile + c + 16), f);
    if (!first) {
      const __m512i before = load_words(dst + c, cols - c), zero = _mm512_setzero_si512();
      lo = V::fma(_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, before)), o, lo);
      hi = V::fma(_mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, before)), o, hi);
    }
    const __m512i words = words_in_order(lo, hi);
    if (cols - c >= 32) {
      _mm512_storeu_si512(dst + c, words);
    } else {
      _mm512_mask_storeu_epi16(dst + c, first_words(cols - c), words);
    }
  }
}

// dst[M, N] (+)= A B for one line of a gradient: M rows of which `rows` are real, N = cols padded to 32. Where a line
// comes in several blocks of queries, `sums` [M, N] keeps the fp32 totals and dst is written with the last block.
struct BlockPosition {
  bool first, last;
};
void product_to_line(int64_t M, int64_t rows, int64_t cols, int64_t depth, const BFloat16* a, int64_t lda,
                     const uint32_t* b, int64_t ldb, float* tile, BFloat16* dst, int64_t dst_row, bool accumulate,
                     float* sums, BlockPosition at, Ahead* ahead) {
  const int64_t padded = round_up(cols, 32);
  for (int64_t c = 0; c < padded; c += kPanel) {
    const int64_t width = padded - c < kPanel ? padded - c : kPanel;
    for (int64_t m = 0; m < M; m += 2 * kTile) {
      const int64_t height = M - m < 2 * kTile ? M - m : 2 * kTile;
      const int64_t real = rows - m < height ? rows - m : height;
      const int64_t valid = cols - c < width ? cols - c : width;
      product(height, width, depth, a + m * lda, lda, b + c, ldb, tile, kPanel, ahead);
      for (int64_t r = 0; r < real; ++r) {
        float* t = tile + r * kPanel;
        if (sums != nullptr) {
          float* s = sums + (m + r) * padded + c;
          for (int64_t x = 0; x < width; x += 16) {
            if (!at.first) V::store(t + x, V::add(V::load(s + x), V::load(t + x)));
            if (!at.last) V::store(s + x, V::load(t + x));
          }
          if (!at.last) continue;
        }
        store_row(t, valid, !accumulate, 1.0f, 1.0f, dst + (m + r) * dst_row + c);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------- forward

// Query rows handled at once, a multiple of 32 unless it is the whole line.
int64_t block_rows(int64_t length) {
  if (length <= 256) return length;
  const int64_t rows = 256 * 256 / length / 32 * 32;
  return rows < 32 ? 32 : rows;
}

// Weights of 16 queries: p[i, j] = exp(s[j, i] - max_i) in bf16, zero for L <= j < the next multiple of 32, with the
// maxima and the (fp32) sums. Down the columns nothing is horizontal; the weights are then transposed in registers.
void softmax_columns(const float* s, int64_t ld, int64_t L, BFloat16* p, int64_t p_ld, float* max, float* sum) {
  reg m0 = V::load(s), m1 = m0;
  for (int64_t j = 1; j < L; j += 2) {
    m0 = V::max(m0, V::load(s + j * ld));
    m1 = V::max(m1, V::load(s + (j + 1 < L ? j + 1 : j) * ld));
  }
  const reg m = V::max(m0, m1);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  reg s0 = V::zero(), s1 = V::zero();
  for (int64_t j0 = 0; j0 < L; j0 += kDepth) {
    alignas(64) float pairs[16][16];
    for (int r = 0; r < 16; ++r) {
      const int64_t j = j0 + 2 * r;
      const reg e0 = j < L ? V::exp(V::sub(V::load(s + j * ld), m)) : V::zero();
      const reg e1 = j + 1 < L ? V::exp(V::sub(V::load(s + (j + 1) * ld), m)) : V::zero();
      s0 = V::add(s0, e0);
      s1 = V::add(s1, e1);
      const __m512i words = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(e1, e0));
      _mm512_store_si512(pairs[r], words);
    }
    reg t[16];
    CCNET_UNROLL
    for (int r = 0; r < 16; ++r) t[r] = _mm512_load_ps(pairs[r]);
    V::transpose(t);
    CCNET_UNROLL
    for (int r = 0; r < 16; ++r) _mm512_storeu_ps(p + r * p_ld + j0, t[r]);
  }
  V::store(max, m);
  V::store(sum, V::add(s0, s1));
}

void forward_axis(const ForwardArgs& args, int axis, bool first, bool last) {
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = block_rows(L), blocks = (L + block - 1) / block;
  const int64_t l32 = round_up(L, 32), l16 = round_up(L, 16), b16 = round_up(block, 16);
  const int64_t qk32 = round_up(QK, 32), c32 = round_up(C, 32);
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const int64_t stat_row = stat.axis[axis];
  const int64_t v_row = args.value.strides.axis[axis], o_row = args.out.strides.axis[axis];
  const int64_t q_row = args.query.strides.axis[axis], k_row = args.key.strides.axis[axis];

  const int64_t ld = leading<V>(b16), k_ld = words_leading(qk32), p_ld = words_leading(l32);

  run_items(args, grid.lines(axis) * blocks, [&](auto next) {
    Scratch<float> scratch(l16 * k_ld / 2 + qk32 / 2 * ld + l16 * ld + b16 * p_ld / 2 + l32 / 2 * kPanel +
                           2 * kTile * kPanel + 4 * b16);
    if (!scratch.ok()) return false;
    BFloat16* k_plain = reinterpret_cast<BFloat16*>(scratch.take(l16 * k_ld / 2));
    uint32_t* q_transposed = reinterpret_cast<uint32_t*>(scratch.take(qk32 / 2 * ld));
    float* s = scratch.take(l16 * ld);  // energies [j, i]
    BFloat16* p = reinterpret_cast<BFloat16*>(scratch.take(b16 * p_ld / 2));  // weights [i, j]
    uint32_t* v_pairs = reinterpret_cast<uint32_t*>(scratch.take(l32 / 2 * kPanel));
    float* tile = scratch.take(2 * kTile * kPanel);
    float* keep = scratch.take(b16);
    float* fresh = scratch.take(b16);
    float* before_max = scratch.take(b16);
    float* before_sum = scratch.take(b16);
    Tiles tiles;

    int64_t item, upcoming, packed_line = -1;
    bool more = next(&item);
    for (; more; item = upcoming) {
      more = next(&upcoming);
      const int64_t line = item / blocks, i0 = item % blocks * block;
      const int64_t rows = L - i0 < block ? L - i0 : block;
      const int64_t r16 = round_up(rows, 16);
      const BFloat16* v = line_data<BFloat16>(args.value, grid, axis, line);
      BFloat16* o = line_data<BFloat16>(args.out, grid, axis, line) + i0 * o_row;
      const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat_row;
      float* max_out = static_cast<float*>(args.max) + stat0;
      float* sum_out = static_cast<float*>(args.lse) + stat0;

      Ahead ahead;
      if (more && upcoming / blocks != line) {
        const int64_t next_line = upcoming / blocks;
        ahead.add(line_data<BFloat16>(args.key, grid, axis, next_line), k_row, L, QK);
        ahead.add(line_data<BFloat16>(args.query, grid, axis, next_line), q_row, L, QK);
        ahead.add(line_data<BFloat16>(args.value, grid, axis, next_line), v_row, L, C);
        ahead.add(line_data<BFloat16>(args.out, grid, axis, next_line), o_row, L, C);
        ahead.spread(depth_steps(l16, r16, qk32 / 32) + depth_steps(r16, c32, l32 / 32));
      }

      if (packed_line != line) {
        pack_plain(line_data<BFloat16>(args.key, grid, axis, line), k_row, L, QK, l16, k_plain, k_ld);
        packed_line = line;
      }
      pack_transposed(line_data<BFloat16>(args.query, grid, axis, line) + i0 * q_row, q_row, rows, QK, r16,
                      q_transposed, ld);
      product(l16, r16, qk32 / 32, k_plain, k_ld, q_transposed, ld, s, ld, &ahead);
      if (masked) {
        for (int64_t i = 0; i < rows; ++i) s[(i0 + i) * ld + i] = -INFINITY;
      }
      for (int64_t i = 0; i < r16; i += kTile) softmax_columns(s + i, ld, L, p + i * p_ld, p_ld, keep + i, fresh + i);
      merge_rows<V>(rows, first, last, max_out, sum_out, stat_row, keep, fresh, before_max, before_sum);

      for (int64_t c = 0; c < c32; c += kPanel) {
        const int64_t width = c32 - c < kPanel ? c32 - c : kPanel;
        const int64_t valid = C - c < width ? C - c : width;
        pack_pairs(v + c, v_row, L, valid, l32, v_pairs, kPanel);
        for (int64_t m = 0; m < r16; m += 2 * kTile) {
          const int64_t height = r16 - m < 2 * kTile ? r16 - m : 2 * kTile;
          product(height, width, l32 / 32, p + m * p_ld, p_ld, v_pairs, kPanel, tile, kPanel, &ahead);
          const int64_t real = rows - m < height ? rows - m : height;
          for (int64_t r = 0; r < real; ++r) {
            store_row(tile + r * kPanel, valid, first, keep[m + r], fresh[m + r], o + (m + r) * o_row + c);
          }
        }
      }
    }
    return true;
  });
}

void forward(const ForwardArgs& args) {
  const int first = first_axis(args.grid);
  for (int axis = first; axis < args.grid.axes; ++axis) {
    if (contributes(args.grid, axis)) forward_axis(args, axis, axis == first, axis == args.grid.axes - 1);
  }
}

// --------------------------------------------------------------------------------------------------- backward

// dst[i, j] = src[j, i] for i < M, j < N, multiples of 16 and 32.
void transpose_words(const BFloat16* src, int64_t src_ld, int64_t M, int64_t N, BFloat16* dst, int64_t dst_ld) {
  for (int64_t j = 0; j < N; j += 32) {
    for (int64_t i = 0; i < M; i += 32) {
      reg lo[16], hi[16];
      CCNET_UNROLL
      for (int r = 0; r < 16; ++r) {
        const __m512i a = _mm512_loadu_si512(src + (j + 2 * r) * src_ld + i);
        const __m512i b = _mm512_loadu_si512(src + (j + 2 * r + 1) * src_ld + i);
        lo[r] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
        hi[r] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
      }
      V::transpose(lo);
      V::transpose(hi);
      CCNET_UNROLL
      for (int r = 0; r < 16; ++r) {
        const int64_t at = i + r / 4 * 8 + r % 4;  // undoes the order that the unpack instructions gave
        _mm512_storeu_ps(dst + at * dst_ld + j, lo[r]);
        _mm512_storeu_ps(dst + (at + 4) * dst_ld + j, hi[r]);
      }
    }
  }
}

void backward_axis(const BackwardArgs& args, int axis, bool first) {
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = block_rows(L), blocks = (L + block - 1) / block;
  const int64_t l32 = round_up(L, 32), l16 = round_up(L, 16), b32 = round_up(block, 32);
  const int64_t qk32 = round_up(QK, 32), c32 = round_up(C, 32);
  const int64_t qk_words = words_leading(qk32), c_words = words_leading(c32);
  const int64_t i_words = words_leading(b32), j_words = words_leading(l32);
  const int64_t qk_ld = leading<V>(qk32), c_ld = leading<V>(c32), i_ld = leading<V>(b32);
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const int64_t stat_row = stat.axis[axis];
  const int64_t q_row = args.query.strides.axis[axis], k_row = args.key.strides.axis[axis];
  const int64_t v_row = args.value.strides.axis[axis], o_row = args.out.strides.axis[axis];
  const int64_t g_row = args.grad_out.strides.axis[axis];
  const int64_t dq_row = args.grad_query.strides.axis[axis], dk_row = args.grad_key.strides.axis[axis];
  const int64_t dv_row = args.grad_value.strides.axis[axis];

  run_items(args, grid.lines(axis), [&](auto next) {
    const int64_t kept = blocks > 1 ? l32 * (qk32 + c32) : 0;
    Scratch<float> scratch((l16 * qk_words + b32 * j_words + l16 * c_words) / 2 + l32 * i_words + l32 / 2 * qk_ld +
                           qk32 / 2 * i_ld + b32 / 2 * qk_ld + 2 * l32 * i_ld + c32 / 2 * i_ld + b32 / 2 * c_ld +
                           2 * kTile * kPanel + 2 * b32 + kept);
    if (!scratch.ok()) return false;
    const auto take_words = [&](int64_t n) { return reinterpret_cast<BFloat16*>(scratch.take(n / 2)); };
    const auto take_pairs = [&](int64_t n) { return reinterpret_cast<uint32_t*>(scratch.take(n)); };
    BFloat16* k_plain = take_words(l16 * qk_words);
    uint32_t* k_pairs = take_pairs(l32 / 2 * qk_ld);
    uint32_t* q_transposed = take_pairs(qk32 / 2 * i_ld);
    uint32_t* q_pairs = take_pairs(b32 / 2 * qk_ld);
    float* s = scratch.take(l32 * i_ld);        // energies [j, i]
    float* dp = scratch.take(l32 * i_ld);       // grad of the weights [j, i]
    BFloat16* p = take_words(l32 * i_words);       // weights [j, i]
    BFloat16* ds = take_words(l32 * i_words);      // grad of the energies [j, i]
    BFloat16* ds_rows = take_words(b32 * j_words);  // the same [i, j]
    BFloat16* v_plain = take_words(l16 * c_words);
    uint32_t* g_transposed = take_pairs(c32 / 2 * i_ld);
    uint32_t* g_pairs = take_pairs(b32 / 2 * c_ld);
    float* tile = scratch.take(2 * kTile * kPanel);
    float* lse = scratch.take(b32);
    float* delta = scratch.take(b32);
    float* dk_sums = blocks > 1 ? scratch.take(l32 * qk32) : nullptr;
    float* dv_sums = blocks > 1 ? scratch.take(l32 * c32) : nullptr;
    Tiles tiles;

    int64_t line, upcoming;
    bool more = next(&line);
    for (; more; line = upcoming) {
      more = next(&upcoming);
      const int64_t next_line = more ? upcoming : line;
      const BFloat16* k = line_data<BFloat16>(args.key, grid, axis, line);
      const BFloat16* v = line_data<BFloat16>(args.value, grid, axis, line);
      Ahead ahead;
      if (more) {
        const int64_t n = L < block ? L : block;
        ahead.add(line_data<BFloat16>(args.grad_out, grid, axis, next_line), g_row, n, C);
        if (first) ahead.add(line_data<BFloat16>(args.out, grid, axis, next_line), o_row, n, C);
        ahead.add(line_data<BFloat16>(args.value, grid, axis, next_line), v_row, L, C);
        ahead.add(line_data<BFloat16>(args.grad_value, grid, axis, next_line), dv_row, L, C);
        ahead.spread(blocks * (depth_steps(l16, n, qk32 / 32) + depth_steps(l16, n, c32 / 32) +
                               depth_steps(n, qk32, l32 / 32) + depth_steps(l16, qk32 + c32, (n + 31) / 32)));
      }
      pack_plain(k, k_row, L, QK, l16, k_plain, qk_words);
      pack_pairs(k, k_row, L, QK, l32, k_pairs, qk_ld);
      pack_plain(v, v_row, L, C, l16, v_plain, c_words);

      for (int64_t i0 = 0; i0 < L; i0 += block) {
        const int64_t rows = L - i0 < block ? L - i0 : block;
        const int64_t r32 = round_up(rows, 32), r16 = round_up(rows, 16);
        const BFloat16* q = line_data<BFloat16>(args.query, grid, axis, line) + i0 * q_row;
        const BFloat16* o = line_data<BFloat16>(args.out, grid, axis, line) + i0 * o_row;
        const BFloat16* g = line_data<BFloat16>(args.grad_out, grid, axis, line) + i0 * g_row;
        BFloat16* dq = line_data<BFloat16>(args.grad_query, grid, axis, line) + i0 * dq_row;
        const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat_row;
        const float* lse_in = static_cast<const float*>(args.lse) + stat0;
        float* delta_io = static_cast<float*>(args.delta) + stat0;

        pack_transposed(q, q_row, rows, QK, r16, q_transposed, i_ld);
        pack_pairs(q, q_row, rows, QK, r32, q_pairs, qk_ld);
        pack_transposed(g, g_row, rows, C, r16, g_transposed, i_ld);
        pack_pairs(g, g_row, rows, C, r32, g_pairs, c_ld);
        for (int64_t i = 0; i < rows; ++i) {
          lse[i] = lse_in[i * stat_row];
          if (first) {
            reg even = V::zero(), odd = V::zero();
            const __m512i zero = _mm512_setzero_si512();
            for (int64_t c = 0; c < C; c += 32) {
              const __m512i x = load_words(g + i * g_row + c, C - c), y = load_words(o + i * o_row + c, C - c);
              even = V::fma(_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, x)),
                            _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, y)), even);
              odd = V::fma(_mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, x)),
                           _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, y)), odd);
            }
            delta_io[i * stat_row] = _mm512_reduce_add_ps(V::add(even, odd));
          }
          delta[i] = delta_io[i * stat_row];
        }
        for (int64_t i = rows; i < r32; ++i) lse[i] = delta[i] = 0.0f;

        product(l16, r16, qk32 / 32, k_plain, qk_words, q_transposed, i_ld, s, i_ld, &ahead);
        product(l16, r16, c32 / 32, v_plain, c_words, g_transposed, i_ld, dp, i_ld, &ahead);
        for (int64_t j = 0; j < l32; ++j) {
          // Rows beyond the line and columns beyond the block are zero in p and ds.
          for (int64_t i = 0; i < r32; i += 16) {
            const int64_t from = j * i_ld + i, to = j * i_words + i;
            __m256i weights = _mm256_setzero_si256(), grads = _mm256_setzero_si256();
            if (j < L && i < rows) {
              __mmask16 valid = V::first(static_cast<int>(rows - i < 16 ? rows - i : 16));
              const int64_t self = j - i0 - i;
              if (masked && self >= 0 && self < 16) valid &= static_cast<__mmask16>(~(1u << self));
              const reg w = _mm512_maskz_mov_ps(valid, V::exp(V::sub(V::load(s + from), V::load(lse + i))));
              weights = (__m256i)_mm512_cvtneps_pbh(w);
              grads = (__m256i)_mm512_cvtneps_pbh(
                  _mm512_maskz_mul_ps(valid, w, V::sub(V::load(dp + from), V::load(delta + i))));
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + to), weights);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + to), grads);
          }
        }
        transpose_words(ds, i_words, r32, l32, ds_rows, j_words);
        const BlockPosition at{i0 == 0, i0 + block >= L};
        product_to_line(r16, rows, QK, l32 / 32, ds_rows, j_words, k_pairs, qk_ld, tile, dq, dq_row, !first, nullptr, at,
                        &ahead);
        product_to_line(l16, L, QK, r32 / 32, ds, i_words, q_pairs, qk_ld, tile,
                        line_data<BFloat16>(args.grad_key, grid, axis, line), dk_row, !first, dk_sums, at,
                        &ahead);
        product_to_line(l16, L, C, r32 / 32, p, i_words, g_pairs, c_ld, tile,
                        line_data<BFloat16>(args.grad_value, grid, axis, line), dv_row, !first, dv_sums, at,
                        &ahead);
      }
    }
    return true;
  });
}

void backward(const BackwardArgs& args) {
  const int first = first_axis(args.grid);
  for (int axis = first; axis < args.grid.axes; ++axis) {
    if (contributes(args.grid, axis)) backward_axis(args, axis, axis == first);
  }
}

Kernels kKernels{"amx", nullptr, forward, backward};

}  // namespace
}  // namespace cpu
}  // namespace ccnet

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace ccnet {
namespace cpu {
namespace {

// The processor has the tiles, the kernel saves them, and this process may use them (Linux asks for permission).
bool tiles_usable() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(1, 0, &eax, &ebx, &ecx, &edx) || !(ecx & (1u << 27))) return false;  // OSXSAVE
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & (1u << 22)) || !(edx & (1u << 24))) return false;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & (1u << 5))) return false;  // AVX512-BF16
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & (3u << 17)) != (3u << 17)) return false;
  const long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels* const usable = [] {
    const Kernels* plain = avx512_kernels();
    if (plain == nullptr || !tiles_usable()) return static_cast<const Kernels*>(nullptr);
    kKernels.to_channels_last = plain->to_channels_last;  // nothing to gain from tiles
    return static_cast<const Kernels*>(&kKernels);
  }();
  return usable;
}
}  // namespace cpu
}  // namespace ccnet

#else
namespace ccnet {
namespace cpu {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace ccnet
#endif
