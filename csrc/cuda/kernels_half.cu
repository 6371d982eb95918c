#include "launch.cuh"

namespace ccnet {
namespace cuda {

const Kernels& half_kernels() {
  static const Kernels kernels = kernels_of<Half>();
  return kernels;
}
const ResidualKernels& half_residual_kernels() {
  static const ResidualKernels kernels = residual_kernels_of<Half>();
  return kernels;
}

}  // namespace cuda
}  // namespace ccnet
