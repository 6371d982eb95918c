// bf16 on x86-64 processors that multiply pairs of bf16 numbers in vectors (AVX512-BF16: Zen 4, Cooper Lake and newer).
#include "common.h"

#if defined(CCNET_X86_DISPATCH) && !defined(CCNET_LEAVE_OUT_KERNEL)
#include <cpuid.h>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

namespace ccnet {
namespace cpu {
namespace {

#include "storage.h"
#include "vector_avx512.h"
#include "work.h"
#include "line_kernels_bf16.h"

inline __m512i broadcast_pair(const BFloat16* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// acc[MR, NR] += A B over `pairs` pairs of successive k: a[r * lda + 2k] is a pair of a row of A, b[k * ldb] a row of
// vectors of pairs.
template <int MR, int NR>
inline __attribute__((always_inline)) void multiply(int64_t pairs, const BFloat16* a, int64_t lda, const uint32_t* b,
                                                    int64_t ldb, reg (&acc)[MR][NR], Ahead* ahead) {
  // A few base pointers with small multiples of lda address all rows without spilling index registers.
  const BFloat16* base[(MR + 2) / 3];
  CCNET_UNROLL
  for (int r = 0; r < MR; r += 3) base[r / 3] = a + r * lda;
  for (int64_t start = 0; start < pairs; start += 4) {
    ahead->ask();
    const int64_t stop = start + 4 < pairs ? start + 4 : pairs;
    for (int64_t k = start; k < stop; ++k) {
      __m512i bv[NR];
      CCNET_UNROLL
      for (int n = 0; n < NR; ++n) bv[n] = _mm512_loadu_si512(b + n * 16);
      b += ldb;
      CCNET_UNROLL
      for (int r = 0; r < MR; ++r) {
        const __m512i av = broadcast_pair(base[r / 3] + (r % 3) * lda + 2 * k);
        CCNET_UNROLL
        for (int n = 0; n < NR; ++n) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], (__m512bh)av, (__m512bh)bv[n]);
      }
    }
  }
}

// C[MR, 16 * NR] = A B, or C += A B.
struct MatrixStore {
  float* c;
  int64_t ldc;
  bool add;
};

template <int MR, int NR>
struct ToMatrix {
  static void run(int64_t pairs, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb,
                  const MatrixStore& store, int64_t row, int64_t col, Ahead* ahead) {
    reg acc[MR][NR];
    float* c = store.c + row * store.ldc + col;
    CCNET_UNROLL
    for (int r = 0; r < MR; ++r) {
      CCNET_UNROLL
      for (int n = 0; n < NR; ++n) acc[r][n] = store.add ? V::load(c + r * store.ldc + n * 16) : V::zero();
    }
    multiply<MR, NR>(pairs, a, lda, b, ldb, acc, ahead);
    CCNET_UNROLL
    for (int r = 0; r < MR; ++r) {
      CCNET_UNROLL
      for (int n = 0; n < NR; ++n) V::store(c + r * store.ldc + n * 16, acc[r][n]);
    }
  }
};

// Hands the result to `finish` straight from the registers.
template <class Finish>
struct ToFinish {
  template <int MR, int NR>
  struct Kernel {
    static void run(int64_t pairs, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb,
                    const Finish& finish, int64_t row, int64_t col, Ahead* ahead) {
      static_assert(NR % 2 == 0, "columns come in pairs of vectors");
      reg acc[MR][NR];
      CCNET_UNROLL
      for (int r = 0; r < MR; ++r) {
        CCNET_UNROLL
        for (int n = 0; n < NR; ++n) acc[r][n] = V::zero();
      }
      multiply<MR, NR>(pairs, a, lda, b, ldb, acc, ahead);
      CCNET_UNROLL
      for (int r = 0; r < MR; ++r) {
        CCNET_UNROLL
        for (int n = 0; n < NR; n += 2) finish(row + r, col + n * 16, acc[r][n], acc[r][n + 1]);
      }
    }
  };
};

template <class Target>
using MicroFn = void (*)(int64_t, const BFloat16*, int64_t, const uint32_t*, int64_t, const Target&, int64_t, int64_t,
                         Ahead*);

// Rows of the micro-kernel with NR vectors a row: accumulators, NR vectors of B and one of A must fit 32 registers.
constexpr int max_rows(int nr) { return V::kAccumulators / nr > 12 ? 12 : V::kAccumulators / nr; }

template <template <int, int> class Kernel, class Target, int NR, int MR = max_rows(NR)>
struct MicroTable {
  static MicroFn<Target> get(int rows) {
    if (rows == MR) return &Kernel<MR, NR>::run;
    return MicroTable<Kernel, Target, NR, MR - 1>::get(rows);
  }
};
template <template <int, int> class Kernel, class Target, int NR>
struct MicroTable<Kernel, Target, NR, 0> {
  static MicroFn<Target> get(int) { return nullptr; }
};

// A B for one panel of NR vectors of columns, rows in nearly equal blocks: 97 rows are 12 blocks of 6 and 5 of 5, not
// 16 of 6 and a lone row that would starve the multipliers.
template <template <int, int> class Kernel, int NR, class Target>
void multiply_panel(int64_t M, int64_t pairs, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb,
                    const Target& target, int64_t col, Ahead* ahead) {
  constexpr int most = max_rows(NR);
  const int64_t blocks = (M + most - 1) / most;
  if (blocks == 0) return;
  const int small = static_cast<int>(M / blocks);
  const int64_t large_blocks = M % blocks;
  const MicroFn<Target> fn_small = MicroTable<Kernel, Target, NR>::get(small);
  const MicroFn<Target> fn_large = large_blocks ? MicroTable<Kernel, Target, NR>::get(small + 1) : nullptr;
  int64_t row = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const bool large = i < large_blocks;
    (large ? fn_large : fn_small)(pairs, a + row * lda, lda, b + col, ldb, target, row, col, ahead);
    row += large ? small + 1 : small;
  }
}

struct Engine {
  struct Session {};
  static constexpr int64_t kRows = 1, kDepth = 2;
  static constexpr int64_t kColumns = 64;
  static constexpr int64_t kEdgeColumns = 2, kEdgeDepth = 0;
  static constexpr int64_t kDepthAtOnce = 128;   // a panel of B this deep stays in the first-level cache

  static int64_t steps(int64_t M, int64_t N, int64_t depth) {
    return (M + 5) / 6 * ((N + kPanel - 1) / kPanel) * ((depth + 7) / 8);
  }

  // depth a multiple of 2; lda in numbers, ldb in 32-bit units.
  static void product(int64_t M, int64_t N, int64_t depth, const BFloat16* a, int64_t lda, const uint32_t* b,
                      int64_t ldb, float* c, int64_t ldc, Ahead* ahead) {
    // At least once: without channels the products are zero.
    for (int64_t k = 0; k == 0 || k < depth; k += kDepthAtOnce) {
      const int64_t pairs = (depth - k < kDepthAtOnce ? depth - k : kDepthAtOnce) / 2;
      const uint32_t* b_rows = b + k / 2 * ldb;
      const MatrixStore to{c, ldc, k > 0};
      int64_t n = 0;
      for (; n + 64 <= N; n += 64) multiply_panel<ToMatrix, 4>(M, pairs, a + k, lda, b_rows, ldb, to, n, ahead);
      if (n + 48 == N) multiply_panel<ToMatrix, 3>(M, pairs, a + k, lda, b_rows, ldb, to, n, ahead);
      if (n + 32 == N) multiply_panel<ToMatrix, 2>(M, pairs, a + k, lda, b_rows, ldb, to, n, ahead);
      if (n + 16 == N) multiply_panel<ToMatrix, 1>(M, pairs, a + k, lda, b_rows, ldb, to, n, ahead);
    }
  }

  template <class Finish>
  static void product_to(int64_t M, int64_t rows, int64_t N, int64_t depth, const BFloat16* a, int64_t lda,
                         const uint32_t* b, int64_t ldb, const Finish& finish, Ahead* ahead,
                         const DepthEdge&) {
    (void)M;  // rows are not padded
    int64_t n = 0;
    for (; n + 64 <= N; n += 64) {
      multiply_panel<ToFinish<Finish>::template Kernel, 4>(rows, depth / 2, a, lda, b, ldb, finish, n, ahead);
    }
    if (n < N) {
      multiply_panel<ToFinish<Finish>::template Kernel, 2>(rows, depth / 2, a, lda, b, ldb, finish, n, ahead);
    }
  }
};

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

const Kernels* avx512bf16_kernels() {
  static const Kernels* const usable = [] {
    const Kernels* plain = avx512_kernels();
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool has = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
    if (plain == nullptr || !has) return static_cast<const Kernels*>(nullptr);
    static const Kernels kernels = with_passes("avx512_bf16", forward<Engine>, backward<Engine>, *plain);
    return &kernels;
  }();
  return usable;
}
}  // namespace cpu
}  // namespace ccnet

#else
namespace ccnet {
namespace cpu {
const Kernels* avx512bf16_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace ccnet
#endif
