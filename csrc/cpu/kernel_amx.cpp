// bf16 on x86-64 processors with matrix units (AMX-BF16: Sapphire Rapids and newer), Linux.
//
// Products are done by 16 x 16 tiles: fp32 accumulators, bf16 operands of 32 numbers a row (see line_kernels_bf16.h).
#include "common.h"

#if defined(CCNET_X86_DISPATCH) && defined(__linux__) && !defined(CCNET_LEAVE_OUT_KERNEL)
#include <immintrin.h>

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
#include "line_kernels_bf16.h"
#include "tiles.h"

// C[16 * MT, 16 * NT] = A B over `depth` steps of 32 numbers; lda and ldb in bytes, ldc in floats.
template <int MT, int NT>
void tile_product(int64_t depth, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                  int64_t ldc, Ahead* ahead) {
  const char* pa = reinterpret_cast<const char*>(a);
  const char* pb = reinterpret_cast<const char*>(b);
  zero_block<MT, NT>();
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
  store_block<MT, NT>(c, ldc);
}

// The same for one tile of rows and four of columns: as many products under way at once as in a block of 2 x 2.
void tile_row_product(int64_t depth, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                      int64_t ldc, Ahead* ahead) {
  const char* pa = reinterpret_cast<const char*>(a);
  const char* pb = reinterpret_cast<const char*>(b);
  zero_block<2, 2>();
  for (int64_t k = 0; k < depth; ++k) {
    _tile_loadd(4, pa, lda);
    _tile_loadd(5, pb, ldb);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, pb + 64, ldb);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, pb + 128, ldb);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, pb + 192, ldb);
    _tile_dpbf16ps(3, 4, 5);
    ahead->ask();
    pa += 64;
    pb += kTile * ldb;
  }
  const int64_t stride = ldc * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, c, stride);
  _tile_stored(1, c + kTile, stride);
  _tile_stored(2, c + 2 * kTile, stride);
  _tile_stored(3, c + 3 * kTile, stride);
}

struct Engine {
  using Session = Tiles;
  static constexpr int64_t kRows = kTile, kDepth = 32;
  static constexpr int64_t kEdgeColumns = 0, kEdgeDepth = 1;
  static constexpr int64_t kColumns = 32;

  static int64_t steps(int64_t M, int64_t N, int64_t depth) {
    return (M + 31) / 32 * ((N + 31) / 32) * ((depth + kDepth - 1) / kDepth);
  }

  // M a multiple of 16, depth one of 32; lda in numbers, ldb in 32-bit units.
  static void product(int64_t M, int64_t N, int64_t depth, const BFloat16* a, int64_t lda, const uint32_t* b,
                      int64_t ldb, float* c, int64_t ldc, Ahead* ahead) {
    int64_t n = 0;
    for (; M == kTile && n + 4 * kTile <= N; n += 4 * kTile) {
      tile_row_product(depth / kDepth, a, lda * 2, b + n, ldb * 4, c + n, ldc, ahead);
    }
    for (; n < N; n += 2 * kTile) {
      const bool wide = n + kTile < N;
      for (int64_t m = 0; m < M; m += 2 * kTile) {
        const bool tall = m + kTile < M;
        const auto run = tall ? (wide ? tile_product<2, 2> : tile_product<2, 1>)
                              : (wide ? tile_product<1, 2> : tile_product<1, 1>);
        run(depth / kDepth, a + m * lda, lda * 2, b + n, ldb * 4, c + m * ldc + n, ldc, ahead);
      }
    }
  }

  // finish is a copy: what it holds can stay in registers, whatever memory is written.
  template <class Finish>
  static void product_to(int64_t M, int64_t rows, int64_t N, int64_t depth, const BFloat16* a, int64_t lda,
                         const uint32_t* b, int64_t ldb, Finish finish, Ahead* ahead, const DepthEdge& edge) {
    const auto run = edge.values != nullptr ? product_with<true, Finish> : product_with<false, Finish>;
    run(M, rows, N, depth, a, lda, b, ldb, finish, ahead, edge);
  }

 private:
  template <bool EDGE, class Finish>
  static void product_with(int64_t M, int64_t rows, int64_t N, int64_t depth, const BFloat16* a, int64_t lda,
                           const uint32_t* b, int64_t ldb, Finish finish, Ahead* ahead, const DepthEdge& edge) {
    alignas(64) float tile[2 * kTile * kPanel];
    const BFloat16* const weights = edge.weights;
    const int64_t weight_step = edge.step;
    for (int64_t c = 0; c < N; c += kPanel) {
      const int64_t width = N - c < kPanel ? N - c : kPanel;
      reg last[kPanel / 16];
      CCNET_UNROLL
      for (int x = 0; x < kPanel / 16; x += 2) {
        if (EDGE) edge.columns(c + x * 16, &last[x], &last[x + 1]);
      }
      for (int64_t m = 0; m < M; m += 2 * kTile) {
        const int64_t height = M - m < 2 * kTile ? M - m : 2 * kTile;
        const int64_t real = rows - m < height ? rows - m : height;
        product(height, width, depth, a + m * lda, lda, b + c, ldb, tile, kPanel, ahead);
        for (int64_t r = 0; r < real; ++r) {
          if (r % 4 == 0) ahead->ask();
          const float* t = tile + r * kPanel;
          const reg weight = EDGE ? V::set1(to_float(weights[(m + r) * weight_step])) : V::zero();
          CCNET_UNROLL
          for (int x = 0; x < kPanel / 16; x += 2) {
            if (x * 16 >= width) break;
            reg lo = V::load(t + x * 16), hi = V::load(t + x * 16 + 16);
            if (EDGE) {
              lo = V::fma(weight, last[x], lo);
              hi = V::fma(weight, last[x + 1], hi);
            }
            finish(m + r, c + x * 16, lo, hi);
          }
        }
      }
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

const Kernels* amx_kernels() {
  static const Kernels* const usable = [] {
    const Kernels* plain = avx512_kernels();
    if (plain == nullptr || !matrix_units_usable()) return static_cast<const Kernels*>(nullptr);
    static const Kernels kernels = with_passes("amx", forward<Engine>, backward<Engine>, *plain);
    return &kernels;
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
