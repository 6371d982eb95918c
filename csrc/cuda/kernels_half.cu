#include "launch.cuh"

namespace ccnet {
namespace cuda {

const Kernels& half_kernels() {
  static const Kernels kernels = kernels_of<Half>();
  return kernels;
}

}  // namespace cuda
}  // namespace ccnet
