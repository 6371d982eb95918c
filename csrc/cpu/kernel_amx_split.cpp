// fp32 and fp16 on x86-64 processors with matrix units (AMX-BF16: Sapphire Rapids and newer), Linux.
//
// Every number is split into three bf16 numbers that add up to it (see line_kernels_split.h).
#include "common.h"

#if defined(CCNET_X86_DISPATCH) && defined(__linux__) && !defined(CCNET_LEAVE_OUT_KERNEL)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16,avx2,fma,f16c")
#endif

namespace ccnet {
namespace cpu {
namespace {

#include "storage.h"
#include "vector_avx512.h"
#include "work.h"
#include "line_kernels.h"
#include "line_kernels_split.h"
#include "matmul_blocks.h"
#include "matmul_sum.h"
#include "split_matmul.h"
#include "split_matmul_sum.h"

void forward(const ForwardArgs& args) {
  args.dtype == DType::kHalf ? split_forward_typed<Half>(args) : split_forward_typed<float>(args);
}

// Whether lines come in several blocks of queries.
bool has_long_lines(const Grid& grid) {
  for (int axis = 0; axis < grid.axes; ++axis) {
    if (queries_at_once(grid.size[axis]) < grid.size[axis]) return true;
  }
  return false;
}

void backward(const BackwardArgs& args) {
  // Gradients of such lines in fp16 are added up block by block, for which only the vector kernels have wider sums.
  if (args.dtype == DType::kHalf && has_long_lines(args.grid)) return avx512_kernels()->backward(args);
  args.dtype == DType::kHalf ? split_backward_typed<Half>(args) : split_backward_typed<float>(args);
}

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

const Kernels* amx_split_kernels() {
  static const Kernels* const usable = [] {
    const Kernels* plain = avx512_kernels();
    if (plain == nullptr || !matrix_units_usable()) return static_cast<const Kernels*>(nullptr);
    static Kernels kernels = with_passes("amx", forward, backward, *plain);
    kernels.matmul = split_matmul;
    kernels.matmul_sum = split_matmul_sum;
    kernels.matmul_pays = true;
    return static_cast<const Kernels*>(&kernels);
  }();
  return usable;
}
}  // namespace cpu
}  // namespace ccnet

#else
namespace ccnet {
namespace cpu {
const Kernels* amx_split_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace ccnet
#endif
