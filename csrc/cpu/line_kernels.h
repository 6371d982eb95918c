// Forward and backward of criss-cross attention, line by line, for any vector type.
//
// Included once per instruction set, inside that translation unit's anonymous namespace: nothing here may have
// external linkage, or the linker could merge code compiled for different processors.
//
// Every product is a small matrix product C[M, N] (+)= A[M, K] B[K, N] done by register-blocked micro-kernels:
// B is packed into panels of kPanel columns, A is read by broadcasts either along K (row-major A) or along M
// (column-major A). Only packing and the epilogues know the storage type; all arithmetic is done in V::T.
//
// Forward, per line of length L and block of query rows i:
//   St[j, i] = K Q^T       transposed, so that the softmax over j runs down columns with vertical operations
//   O[i, c]  = St^T V      A = St is column-major here, its broadcasts read consecutive numbers
// Backward, per line and block of query rows i:
//   P[i, j]  = exp(Q K^T - lse_i),  dP = dO V^T,  dS = P * (dP - delta_i)
//   dV = P^T dO,  dK = dS^T Q,  dQ = dS K
// A line owns its positions, so lines run in parallel without atomics; one parallel region per axis, in which the
// second and third axis add to what the first wrote. The result does not depend on the number of threads.

// ---------------------------------------------------------------------------------------------- micro-kernels

enum AOrder { kRowMajor, kColMajor };  // A[m, k] at a[m * lda + k] or a[k * lda + m]

#include "ahead.h"

// C = keep * C + fresh * (A B), one factor of each kind for every row; without accumulation C = fresh * (A B).
template <class T>
struct Scales {
  const T* keep;
  const T* fresh;
};

template <class V, int MR, int NR, AOrder ORDER>
struct MicroKernel {
  using T = typename V::T;
  // C[MR, NR * W] = A[MR, K] B[K, NR * W], in place of C or added to it or, with `scales`, joined with it row by row
  // (see Scales); rows of B are ldb apart.
  static void run(int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, Store store,
                  const Scales<T>* scales, Ahead* ahead) {
    typename V::reg acc[MR][NR];
    CCNET_UNROLL
    for (int r = 0; r < MR; ++r) {
      CCNET_UNROLL
      for (int n = 0; n < NR; ++n) acc[r][n] = V::zero();
    }
    // A few base pointers with small multiples of lda address all rows without spilling index registers.
    const T* base[(MR + 2) / 3];
    CCNET_UNROLL
    for (int r = 0; r < MR; r += 3) base[r / 3] = a + r * lda;
    const auto step = [&](int64_t k) CCNET_INLINE {
      typename V::reg bv[NR];
      CCNET_UNROLL
      for (int n = 0; n < NR; ++n) bv[n] = V::load(b + n * V::W);
      b += ldb;
      CCNET_UNROLL
      for (int r = 0; r < MR; ++r) {
        const typename V::reg av = V::set1(ORDER == kColMajor ? a[r] : base[r / 3][(r % 3) * lda + k]);
        CCNET_UNROLL
        for (int n = 0; n < NR; ++n) acc[r][n] = V::fma(av, bv[n], acc[r][n]);
      }
      if (ORDER == kColMajor) a += lda;
    };
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
      ahead->ask();
      step(k);
      step(k + 1);
      step(k + 2);
      step(k + 3);
    }
    for (; k < K; ++k) step(k);
    CCNET_UNROLL
    for (int r = 0; r < MR; ++r) {
      if (scales != nullptr) {
        const typename V::reg fresh = V::set1(scales->fresh[r]);
        CCNET_UNROLL
        for (int n = 0; n < NR; ++n) acc[r][n] = V::mul(acc[r][n], fresh);
      }
      const typename V::reg keep = V::set1(scales != nullptr ? scales->keep[r] : T(1));
      CCNET_UNROLL
      for (int n = 0; n < NR; ++n) {
        T* p = c + r * ldc + n * V::W;
        if (store == Store::kJoin) {
          V::store(p, V::fma(V::load(p), keep, acc[r][n]));
        } else if (store == Store::kPastCaches) {
          V::stream(p, acc[r][n]);
        } else {
          V::store(p, acc[r][n]);
        }
      }
    }
  }
};

// Rows of the micro-kernel with NR vectors per row: accumulators + NR + 1 registers must fit.
template <class V>
constexpr int max_rows(int nr) {
  return V::kAccumulators / nr > 12 ? 12 : V::kAccumulators / nr;
}

template <class V>
using MicroFn = void (*)(int64_t, const typename V::T*, int64_t, const typename V::T*, int64_t, typename V::T*,
                         int64_t, Store, const Scales<typename V::T>*, Ahead*);

template <class V, int NR, AOrder ORDER, int MR = max_rows<V>(NR)>
struct MicroTable {
  static MicroFn<V> get(int rows) {
    if (rows == MR) return &MicroKernel<V, MR, NR, ORDER>::run;
    return MicroTable<V, NR, ORDER, MR - 1>::get(rows);
  }
};
template <class V, int NR, AOrder ORDER>
struct MicroTable<V, NR, ORDER, 0> {
  static MicroFn<V> get(int) { return nullptr; }
};

template <class V, AOrder ORDER, int NR = V::kPanelVectors>
struct MicroSelect {
  static MicroFn<V> get(int rows, int vectors) {
    if (vectors == NR) return MicroTable<V, NR, ORDER>::get(rows);
    return MicroSelect<V, ORDER, NR - 1>::get(rows, vectors);
  }
};
template <class V, AOrder ORDER>
struct MicroSelect<V, ORDER, 0> {
  static MicroFn<V> get(int, int) { return nullptr; }
};

// Runs body(row, rows, fn) over M rows in nearly equal blocks: 97 rows are 12 blocks of 6 and 5 of 5, not 16 of 6
// and a lone row that would starve the multipliers.
template <class V, AOrder ORDER, class F>
void for_row_blocks(int64_t M, int vectors, const F& body) {
  const int most = max_rows<V>(vectors);
  const int64_t blocks = (M + most - 1) / most;
  if (blocks == 0) return;
  const int small = static_cast<int>(M / blocks);
  const int64_t large_blocks = M % blocks;
  const MicroFn<V> fn_small = MicroSelect<V, ORDER>::get(small, vectors);
  const MicroFn<V> fn_large = large_blocks ? MicroSelect<V, ORDER>::get(small + 1, vectors) : nullptr;
  int64_t row = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const bool large = i < large_blocks;
    const int rows = large ? small + 1 : small;
    body(row, rows, large ? fn_large : fn_small);
    row += rows;
  }
}

// C[M, n] (+)= A[M, K] B[K, n], n a multiple of W, B with row stride ldb, C with row stride ldc.
template <class V, AOrder ORDER>
void gemm(int64_t M, int64_t n, int64_t K, const typename V::T* a, int64_t lda, const typename V::T* b, int64_t ldb,
          typename V::T* c, int64_t ldc, bool accumulate, Ahead* ahead) {
  const Store store = accumulate ? Store::kJoin : Store::kReplace;
  for (int64_t col = 0; col < n;) {
    const int64_t left = (n - col) / V::W;
    const int vectors = static_cast<int>(left < V::kPanelVectors ? left : V::kPanelVectors);
    for_row_blocks<V, ORDER>(M, vectors, [&](int64_t row, int, MicroFn<V> fn) {
      fn(K, a + (ORDER == kColMajor ? row : row * lda), lda, b + col, ldb, c + row * ldc + col, ldc, store, nullptr,
         ahead);
    });
    col += vectors * V::W;
  }
}

// How often such a product of n / W = `vectors` vectors a row asks for memory ahead.
template <class V>
int64_t steps(int64_t M, int64_t vectors, int64_t K) {
  constexpr int most = max_rows<V>(V::kPanelVectors);
  const int64_t rest = vectors % V::kPanelVectors;
  int64_t blocks = vectors / V::kPanelVectors * ((M + most - 1) / most);
  if (rest > 0) blocks += (M + max_rows<V>(static_cast<int>(rest)) - 1) / max_rows<V>(static_cast<int>(rest));
  return blocks * ((K + 3) / 4);
}

// -------------------------------------------------------------------------------------------------- packing

// One line of a tensor: a matrix [L, channels] whose rows are `row` elements apart.
template <class S>
struct LineView {
  S* data;
  int64_t row;
};

// dst[i * ld + c] = src[i, first + c] for i < rows, c < cols; columns up to the next multiple of W are zeroed.
template <class V, class S>
void pack_rows(const LineView<const S>& src, int64_t rows, int64_t first, int64_t cols, typename V::T* dst,
               int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    const S* p = src.data + i * src.row + first;
    typename V::T* d = dst + i * ld;
    int64_t c = 0;
    for (; c + V::W <= cols; c += V::W) V::store(d + c, V::load(p + c));
    if (c < cols) V::store(d + c, V::load_n(p + c, static_cast<int>(cols - c)));
  }
}

// dst[c * ld + i] = src[i, first + c] for i < rows, c < cols; rows up to the next multiple of W are zeroed.
template <class V, class S>
void pack_columns(const LineView<const S>& src, int64_t rows, int64_t first, int64_t cols, typename V::T* dst,
                  int64_t ld) {
  for (int64_t i = 0; i < rows; i += V::W) {
    for (int64_t c = 0; c < cols; c += V::W) {
      const int width = static_cast<int>(cols - c < V::W ? cols - c : V::W);
      typename V::reg t[V::W];
      load_transposed<V>(src.data + i * src.row + first + c, src.row, rows - i, width, t);
      for (int r = 0; r < width; ++r) V::store(dst + (c + r) * ld + i, t[r]);
    }
  }
}

template <class S>
LineView<S> line_view(const TensorRef& t, const Grid& grid, int axis, int64_t line) {
  return {line_data<S>(t, grid, axis, line), t.strides.axis[axis]};
}

// A line in the forward pass, query and out from position `i0` on.
template <class S>
struct ForwardViews {
  LineView<const S> query, key, value;
  LineView<S> out;

  ForwardViews(const ForwardArgs& args, int axis, int64_t line, int64_t i0)
      : query(line_view<const S>(args.query, args.grid, axis, line)),
        key(line_view<const S>(args.key, args.grid, axis, line)),
        value(line_view<const S>(args.value, args.grid, axis, line)),
        out(line_view<S>(args.out, args.grid, axis, line)) {
    query.data += i0 * query.row;
    out.data += i0 * out.row;
  }
};

// A line in the backward pass, what belongs to queries from position `i0` on.
template <class S>
struct BackwardViews {
  LineView<const S> query, key, value, out, grad_out;
  LineView<S> grad_query, grad_key, grad_value;

  BackwardViews(const BackwardArgs& args, int axis, int64_t line, int64_t i0)
      : query(line_view<const S>(args.query, args.grid, axis, line)),
        key(line_view<const S>(args.key, args.grid, axis, line)),
        value(line_view<const S>(args.value, args.grid, axis, line)),
        out(line_view<const S>(args.out, args.grid, axis, line)),
        grad_out(line_view<const S>(args.grad_out, args.grid, axis, line)),
        grad_query(line_view<S>(args.grad_query, args.grid, axis, line)),
        grad_key(line_view<S>(args.grad_key, args.grid, axis, line)),
        grad_value(line_view<S>(args.grad_value, args.grid, axis, line)) {
    query.data += i0 * query.row;
    out.data += i0 * out.row;
    grad_out.data += i0 * grad_out.row;
    grad_query.data += i0 * grad_query.row;
  }
};

// The block of queries that a worker handles after this one, perhaps of the next line; none where rows is 0.
struct NextBlock {
  int64_t line, i0, rows;
  int64_t keys;  // that come new with it

  NextBlock(int64_t length, int64_t block, int64_t line_now, int64_t i0_now, bool more, int64_t upcoming) {
    const bool same_line = i0_now + block < length;
    line = same_line || !more ? line_now : upcoming;
    i0 = same_line ? i0_now + block : 0;
    rows = same_line || more ? (length - i0 < block ? length - i0 : block) : 0;
    keys = same_line || rows == 0 ? 0 : length;
  }

  // Asks for its query and key, and where this block's gradients of them go.
  template <class S>
  void ask_narrow(const BackwardArgs& args, int axis, const BackwardViews<S>& now, int64_t rows_now,
                  Ahead* ahead) const {
    const Grid& grid = args.grid;
    ahead->add(now.grad_query.data, now.grad_query.row, rows_now, args.qk_channels);
    ahead->add(now.grad_key.data, now.grad_key.row, grid.size[axis], args.qk_channels);
    ahead->add(line_data<const S>(args.query, grid, axis, line) + i0 * now.query.row, now.query.row, rows,
               args.qk_channels);
    ahead->add(line_data<const S>(args.key, grid, axis, line), now.key.row, keys, args.qk_channels);
  }

  // Asks for the first `cols` channels of its gradient and value.
  template <class S>
  void ask_wide(const BackwardArgs& args, int axis, const BackwardViews<S>& now, int64_t cols, Ahead* ahead) const {
    const Grid& grid = args.grid;
    ahead->add(line_data<const S>(args.grad_out, grid, axis, line) + i0 * now.grad_out.row, now.grad_out.row, rows,
               cols);
    ahead->add(line_data<const S>(args.value, grid, axis, line), now.value.row, rows > 0 ? grid.size[axis] : 0, cols);
  }
};

// Query rows handled at once: the whole line, unless its L x rows energies would overflow the second-level cache.
template <class V>
int64_t rows_per_block(int64_t length, int64_t limit_bytes) {
  int64_t rows = limit_bytes / static_cast<int64_t>(sizeof(typename V::T)) / (length > 0 ? length : 1);
  rows = rows / 48 * 48;
  if (rows < 48) rows = 48;
  return rows < length ? rows : length;
}

// How an axis writes a tensor that the axes add up. Numbers that are converted on the way are never written past the
// caches: that is done straight from the products' registers.
template <class V, class S>
Store axis_store(const Grid& grid, const TensorRef& t, int64_t channels, bool first) {
  if (!first) return Store::kJoin;
  const bool past = std::is_same<S, typename V::T>::value && outgrows_caches(grid, t, channels, sizeof(S));
  return past ? Store::kPastCaches : Store::kReplace;
}

// -------------------------------------------------------------------------------------------------- forward

#include "merge_rows.h"

template <class V, class S>
void forward_axis(const ForwardArgs& args, int axis, bool first, bool last) {
  using T = typename V::T;
  using reg = typename V::reg;
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = rows_per_block<V>(L, 512 * 1024);
  const int64_t blocks = (L + block - 1) / block;
  const int64_t bpad = leading<V>(block), qk_ld = leading<V>(QK);
  const int64_t panel = V::kPanelVectors * V::W;
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const Store store = axis_store<V, S>(grid, args.out, C, first);

  run_items(args, grid.lines(axis) * blocks, [&](auto next) {
    Scratch<T> scratch(L * qk_ld + QK * bpad + L * bpad + L * panel + 4 * bpad + panel * max_rows<V>(1) * 2);
    if (!scratch.ok()) return false;
    T* kr = scratch.take(L * qk_ld);
    T* qt = scratch.take(QK * bpad);
    T* st = scratch.take(L * bpad);
    T* vp = scratch.take(L * panel);
    T* keep = scratch.take(bpad);   // factor of what is already in out
    T* fresh = scratch.take(bpad);  // factor of this axis' sum_j exp(S - max) V
    T* before_max = scratch.take(bpad);
    T* before_sum = scratch.take(bpad);
    T* tile = scratch.take(panel * max_rows<V>(1));
    int64_t packed_line = -1;

    int64_t item, upcoming;
    for (bool more = next(&item); more; item = upcoming) {
      more = next(&upcoming);
      const int64_t line = item / blocks, i0 = item % blocks * block;
      const int64_t rows = L - i0 < block ? L - i0 : block;
      const int64_t rpad = round_up(rows, V::W);
      const ForwardViews<S> views(args, axis, line, i0);
      const auto &q = views.query, &k = views.key, &v = views.value;
      const auto& o = views.out;
      const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat.axis[axis];
      T* max_out = static_cast<T*>(args.max) + stat0;
      T* sum_out = static_cast<T*>(args.lse) + stat0;
      const int64_t stat_row = stat.axis[axis];

      if (packed_line != line) {
        pack_rows<V>(k, L, 0, QK, kr, qk_ld);
        packed_line = line;
      }
      pack_columns<V>(q, rows, 0, QK, qt, bpad);
      // Each product asks for what the next one reads and writes.
      Ahead first_panel;
      first_panel.add(v.data, v.row, L, panel < C ? panel : C);
      if (store != Store::kPastCaches) first_panel.add(o.data, o.row, rows, panel < C ? panel : C);
      first_panel.spread(steps<V>(L, rpad / V::W, QK));
      gemm<V, kRowMajor>(L, rpad, QK, kr, qk_ld, qt, bpad, st, bpad, false, &first_panel);
      if (masked) {
        for (int64_t i = 0; i < rows; ++i) st[(i0 + i) * bpad + i] = static_cast<T>(-INFINITY);
      }

      for (int64_t i = 0; i < rpad; i += V::W) {
        reg m0 = V::load(st + i), m1 = m0;
        int64_t j = 1;
        for (; j + 1 < L; j += 2) {
          m0 = V::max(m0, V::load(st + j * bpad + i));
          m1 = V::max(m1, V::load(st + (j + 1) * bpad + i));
        }
        if (j < L) m0 = V::max(m0, V::load(st + j * bpad + i));
        m0 = V::max(m0, m1);
        reg s0 = V::zero(), s1 = V::zero();
        j = 0;
        for (; j + 1 < L; j += 2) {
          T* p = st + j * bpad + i;
          const reg e0 = V::exp(V::sub(V::load(p), m0)), e1 = V::exp(V::sub(V::load(p + bpad), m0));
          V::store(p, e0);
          V::store(p + bpad, e1);
          s0 = V::add(s0, e0);
          s1 = V::add(s1, e1);
        }
        if (j < L) {
          T* p = st + j * bpad + i;
          const reg e0 = V::exp(V::sub(V::load(p), m0));
          V::store(p, e0);
          s0 = V::add(s0, e0);
        }
        V::store(keep + i, m0);
        V::store(fresh + i, V::add(s0, s1));
      }
      merge_rows<V>(rows, first, last, max_out, sum_out, stat_row, keep, fresh, before_max, before_sum);

      for (int64_t c = 0; c < C; c += panel) {
        const int64_t cols = C - c < panel ? C - c : panel;
        const int64_t width = round_up(cols, V::W);
        const int64_t next_cols = C - c - cols < panel ? C - c - cols : panel;
        pack_rows<V>(v, L, c, cols, vp, width);
        Ahead ahead;
        if (next_cols > 0) {
          ahead.add(v.data + c + cols, v.row, L, next_cols);
          if (store != Store::kPastCaches) ahead.add(o.data + c + cols, o.row, rows, next_cols);
        } else if (more) {
          const int64_t next_line = upcoming / blocks, next_i0 = upcoming % blocks * block;
          const auto next_q = line_view<const S>(args.query, grid, axis, next_line);
          ahead.add(next_q.data + next_i0 * next_q.row, next_q.row, L - next_i0 < block ? L - next_i0 : block, QK);
          if (next_line != line) ahead.add(line_data<const S>(args.key, grid, axis, next_line), k.row, L, QK);
        }
        ahead.spread(steps<V>(rows, width / V::W, L));
        for_row_blocks<V, kColMajor>(rows, static_cast<int>(width / V::W), [&](int64_t row, int count, MicroFn<V> fn) {
          if constexpr (std::is_same<S, T>::value) {
            if (width == cols) {
              const Scales<T> scales{keep + row, fresh + row};
              fn(L, st + row, bpad, vp, width, o.data + row * o.row + c, o.row, store, &scales, &ahead);
              return;
            }
          }
          fn(L, st + row, bpad, vp, width, tile, width, Store::kReplace, nullptr, &ahead);
          for (int r = 0; r < count; ++r) {
            S* d = o.data + (row + r) * o.row + c;
            const T* t = tile + r * width;
            const reg scale = V::set1(fresh[row + r]), old = V::set1(keep[row + r]);
            for (int64_t x = 0; x < cols; x += V::W) {
              reg y = V::mul(V::load(t + x), scale);
              if (!first) y = V::fma(load_some<V>(d + x, cols - x), old, y);
              store_some<V>(d + x, y, cols - x);
            }
          }
        });
      }
    }
    V::fence();
    return true;
  });
}

template <class V, class S>
void forward_typed(const ForwardArgs& args) {
  for_axes(args.grid, [&](int axis, bool first, bool last) { forward_axis<V, S>(args, axis, first, last); });
}

// ------------------------------------------------------------------------------------------------- backward

// dst[row, x] (+)= tile[r, x]
template <class V, class S>
void add_rows(const typename V::T* tile, int64_t ld, int64_t rows, int64_t cols, const LineView<S>& dst, int64_t row,
              int64_t first_col, bool accumulate) {
  using reg = typename V::reg;
  for (int64_t r = 0; r < rows; ++r) {
    S* d = dst.data + (row + r) * dst.row + first_col;
    const typename V::T* t = tile + r * ld;
    for (int64_t x = 0; x < cols; x += V::W) {
      reg y = V::load(t + x);
      if (accumulate) y = V::add(load_some<V>(d + x, cols - x), y);
      store_some<V>(d + x, y, cols - x);
    }
  }
}

// dst[M, 0..cols) (+)= A[M, K] B[K, cols]: B packed with row stride ldb, dst in storage type.
template <class V, AOrder ORDER, class S>
void gemm_to_line(int64_t M, int64_t cols, int64_t K, const typename V::T* a, int64_t lda, const typename V::T* b,
                  int64_t ldb, typename V::T* tile, const LineView<S>& dst, int64_t first_col, Store store,
                  Ahead* ahead) {
  const int64_t padded = round_up(cols, V::W);
  for (int64_t col = 0; col < padded;) {
    const int64_t left = (padded - col) / V::W;
    const int vectors = static_cast<int>(left < V::kPanelVectors ? left : V::kPanelVectors);
    const int64_t width = vectors * V::W;
    const int64_t valid = cols - col < width ? cols - col : width;
    for_row_blocks<V, ORDER>(M, vectors, [&](int64_t row, int count, MicroFn<V> fn) {
      const typename V::T* a_rows = a + (ORDER == kColMajor ? row : row * lda);
      if constexpr (std::is_same<S, typename V::T>::value) {
        if (valid == width) {
          S* to = dst.data + row * dst.row + first_col + col;
          fn(K, a_rows, lda, b + col, ldb, to, dst.row, store, nullptr, ahead);
          return;
        }
      }
      fn(K, a_rows, lda, b + col, ldb, tile, width, Store::kReplace, nullptr, ahead);
      add_rows<V>(tile, width, count, valid, dst, row, first_col + col, store == Store::kJoin);
    });
    col += width;
  }
}

// Keys beyond the last whole vector where they are few: for them dP is a dot product per row rather than a vector of
// which most is padding. Images of 8n + 1 pixels are the rule in segmentation (97 = 6 * 16 + 1).
template <class V>
int64_t edge_columns(int64_t length) {
  const int64_t rest = length % V::W;
  return length > V::W && rest <= V::W / 8 ? rest : 0;
}

// One panel of grad_out's rows, packed into gp, with the products that read them once:
//   sums[i] += sum_c g[i, c] o[i, c], where out is given, and sums[(1 + e) * rows + i] += sum_c g[i, c] v[e, c]
// over the EDGES keys whose values of this panel lie `width` apart at v. A sum is a vector of partial sums.
template <class V, int EDGES, class S>
void pack_gradient(const LineView<const S>& g, const LineView<const S>* out, const typename V::T* v, int64_t rows,
                   int64_t first, int64_t cols, typename V::T* gp, int64_t ld, typename V::T* sums) {
  using reg = typename V::reg;
  const int64_t width = round_up(cols, V::W);
  for (int64_t i = 0; i < rows; ++i) {
    const S* from = g.data + i * g.row + first;
    const S* with = out ? out->data + i * out->row + first : nullptr;
    typename V::T* to = gp + i * ld;
    reg dot = V::zero(), edge[EDGES + 1];
    for (int e = 0; e < EDGES; ++e) edge[e] = V::zero();
    for (int64_t x = 0; x < cols; x += V::W) {
      const reg y = load_some<V>(from + x, cols - x);
      V::store(to + x, y);
      if (with) dot = V::fma(load_some<V>(with + x, cols - x), y, dot);
      CCNET_UNROLL
      for (int e = 0; e < EDGES; ++e) edge[e] = V::fma(y, V::load(v + e * width + x), edge[e]);
    }
    typename V::T* sum = sums + i * V::W;
    if (with) V::store(sum, V::add(V::load(sum), dot));
    CCNET_UNROLL
    for (int e = 0; e < EDGES; ++e) {
      sum += rows * V::W;
      V::store(sum, V::add(V::load(sum), edge[e]));
    }
  }
}

template <class V, class S>
void backward_axis(const BackwardArgs& args, int axis, bool first) {
  using T = typename V::T;
  using reg = typename V::reg;
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = rows_per_block<V>(L, 384 * 1024);
  const int64_t lpad = leading<V>(L), bpad = leading<V>(block), edge = edge_columns<V>(L),
                jpad = edge ? L - edge : round_up(L, V::W), row_pad = round_up(L, V::W);
  const int64_t panel = 2 * V::kPanelVectors * V::W, g_ld = leading<V>(panel), qkpad = leading<V>(QK);
  const bool masked = !keeps_self(grid.axes, axis);
  const auto pack_with_edges = edge == 0   ? pack_gradient<V, 0, S>
                               : edge == 1 ? pack_gradient<V, 1, S>
                                           : pack_gradient<V, 2, S>;
  const Strides stat = scalar_strides(grid);
  // Blocks of queries after the first add to a line that should still be at hand.
  const Store query_store = first ? Store::kReplace : Store::kJoin;
  const Store value_store = block < L ? query_store : axis_store<V, S>(grid, args.grad_value, C, first);

  run_items(args, grid.lines(axis), [&](auto next) {
    Scratch<T> scratch(QK * lpad + qkpad * (L + block) + 2 * block * lpad + block * g_ld + panel * lpad +
                       2 * bpad + (1 + edge) * bpad * V::W + panel * max_rows<V>(1) * 2);
    if (!scratch.ok()) return false;
    T* kt = scratch.take(QK * lpad);
    T* kr = scratch.take(qkpad * L);
    T* qr = scratch.take(qkpad * block);
    T* p = scratch.take(block * lpad);
    T* ds = scratch.take(block * lpad);
    T* gp = scratch.take(block * g_ld);  // grad_out, one panel of channels
    T* vt = scratch.take(panel * lpad);   // value transposed, the same channels
    T* lse = scratch.take(bpad);
    T* delta = scratch.take(bpad);
    T* sums = scratch.take((1 + edge) * bpad * V::W);
    T* tile = scratch.take(panel * max_rows<V>(1));

    int64_t line, upcoming;
    for (bool more = next(&line); more; line = upcoming) {
      more = next(&upcoming);
      const auto keys = line_view<const S>(args.key, grid, axis, line);
      pack_columns<V>(keys, L, 0, QK, kt, lpad);
      pack_rows<V>(keys, L, 0, QK, kr, qkpad);

      for (int64_t i0 = 0; i0 < L; i0 += block) {
        const int64_t rows = L - i0 < block ? L - i0 : block;
        const BackwardViews<S> views(args, axis, line, i0);
        const auto &q = views.query, &v = views.value, &o = views.out, &g = views.grad_out;
        const auto &dq = views.grad_query, &dk = views.grad_key, &dv = views.grad_value;
        const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat.axis[axis];
        const int64_t stat_row = stat.axis[axis];
        const T* lse_in = static_cast<const T*>(args.lse) + stat0;
        T* delta_io = static_cast<T*>(args.delta) + stat0;
        pack_rows<V>(q, rows, 0, QK, qr, qkpad);
        const NextBlock next_block(L, block, line, i0, more, upcoming);
        const int64_t first_cols = panel < C ? panel : C;
        Ahead first_panel;  // each product asks for what the next ones need
        if (value_store != Store::kPastCaches) first_panel.add(dv.data, dv.row, L, first_cols);
        if (first) first_panel.add(o.data, o.row, rows, first_cols);
        first_panel.spread(steps<V>(rows, row_pad / V::W, QK));
        gemm<V, kRowMajor>(rows, row_pad, QK, qr, qkpad, kt, lpad, p, lpad, false, &first_panel);
        for (int64_t i = 0; i < rows; ++i) {
          const reg l = V::set1(lse_in[i * stat_row]);
          T* row = p + i * lpad;
          for (int64_t j = 0; j < row_pad; j += V::W) V::store(row + j, V::exp(V::sub(V::load(row + j), l)));
          if (masked) row[i0 + i] = T(0);
        }
        for (int64_t i = 0; i < (1 + edge) * rows * V::W; ++i) sums[i] = T(0);

        for (int64_t c = 0; c < C; c += panel) {
          const int64_t cols = C - c < panel ? C - c : panel;
          const int64_t width = round_up(cols, V::W);
          const int64_t next_cols = C - c - cols < panel ? C - c - cols : panel;
          if (edge > 0) pack_rows<V>(LineView<const S>{v.data + jpad * v.row, v.row}, edge, c, cols, tile, width);
          // delta_i = sum_c grad_out * out, while grad_out is at hand.
          pack_with_edges(g, first ? &o : nullptr, tile, rows, c, cols, gp, g_ld, sums);
          pack_columns<V>(v, edge > 0 ? jpad : L, c, cols, vt, lpad);
          Ahead ahead;
          if (next_cols > 0) {
            ahead.add(g.data + c + cols, g.row, rows, next_cols);
            ahead.add(v.data + c + cols, v.row, L, next_cols);
            if (value_store != Store::kPastCaches) ahead.add(dv.data + c + cols, dv.row, L, next_cols);
            if (first) ahead.add(o.data + c + cols, o.row, rows, next_cols);
          } else {
            next_block.ask_narrow(args, axis, views, rows, &ahead);
          }
          ahead.spread(steps<V>(rows, jpad / V::W, cols) + steps<V>(L, width / V::W, rows));
          gemm<V, kRowMajor>(rows, jpad, cols, gp, g_ld, vt, lpad, ds, lpad, c > 0, &ahead);
          gemm_to_line<V, kColMajor>(L, cols, rows, p, lpad, gp, g_ld, tile, dv, c,
                                     i0 > 0 ? Store::kJoin : value_store, &ahead);
        }

        for (int64_t i = 0; i < rows; ++i) {
          lse[i] = lse_in[i * stat_row];
          if (first) delta_io[i * stat_row] = sum_lanes<V>(sums + i * V::W);
          delta[i] = delta_io[i * stat_row];
          const reg d = V::set1(delta[i]);
          T* row = ds + i * lpad;
          const T* prob = p + i * lpad;
          for (int64_t e = 0; e < edge; ++e) row[jpad + e] = sum_lanes<V>(sums + ((1 + e) * rows + i) * V::W);
          for (int64_t j = 0; j < row_pad; j += V::W) {
            // C = 0 leaves ds unwritten, and then delta and every gradient but dV's are zero.
            const reg dp = C > 0 ? V::load(row + j) : V::zero();
            V::store(row + j, V::mul(V::load(prob + j), V::sub(dp, d)));
          }
        }
        Ahead next_panel;
        next_block.ask_wide(args, axis, views, first_cols, &next_panel);
        next_panel.spread(steps<V>(rows, qkpad / V::W, L) + steps<V>(L, qkpad / V::W, rows));
        gemm_to_line<V, kRowMajor>(rows, QK, L, ds, lpad, kr, qkpad, tile, dq, 0, query_store, &next_panel);
        gemm_to_line<V, kColMajor>(L, QK, rows, ds, lpad, qr, qkpad, tile, dk, 0,
                                   i0 > 0 ? Store::kJoin : query_store, &next_panel);
      }
    }
    V::fence();
    return true;
  });
}

template <class V, class S>
void backward_typed(const BackwardArgs& args) {
  for_axes(args.grid, [&](int axis, bool first, bool) { backward_axis<V, S>(args, axis, first); });
}

// ------------------------------------------------------------------------------------------- to channels-last

// Copies one run of positions that are `step` elements apart in the source, a square block at a time. The channels of a
// position are far apart, which no hardware prefetcher follows: the next block is asked for ahead.
template <class V, class S>
void copy_positions(const S* from, int64_t step, int64_t channel, S* to, int64_t row, int64_t count,
                    int64_t channels, bool past_caches) {
  if (step != 1) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < channels; ++c) to[i * row + c] = from[i * step + c * channel];
    }
    return;
  }
  if constexpr (V::kMovesWords && sizeof(S) == 2) {
    // Two bytes are moved as they are; 32 of them are a cache line, which is read once.
    for (int64_t c = 0; c < channels; c += 32) {
      for (int64_t i = 0; i < count; i += 32) {
        const int64_t further = channels - c - 32 < 32 ? channels - c - 32 : 32;
        for (int64_t r = 0; r < further; ++r) CCNET_PREFETCH(from + (c + 32 + r) * channel + i);
        V::transpose_words(from + c * channel + i, channel, channels - c, count - i, to + i * row + c, row);
      }
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += V::W) {
    for (int64_t i = 0; i < count; i += V::W) {
      const int rows = static_cast<int>(count - i < V::W ? count - i : V::W);
      const int64_t further = channels - c - V::W < V::W ? channels - c - V::W : V::W;
      for (int64_t r = 0; r < further; ++r) CCNET_PREFETCH(from + (c + V::W + r) * channel + i);
      typename V::reg t[V::W];
      load_transposed<V>(from + c * channel + i, channel, channels - c, rows, t);
      for (int r = 0; r < rows; ++r) store_some<V>(to + (i + r) * row + c, t[r], channels - c, past_caches);
    }
  }
}

template <class V, class S>
void to_channels_last_typed(const CopyArgs& args) {
  const Grid& grid = args.grid;
  const int last = grid.axes - 1;
  // Where the spatial axes lie one behind the other, an image is one run of positions: no remainder per line.
  bool dense = true;
  for (int a = 0; a < last; ++a) {
    dense = dense && args.from.strides.axis[a] == args.from.strides.axis[a + 1] * grid.size[a + 1];
  }
  const int64_t step = args.from.strides.axis[last], row = args.to.strides.axis[last];
  const int64_t length = dense ? grid.positions() : grid.size[last];
  const bool past_caches = outgrows_caches(grid, args.to, args.channels, sizeof(S));
  const int64_t chunk = length < 128 ? length : 128;
  const int64_t chunks = (length + chunk - 1) / chunk, runs = dense ? grid.batch : grid.lines(last);
  run_items(args, runs * chunks, [&](auto next) {
    for (int64_t item; next(&item);) {
      const int64_t run = item / chunks, begin = item % chunks * chunk;
      const int64_t count = length - begin < chunk ? length - begin : chunk;
      const int64_t from = dense ? run * args.from.strides.batch : line_offset(grid, args.from.strides, last, run);
      const int64_t to = dense ? run * args.to.strides.batch : line_offset(grid, args.to.strides, last, run);
      copy_positions<V, S>(static_cast<const S*>(args.from.data) + from + begin * step, step,
                           args.from.strides.channel, static_cast<S*>(args.to.data) + to + begin * row, row, count,
                           args.channels, past_caches);
    }
    V::fence();
    return true;
  });
}

template <class V>
void forward_any(const ForwardArgs& args) {
  switch (args.dtype) {
    case DType::kFloat: return forward_typed<V, float>(args);
    case DType::kHalf: return forward_typed<V, Half>(args);
    case DType::kBFloat16: return forward_typed<V, BFloat16>(args);
    case DType::kDouble: return;  // portable only
  }
}

template <class V>
void backward_any(const BackwardArgs& args) {
  switch (args.dtype) {
    case DType::kFloat: return backward_typed<V, float>(args);
    case DType::kHalf: return backward_typed<V, Half>(args);
    case DType::kBFloat16: return backward_typed<V, BFloat16>(args);
    case DType::kDouble: return;  // portable only
  }
}

template <class V>
void to_channels_last_any(const CopyArgs& args) {
  switch (args.dtype) {
    case DType::kFloat: return to_channels_last_typed<V, float>(args);
    case DType::kHalf: return to_channels_last_typed<V, Half>(args);
    case DType::kBFloat16: return to_channels_last_typed<V, BFloat16>(args);
    case DType::kDouble: return;  // portable only
  }
}
