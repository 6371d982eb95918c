// Small matrix products in registers, and larger ones made of them. Included inside each translation unit's anonymous
// namespace, after ahead.h (see line_kernels.h).

enum AOrder { kRowMajor, kColMajor };  // A[m, k] at a[m * lda + k] or a[k * lda + m]

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
