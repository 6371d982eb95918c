// Runs the planned launches on the current CUDA device. Every launch is checked; the first error ends the call.
#pragma once

#include "plan.h"
#include "residual_plan.h"

namespace ccnet {
namespace cuda {

class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <typename T>
  int operator()(const ForwardArgs<T>& args, int shared_bytes) const {
    return run(forward_kernel<T>, args, ForwardShape<T>::kThreads, shared_bytes);
  }
  template <typename T>
  int operator()(const BackwardArgs<T>& args, int shared_bytes) const {
    return run(backward_kernel<T>, args, BackwardShape<T>::kThreads, shared_bytes);
  }
  template <typename T>
  int operator()(const DeltaArgs<T>& args, int shared_bytes) const {
    return run(delta_kernel<T>, args, kDeltaThreads, shared_bytes);
  }
  template <typename T, int Width, ResidualStep Step>
  int residual(const ResidualArgs<T>& args) const {
    return run(residual_kernel<T, Width, Step>, args, kResidualThreads, kResidualSharedBytes<T>);
  }
  int residual_sum(const ResidualSumArgs& args) const {
    return run(residual_sum_kernel<double>, args, kResidualThreads, kResidualThreads * static_cast<int>(sizeof(double)));
  }

 private:
  static constexpr int kSharedWithoutOptIn = 48 * 1024;

  template <typename Args>
  int run(void (*kernel)(Args), const Args& args, int threads, int shared_bytes) const {
    if (shared_bytes > kSharedWithoutOptIn) {
      const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      if (error != cudaSuccess) return static_cast<int>(error);
    }
    kernel<<<static_cast<unsigned>(args.blocks), static_cast<unsigned>(threads),
             static_cast<size_t>(shared_bytes), stream_>>>(args);
    return static_cast<int>(cudaGetLastError());
  }

  cudaStream_t stream_;
};

template <typename T>
Kernels kernels_of() {
  Kernels k{};
  k.takes_forward = [](const ForwardRequest& request) { return fits<T>(request.device); };
  k.takes_backward = [](const BackwardRequest& request) { return fits<T>(request.device); };
  k.forward_scratch = [](const Grid& grid, const DeviceInfo& device) { return forward_scratch<T>(grid, device); };
  k.forward = [](const ForwardRequest& request) { return forward<T>(request, Launcher(request.stream)); };
  k.backward = [](const BackwardRequest& request) { return backward<T>(request, Launcher(request.stream)); };
  return k;
}

template <typename T>
ResidualKernels residual_kernels_of() {
  ResidualKernels k{};
  k.sums = residual_blocks;
  k.copy = [](const ResidualRequest& r) { return residual<T, ResidualStep::kCopy>(r, Launcher(r.stream)); };
  k.forward = [](const ResidualRequest& r) { return residual<T, ResidualStep::kForward>(r, Launcher(r.stream)); };
  k.backward = [](const ResidualRequest& r) { return residual<T, ResidualStep::kBackward>(r, Launcher(r.stream)); };
  return k;
}

}  // namespace cuda
}  // namespace ccnet
