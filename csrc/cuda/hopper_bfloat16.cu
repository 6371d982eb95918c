#include "hopper_launch.cuh"

namespace ccnet {
namespace cuda {

const Kernels& hopper_bfloat16_kernels() {
  static const Kernels kernels = hopper_kernels_of<BFloat16>();
  return kernels;
}

}  // namespace cuda
}  // namespace ccnet
