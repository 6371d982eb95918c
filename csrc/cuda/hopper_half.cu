#include "hopper_launch.cuh"

namespace ccnet {
namespace cuda {

const Kernels& hopper_half_kernels() {
  static const Kernels kernels = hopper_kernels_of<Half>();
  return kernels;
}

}  // namespace cuda
}  // namespace ccnet
