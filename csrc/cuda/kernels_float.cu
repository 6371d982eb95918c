#include "launch.cuh"

namespace ccnet {
namespace cuda {

const Kernels& float_kernels() {
  static const Kernels kernels = kernels_of<float>();
  return kernels;
}
const ResidualKernels& float_residual_kernels() {
  static const ResidualKernels kernels = residual_kernels_of<float>();
  return kernels;
}

}  // namespace cuda
}  // namespace ccnet
