#include "launch.cuh"

namespace ccnet {
namespace cuda {

const Kernels& bfloat16_kernels() {
  static const Kernels kernels = kernels_of<BFloat16>();
  return kernels;
}
const ResidualKernels& bfloat16_residual_kernels() {
  static const ResidualKernels kernels = residual_kernels_of<BFloat16>();
  return kernels;
}

}  // namespace cuda
}  // namespace ccnet
