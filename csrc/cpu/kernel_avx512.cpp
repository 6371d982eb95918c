// x86-64 processors with AVX-512 (Skylake-SP, Zen 4 and newer).
#include "common.h"

#if defined(CCNET_X86_DISPATCH)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace ccnet {
namespace cpu {
namespace {

#include "storage.h"
#include "vector_avx512.h"
#include "work.h"
#include "line_kernels.h"
#include "residual_kernels.h"
#include "matmul_blocks.h"
#include "matmul_sum.h"
#include "vector_matmul.h"
#include "vector_matmul_sum.h"

const Kernels kKernels{"avx512",
                       to_channels_last_any<Avx512>,
                       forward_any<Avx512>,
                       backward_any<Avx512>,
                       residual_forward_any<Avx512>,
                       residual_backward_any<Avx512>,
                       vector_matmul<Avx512>,
                       vector_matmul_sum<Avx512>};

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
const Kernels* avx512_kernels() {
  __builtin_cpu_init();
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("fma");
  if (!has) return nullptr;
  static const Kernels kernels = paying_where_not_intel(kKernels);
  return &kernels;
}
}  // namespace cpu
}  // namespace ccnet

#else
namespace ccnet {
namespace cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace ccnet
#endif
