// Forward and backward of criss-cross attention in bf16, line by line, for processors that multiply pairs of bf16
// numbers into fp32 sums: matrix units (kernel_amx.cpp) or vectors (kernel_avx512bf16.cpp).
//
// Included once per instruction set, inside that translation unit's anonymous namespace, after storage.h,
// vector_avx512.h, work.h and merge_rows.h.
//
// The same walk over lines as line_kernels.h. The left operand of a product is row-major; the right one has pairs of
// rows interleaved, so that a 32-bit unit holds two successive k of one column. Two packings produce it:
//   pack_pairs        B[k, n] = src[k, n]   rows 2k and 2k+1 interleaved. The unpack instructions work within 128-bit
//                                           lanes, which permutes the columns in each 32; store_words undoes it.
//   pack_transposed   B[k, n] = src[n, k]   a transpose of 32-bit units, columns in order.
// Everything is padded with zeros to what the products take. Weights and their gradients are rounded to bf16 between
// products, as in plain PyTorch; energies, softmax, sums and accumulators are fp32.
//
// An Engine multiplies:
//   kRows, kDepth     products take rows of A in multiples of kRows and successive k in multiples of kDepth
//   kColumns          queries whose energies are computed at once, a multiple of 32: so few that they stay in the
//                     first-level cache until softmax, or its backward, is done with them
//   kEdgeColumns      up to so many queries beyond the last 16 are better served by dot products than by a vector of
//                     which most is padding; images of 8n + 1 pixels are the rule in segmentation (97 = 6 * 16 + 1)
//   kEdgeDepth        up to so many k beyond whole kDepth are left to product_to's vectors, for the same reason
//   Session           lives as long as the thread multiplies
//   product           C[M, N] = A B, N a multiple of 16
//   product_to        the same, N a multiple of 32, each result handed to finish(row, column, lo, hi): the numbers of
//                     32 columns as pack_pairs ordered them; only rows below `rows` are handed out
//   steps(M, N, k)    how often such a product asks for memory ahead

using V = Avx512;
using reg = __m512;

constexpr int64_t kPanel = 64;  // output columns per pass

#include "ahead.h"

// Row strides of an odd number of cache lines (see `leading`): of bf16 rows, in numbers.
int64_t words_leading(int64_t n) { return 2 * leading<V>(n / 2); }

// -------------------------------------------------------------------------------------------------- packing

inline __m512i load_words(const BFloat16* p, int64_t n) {
  return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(V::first_words(n), p);
}

// dst[i, c] = src[i, c], i < rows, c < cols, zeros up to padded_rows and to a multiple of 32 columns.
void pack_plain(const BFloat16* src, int64_t row, int64_t rows, int64_t cols, int64_t padded_rows, BFloat16* dst,
                int64_t ld, Ahead* ahead) {
  for (int64_t i = 0; i < padded_rows; ++i) {
    if (i % 4 == 0) ahead->ask();
    for (int64_t c = 0; c < cols; c += 32) {
      const __m512i x = i < rows ? load_words(src + i * row + c, cols - c) : _mm512_setzero_si512();
      _mm512_storeu_si512(dst + i * ld + c, x);
    }
  }
}

// dst[r, c] = (src[2r, c], src[2r+1, c]) for c < cols padded to 32, 2r < padded_rows; columns permuted (see above).
void pack_pairs(const BFloat16* src, int64_t row, int64_t rows, int64_t cols, int64_t padded_rows, uint32_t* dst,
                int64_t ld, Ahead* ahead) {
  for (int64_t i = 0; i < padded_rows; i += 2) {
    if (i % 8 == 0) ahead->ask();
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
                     uint32_t* dst, int64_t ld, Ahead* ahead) {
  for (int64_t i = 0; i < padded_rows; i += 16) {
    for (int64_t c = 0; c < cols; c += 32) {
      ahead->ask();
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

// The rows of a line as the left operand of products: in place where they are whole steps of the products, and only the
// last few, which a product's last block of rows would read past the end of, from a copy that is padded with zeros.
template <class Engine>
class LeftRows {
 public:
  // Numbers of scratch memory for lines of `length` rows and `cols` numbers.
  static int64_t scratch(int64_t length, int64_t cols) {
    return (in_place(cols) ? Engine::kRows : round_up(length, Engine::kRows)) * words_leading(round_up(cols, 32));
  }

  LeftRows(const BFloat16* src, int64_t row, int64_t rows, int64_t cols, BFloat16* copy, Ahead* ahead)
      : src_(src), copy_(copy), row_(row), copy_row_(words_leading(round_up(cols, 32))),
        whole_(in_place(cols) ? rows / Engine::kRows * Engine::kRows : 0),
        rest_(round_up(rows - whole_, Engine::kRows)) {
    pack_plain(src + whole_ * row, row, rows - whole_, cols, rest_, copy, copy_row_, ahead);
  }

  // C[rows, N] = rows times B.
  void product(int64_t N, int64_t depth, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, Ahead* ahead) const {
    if (whole_ > 0) Engine::product(whole_, N, depth, src_, row_, b, ldb, c, ldc, ahead);
    if (rest_ > 0) Engine::product(rest_, N, depth, copy_, copy_row_, b, ldb, c + whole_ * ldc, ldc, ahead);
  }

  const BFloat16* row(int64_t i) const { return i < whole_ ? src_ + i * row_ : copy_ + (i - whole_) * copy_row_; }

 private:
  static bool in_place(int64_t cols) { return cols % 32 == 0; }

  const BFloat16* src_;
  const BFloat16* copy_;
  int64_t row_, copy_row_, whole_, rest_;
};

// sum_c a[c] * b[c]
inline float dot_words(const BFloat16* a, const BFloat16* b, int64_t count) {
  reg sum = V::zero();
  for (int64_t c = 0; c < count; c += 32) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)load_words(a + c, count - c), (__m512bh)load_words(b + c, count - c));
  }
  return _mm512_reduce_add_ps(sum);
}

// The last k of a product where it is one more than whole kDepth, which would be mostly padding: what product_to hands
// out is A B + weights[row * step] values[column].
struct DepthEdge {
  const BFloat16* values = nullptr;
  int64_t cols = 0;
  const BFloat16* weights = nullptr;
  int64_t step = 0;

  // 32 values, in the order of pack_pairs.
  void columns(int64_t c, reg* lo, reg* hi) const {
    const __m512i x = load_words(values + c, cols - c > 0 ? cols - c : 0), zero = _mm512_setzero_si512();
    *lo = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, x));
    *hi = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, x));
  }
};

// How many of `depth` k are such an edge.
template <class Engine>
int64_t depth_edge(int64_t depth) {
  return depth > Engine::kDepth && depth % Engine::kDepth <= Engine::kEdgeDepth ? depth % Engine::kDepth : 0;
}

// ---------------------------------------------------------------------------------------------------- storing

inline __m512i words_in_order(reg lo, reg hi) {
  const __m512i order = _mm512_set_epi16(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8,  //
                                         23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
}

// How results are stored, known when the code that stores them is compiled: it runs once for every 32 of them.
// WHOLE: they come in whole vectors of 32.
template <Store STORE, bool WHOLE>
struct StoreWay {
  static constexpr Store kStore = STORE;
  static constexpr bool kWhole = WHOLE;
};

// Calls run(StoreWay) for rows of `cols` numbers.
template <class F>
void with_store_way(Store store, int64_t cols, const F& run) {
  const bool whole = cols % 32 == 0;
  switch (store) {
    case Store::kReplace:
      return whole ? run(StoreWay<Store::kReplace, true>()) : run(StoreWay<Store::kReplace, false>());
    case Store::kJoin: return whole ? run(StoreWay<Store::kJoin, true>()) : run(StoreWay<Store::kJoin, false>());
    case Store::kPastCaches: return run(StoreWay<Store::kPastCaches, true>());  // never anything but cache lines
  }
}

// dst[0 .. cols) = (lo, hi), or (lo, hi) + old * dst, at most 32 numbers in the order of pack_pairs.
template <class Way>
inline void store_words(reg lo, reg hi, int64_t cols, reg old, BFloat16* dst) {
  const int64_t count = Way::kWhole ? 32 : cols;
  if (Way::kStore == Store::kJoin) {
    const __m512i before = load_words(dst, count), zero = _mm512_setzero_si512();
    lo = V::fma(_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, before)), old, lo);
    hi = V::fma(_mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, before)), old, hi);
  }
  const __m512i words = words_in_order(lo, hi);
  if (Way::kStore == Store::kPastCaches) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), words);
  } else if (count >= 32) {
    _mm512_storeu_si512(dst, words);
  } else {
    _mm512_mask_storeu_epi16(dst, V::first_words(count), words);
  }
}

// What becomes of the forward pass' products: dst[row, c] = fresh[row] * product, or that + keep[row] * dst[row, c].
template <class Way>
struct MeanStore {
  BFloat16* dst;
  int64_t row_step, cols;
  const float* keep;
  const float* fresh;

  void operator()(int64_t row, int64_t c, reg lo, reg hi) const {
    const reg scale = V::set1(fresh[row]);
    store_words<Way>(V::mul(lo, scale), V::mul(hi, scale), cols - c, V::set1(keep[row]), dst + row * row_step + c);
  }
};

// Block of queries of a line: the first, the last, one in between.
struct BlockPosition {
  bool first, last;
};

// A line of a gradient. Where it comes in several blocks of queries, `sums` [rows, cols padded to 32] keeps the fp32
// totals, and dst is written with the last block.
struct GradientLine {
  BFloat16* dst;
  int64_t row_step, cols;
  Store store;
  float* sums;
  BlockPosition at;

  int64_t padded() const { return round_up(cols, 32); }
};

// What becomes of its products: dst[row, c] (+)= product.
template <class Way>
struct GradientStore {
  GradientLine line;

  void operator()(int64_t row, int64_t c, reg lo, reg hi) const {
    if (line.sums != nullptr) {
      float* s = line.sums + row * line.padded() + c;
      if (!line.at.first) {
        lo = V::add(V::load(s), lo);
        hi = V::add(V::load(s + 16), hi);
      }
      if (!line.at.last) {
        V::store(s, lo);
        V::store(s + 16, hi);
        return;
      }
    }
    store_words<Way>(lo, hi, line.cols - c, V::set1(1.0f), line.dst + row * line.row_step + c);
  }
};

// Engine::product_to, to a line of a gradient.
template <class Engine>
void product_to_gradient(int64_t M, int64_t rows, int64_t depth, const BFloat16* a, int64_t lda, const uint32_t* b,
                         int64_t ldb, const DepthEdge& edge, const GradientLine& line, Ahead* ahead) {
  with_store_way(line.store, line.cols, [&](auto way) {
    Engine::product_to(M, rows, line.padded(), depth, a, lda, b, ldb, GradientStore<decltype(way)>{line}, ahead, edge);
  });
}

// How an axis writes a tensor that the axes add up.
Store axis_store(const Grid& grid, const TensorRef& t, int64_t channels, bool first) {
  if (!first) return Store::kJoin;
  return outgrows_caches(grid, t, channels, sizeof(BFloat16)) ? Store::kPastCaches : Store::kReplace;
}

// ---------------------------------------------------------------------------------------------------- forward

// Query rows handled at once, a multiple of 32 unless it is the whole line.
int64_t block_rows(int64_t length) {
  if (length <= 256) return length;
  const int64_t rows = 256 * 256 / length / 32 * 32;
  return rows < 32 ? 32 : rows;
}

// exp for weights, which are rounded to 8 bits afterwards: relative error below 1e-6 for x in [-16, 0], and 1e-5 below,
// where weights no longer matter; 0 below kLeastExponent. 2^t is 2^floor(t) times a polynomial of the fraction.
inline reg weight_exp(reg x) {
  const reg t = V::mul(x, V::set1(1.44269504088896341f));
  const reg r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);
  reg p = V::set1(1.8775764100062524e-3f);
  p = V::fma(p, r, V::set1(8.989340732314256e-3f));
  p = V::fma(p, r, V::set1(5.582631751465259e-2f));
  p = V::fma(p, r, V::set1(2.401536172263563e-1f));
  p = V::fma(p, r, V::set1(6.931530731791089e-1f));
  p = V::fma(p, r, V::set1(9.999999250639034e-1f));
  return _mm512_maskz_scalef_ps(V::counts(x), p, t);
}

// Weights of 16 queries: p[i, j] = exp(s[j, i] - max_i) in bf16, zero for L <= j < the next multiple of 32, with the
// maxima and the (fp32) sums. Down the columns nothing is horizontal; the weights are then transposed in registers.
void softmax_columns(const float* s, int64_t ld, int64_t L, BFloat16* p, int64_t p_ld, float* max, float* sum,
                     Ahead* ahead) {
  reg m0 = V::load(s), m1 = m0;
  for (int64_t j = 1; j < L; j += 2) {
    m0 = V::max(m0, V::load(s + j * ld));
    m1 = V::max(m1, V::load(s + (j + 1 < L ? j + 1 : j) * ld));
  }
  const reg m = V::max(m0, m1);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  reg s0 = V::zero(), s1 = V::zero();
  for (int64_t j0 = 0; j0 < L; j0 += 32) {
    alignas(64) float pairs[16][16];
    for (int r = 0; r < 16; ++r) {
      if (r % 2 == 0) ahead->ask();
      const int64_t j = j0 + 2 * r;
      const reg e0 = j < L ? weight_exp(V::sub(V::load(s + j * ld), m)) : V::zero();
      const reg e1 = j + 1 < L ? weight_exp(V::sub(V::load(s + (j + 1) * ld), m)) : V::zero();
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

template <class Engine>
void forward_axis(const ForwardArgs& args, int axis, bool first, bool last) {
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = block_rows(L), blocks = (L + block - 1) / block;
  const int64_t l32 = round_up(L, 32), l16 = round_up(L, 16), b16 = round_up(block, 16);
  const int64_t qk32 = round_up(QK, 32), c32 = round_up(C, 32);
  const int64_t key_edge = depth_edge<Engine>(L);
  const int64_t key_rows = round_up(L, Engine::kRows), key_depth = round_up(L - key_edge, Engine::kDepth);
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const int64_t stat_row = stat.axis[axis];
  const int64_t v_row = args.value.strides.axis[axis], o_row = args.out.strides.axis[axis];
  const int64_t q_row = args.query.strides.axis[axis], k_row = args.key.strides.axis[axis];

  const Store store = axis_store(grid, args.out, C, first);

  const int64_t ld = leading<V>(b16), p_ld = words_leading(l32);
  const int64_t columns = b16 < Engine::kColumns ? b16 : Engine::kColumns;

  run_items(args, grid.lines(axis) * blocks, [&](auto next) {
    const int64_t key_copy = LeftRows<Engine>::scratch(L, QK);
    Scratch<float> scratch(key_copy / 2 + qk32 / 2 * ld + l16 * columns + b16 * p_ld / 2 + l32 / 2 * kPanel + 4 * b16);
    if (!scratch.ok()) return false;
    BFloat16* k_copy = reinterpret_cast<BFloat16*>(scratch.take(key_copy / 2));
    uint32_t* q_transposed = reinterpret_cast<uint32_t*>(scratch.take(qk32 / 2 * ld));
    float* s = scratch.take(l16 * columns);  // energies [j, i] of some queries
    BFloat16* p = reinterpret_cast<BFloat16*>(scratch.take(b16 * p_ld / 2));  // weights [i, j]
    uint32_t* v_pairs = reinterpret_cast<uint32_t*>(scratch.take(l32 / 2 * kPanel));
    float* keep = scratch.take(b16);
    float* fresh = scratch.take(b16);
    float* before_max = scratch.take(b16);
    float* before_sum = scratch.take(b16);
    [[maybe_unused]] typename Engine::Session session;

    int64_t item, upcoming;
    bool more = next(&item);
    for (; more; item = upcoming) {
      more = next(&upcoming);
      const int64_t line = item / blocks, i0 = item % blocks * block;
      const int64_t rows = L - i0 < block ? L - i0 : block;
      const int64_t r16 = round_up(rows, 16), query_rows = round_up(rows, Engine::kRows);
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
        if (store != Store::kPastCaches) ahead.add(line_data<BFloat16>(args.out, grid, axis, next_line), o_row, L, C);
        ahead.spread(Engine::steps(key_rows, r16, qk32) + Engine::steps(query_rows, c32, key_depth) +
                     r16 / 16 * (l32 / 4) + c32 / kPanel * (key_depth / 8 + rows / 4));
      }

      const LeftRows<Engine> k(line_data<BFloat16>(args.key, grid, axis, line), k_row, L, QK, k_copy, &ahead);
      pack_transposed(line_data<BFloat16>(args.query, grid, axis, line) + i0 * q_row, q_row, rows, QK, r16,
                      q_transposed, ld, &ahead);
      for (int64_t from = 0; from < r16; from += columns) {
        const int64_t here = r16 - from < columns ? r16 - from : columns;
        k.product(here, qk32, q_transposed + from, ld, s, columns, &ahead);
        if (masked) {
          const int64_t real = rows - from < here ? rows - from : here;
          for (int64_t i = 0; i < real; ++i) s[(i0 + from + i) * columns + i] = -INFINITY;
        }
        for (int64_t i = from; i < from + here; i += 16) {
          softmax_columns(s + i - from, columns, L, p + i * p_ld, p_ld, keep + i, fresh + i, &ahead);
        }
      }
      merge_rows<V>(rows, first, last, max_out, sum_out, stat_row, keep, fresh, before_max, before_sum);

      for (int64_t c = 0; c < c32; c += kPanel) {
        const int64_t width = c32 - c < kPanel ? c32 - c : kPanel;
        const int64_t valid = C - c < width ? C - c : width;
        pack_pairs(v + c, v_row, L, valid, key_depth, v_pairs, kPanel, &ahead);
        with_store_way(store, valid, [&](auto way) {
          const MeanStore<decltype(way)> to{o + c, o_row, valid, keep, fresh};
          DepthEdge edge;
          if (key_edge > 0) edge = {v + key_depth * v_row + c, valid, p + key_depth, p_ld};
          Engine::product_to(query_rows, rows, width, key_depth, p, p_ld, v_pairs, kPanel, to, &ahead, edge);
        });
      }
    }
    V::fence();
    return true;
  });
}

template <class Engine>
void forward(const ForwardArgs& args) {
  for_axes(args.grid, [&](int axis, bool first, bool last) { forward_axis<Engine>(args, axis, first, last); });
}

// --------------------------------------------------------------------------------------------------- backward

template <class Engine>
void backward_axis(const BackwardArgs& args, int axis, bool first) {
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = block_rows(L), blocks = (L + block - 1) / block;
  const int64_t l32 = round_up(L, 32), b32 = round_up(block, 32);
  const int64_t qk32 = round_up(QK, 32), c32 = round_up(C, 32);
  const int64_t key_edge = depth_edge<Engine>(L);
  const int64_t key_rows = round_up(L, Engine::kRows), key_depth = round_up(L - key_edge, Engine::kDepth);
  const int64_t key_copy = LeftRows<Engine>::scratch(L, QK), value_copy = LeftRows<Engine>::scratch(L, C);
  const int64_t i_words = words_leading(b32), j_words = words_leading(l32);
  const int64_t qk_ld = leading<V>(qk32), c_ld = leading<V>(c32), i_ld = leading<V>(b32);
  const int64_t columns = b32 < Engine::kColumns ? b32 : Engine::kColumns;
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const int64_t stat_row = stat.axis[axis];
  const int64_t q_row = args.query.strides.axis[axis], k_row = args.key.strides.axis[axis];
  const int64_t v_row = args.value.strides.axis[axis], o_row = args.out.strides.axis[axis];
  const int64_t g_row = args.grad_out.strides.axis[axis];
  const int64_t dq_row = args.grad_query.strides.axis[axis], dk_row = args.grad_key.strides.axis[axis];
  const int64_t dv_row = args.grad_value.strides.axis[axis];

  const Store query_store = first ? Store::kReplace : Store::kJoin;
  const Store value_store = axis_store(grid, args.grad_value, C, first);

  run_items(args, grid.lines(axis), [&](auto next) {
    const int64_t kept = blocks > 1 ? l32 * (qk32 + c32) : 0;
    Scratch<float> scratch((key_copy + b32 * j_words + value_copy) / 2 + l32 * i_words + l32 / 2 * qk_ld +
                           qk32 / 2 * i_ld + b32 / 2 * qk_ld + 2 * l32 * columns + c32 / 2 * i_ld + b32 / 2 * c_ld +
                           2 * b32 + kept);
    if (!scratch.ok()) return false;
    const auto take_words = [&](int64_t n) { return reinterpret_cast<BFloat16*>(scratch.take(n / 2)); };
    const auto take_pairs = [&](int64_t n) { return reinterpret_cast<uint32_t*>(scratch.take(n)); };
    BFloat16* k_copy = take_words(key_copy);
    uint32_t* k_pairs = take_pairs(l32 / 2 * qk_ld);
    uint32_t* q_transposed = take_pairs(qk32 / 2 * i_ld);
    uint32_t* q_pairs = take_pairs(b32 / 2 * qk_ld);
    float* s = scratch.take(l32 * columns);         // energies [j, i] of some queries
    float* dp = scratch.take(l32 * columns);        // grad of their weights [j, i]
    BFloat16* p = take_words(l32 * i_words);        // weights [j, i]
    BFloat16* ds = take_words(l32 * i_words);       // grad of the energies [j, i]
    BFloat16* ds_rows = take_words(b32 * j_words);  // the same [i, j]
    BFloat16* v_copy = take_words(value_copy);
    uint32_t* g_transposed = take_pairs(c32 / 2 * i_ld);
    uint32_t* g_pairs = take_pairs(b32 / 2 * c_ld);
    float* lse = scratch.take(b32);
    float* delta = scratch.take(b32);
    float* dk_sums = blocks > 1 ? scratch.take(l32 * qk32) : nullptr;
    float* dv_sums = blocks > 1 ? scratch.take(l32 * c32) : nullptr;
    [[maybe_unused]] typename Engine::Session session;

    int64_t line, upcoming;
    bool more = next(&line);
    for (; more; line = upcoming) {
      more = next(&upcoming);
      const int64_t next_line = more ? upcoming : line;
      const BFloat16* k = line_data<BFloat16>(args.key, grid, axis, line);
      Ahead ahead;
      if (more) {
        const int64_t n = L < block ? L : block;
        ahead.add(line_data<BFloat16>(args.key, grid, axis, next_line), k_row, L, QK);
        ahead.add(line_data<BFloat16>(args.query, grid, axis, next_line), q_row, n, QK);
        ahead.add(line_data<BFloat16>(args.grad_out, grid, axis, next_line), g_row, n, C);
        if (first) ahead.add(line_data<BFloat16>(args.out, grid, axis, next_line), o_row, n, C);
        ahead.add(line_data<BFloat16>(args.value, grid, axis, next_line), v_row, L, C);
        if (value_store != Store::kPastCaches) {
          ahead.add(line_data<BFloat16>(args.grad_value, grid, axis, next_line), dv_row, L, C);
        }
        ahead.add(line_data<BFloat16>(args.grad_query, grid, axis, next_line), dq_row, n, QK);
        ahead.add(line_data<BFloat16>(args.grad_key, grid, axis, next_line), dk_row, L, QK);
        const int64_t products = Engine::steps(key_rows, n, qk32) + Engine::steps(key_rows, n, c32) +
                                 Engine::steps(n, qk32, key_depth) + Engine::steps(key_rows, qk32 + c32, n);
        const int64_t packing = n / 16 * (qk32 + c32) / 32 + n / 4 + (first ? n : 0);
        const int64_t weighing = (n + columns - 1) / columns * (l32 / 8);
        const int64_t storing = (qk32 + c32) / kPanel * (key_rows / 4);
        ahead.spread(blocks * (products + packing + weighing + storing) + key_rows / 4);
      }
      const LeftRows<Engine> keys(k, k_row, L, QK, k_copy, &ahead);
      pack_pairs(k, k_row, L, QK, key_depth, k_pairs, qk_ld, &ahead);
      const LeftRows<Engine> values(line_data<BFloat16>(args.value, grid, axis, line), v_row, L, C, v_copy, &ahead);

      for (int64_t i0 = 0; i0 < L; i0 += block) {
        const int64_t rows = L - i0 < block ? L - i0 : block;
        const int64_t r32 = round_up(rows, 32), r16 = round_up(rows, 16);
        const int64_t query_edge = depth_edge<Engine>(rows);
        const int64_t query_rows = round_up(rows, Engine::kRows);
        const int64_t query_depth = round_up(rows - query_edge, Engine::kDepth);
        // Queries from here on are an edge, left to dot products.
        const int64_t inner = rows > 16 && rows % 16 <= Engine::kEdgeColumns ? rows - rows % 16 : r16;
        const BFloat16* q = line_data<BFloat16>(args.query, grid, axis, line) + i0 * q_row;
        const BFloat16* o = line_data<BFloat16>(args.out, grid, axis, line) + i0 * o_row;
        const BFloat16* g = line_data<BFloat16>(args.grad_out, grid, axis, line) + i0 * g_row;
        const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat_row;
        const float* lse_in = static_cast<const float*>(args.lse) + stat0;
        float* delta_io = static_cast<float*>(args.delta) + stat0;

        pack_transposed(q, q_row, rows, QK, r16, q_transposed, i_ld, &ahead);
        pack_pairs(q, q_row, rows, QK, query_depth, q_pairs, qk_ld, &ahead);
        // As many rows of grad_out at once as stay in the first-level cache until all is done with them.
        for (int64_t i = 0; i < query_depth || i < r16; i += 16) {
          const int64_t here = rows - i < 16 ? rows - i : 16;
          if (i < r16) pack_transposed(g + i * g_row, g_row, here, C, 16, g_transposed + i, i_ld, &ahead);
          if (i < query_depth) {
            pack_pairs(g + i * g_row, g_row, here, C, query_depth - i < 16 ? query_depth - i : 16,
                       g_pairs + i / 2 * c_ld, c_ld, &ahead);
          }
          for (int64_t n = i; n < i + here; ++n) {
            lse[n] = lse_in[n * stat_row];
            if (first) {
              ahead.ask();
              delta_io[n * stat_row] = dot_words(g + n * g_row, o + n * o_row, C);
            }
            delta[n] = delta_io[n * stat_row];
          }
        }
        for (int64_t i = rows; i < r32; ++i) lse[i] = delta[i] = 0.0f;

        for (int64_t from = 0; from < r32; from += columns) {
          const int64_t to = from + columns < r32 ? from + columns : r32;
          const int64_t here = (to < r16 ? to : r16) - from, whole = (to < inner ? to : inner) - from;
          keys.product(here, qk32, q_transposed + from, i_ld, s, columns, &ahead);
          values.product(whole, c32, g_transposed + from, i_ld, dp, columns, &ahead);
          for (int64_t i = from + whole; i < from + here && i < rows; ++i) {
            for (int64_t j = 0; j < L; ++j) dp[j * columns + i - from] = dot_words(values.row(j), g + i * g_row, C);
          }
          for (int64_t j = 0; j < l32; ++j) {
            if (j % 8 == 0) ahead.ask();
            // Rows beyond the line and columns beyond the block are zero in p and ds.
            for (int64_t i = from; i < to; i += 16) {
              __m256i weights = _mm256_setzero_si256(), grads = _mm256_setzero_si256();
              if (j < L && i < rows) {
                const int64_t at = j * columns + i - from, self = j - i0 - i;
                __mmask16 valid = V::first(static_cast<int>(rows - i < 16 ? rows - i : 16));
                if (masked && self >= 0 && self < 16) valid &= static_cast<__mmask16>(~(1u << self));
                const reg w = _mm512_maskz_mov_ps(valid, weight_exp(V::sub(V::load(s + at), V::load(lse + i))));
                weights = (__m256i)_mm512_cvtneps_pbh(w);
                grads = (__m256i)_mm512_cvtneps_pbh(
                    _mm512_maskz_mul_ps(valid, w, V::sub(V::load(dp + at), V::load(delta + i))));
              }
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + j * i_words + i), weights);
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + j * i_words + i), grads);
            }
          }
          for (int64_t j = 0; j < l32; j += 32) {
            for (int64_t i = from; i < to; i += 32) {
              V::transpose_words(ds + j * i_words + i, i_words, 32, 32, ds_rows + i * j_words + j, j_words);
            }
          }
        }
        const BlockPosition at{i0 == 0, i0 + block >= L};
        const GradientLine to_query{line_data<BFloat16>(args.grad_query, grid, axis, line) + i0 * dq_row,
                                    dq_row, QK, query_store, nullptr, at};
        const GradientLine to_key{line_data<BFloat16>(args.grad_key, grid, axis, line),
                                  dk_row, QK, query_store, dk_sums, at};
        const GradientLine to_value{line_data<BFloat16>(args.grad_value, grid, axis, line),
                                    dv_row, C, value_store, dv_sums, at};
        DepthEdge of_keys, of_queries, of_grads;
        if (key_edge > 0) of_keys = {k + key_depth * k_row, QK, ds_rows + key_depth, j_words};
        if (query_edge > 0) {
          of_queries = {q + query_depth * q_row, QK, ds + query_depth, i_words};
          of_grads = {g + query_depth * g_row, C, p + query_depth, i_words};
        }
        product_to_gradient<Engine>(query_rows, rows, key_depth, ds_rows, j_words, k_pairs, qk_ld, of_keys, to_query,
                                    &ahead);
        product_to_gradient<Engine>(key_rows, L, query_depth, ds, i_words, q_pairs, qk_ld, of_queries, to_key, &ahead);
        product_to_gradient<Engine>(key_rows, L, query_depth, p, i_words, g_pairs, c_ld, of_grads, to_value, &ahead);
      }
    }
    V::fence();
    return true;
  });
}

template <class Engine>
void backward(const BackwardArgs& args) {
  for_axes(args.grid, [&](int axis, bool first, bool) { backward_axis<Engine>(args, axis, first); });
}
