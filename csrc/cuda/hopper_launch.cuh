// Runs the planned launches of hopper_plan.h on the current CUDA device, and makes the maps that the TMA copies by.
// Every launch is checked; the first error ends the call.
#pragma once

#include <cuda_runtime.h>

#include "hopper_lines.h"

namespace ccnet {
namespace cuda {

// cuTensorMapEncodeTiled is the driver's: asked for at run time, so that nothing of the driver is linked.
inline int make_map(TensorMap* map, const BoxSource& source) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return static_cast<int>(cudaErrorNotSupported);
  cuuint64_t size[5], stride[4];
  cuuint32_t box[5], step[5];
  for (int d = 0; d < 5; ++d) {
    size[d] = static_cast<cuuint64_t>(source.size[d]);
    box[d] = static_cast<cuuint32_t>(source.box[d]);
    step[d] = 1;
    if (d > 0) stride[d - 1] = static_cast<cuuint64_t>(source.stride[d] * source.element_bytes);
  }
  // The elements are moved as they are; their type says no more than their size.
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, const_cast<void*>(source.data), size, stride,
                                 box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<int>(result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace ccnet

#include "hopper_plan.h"

namespace ccnet {
namespace cuda {

class HopperLauncher {
 public:
  explicit HopperLauncher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <typename T, int Blocks, int Keys>
  int forward(const HopperForwardArgs& args) const {
    using Shape = HopperForwardShape<Blocks, Keys>;
    return run(hopper_forward_kernel<T, Blocks, Keys>, args, true, Shape::kThreads, Shape::kSharedBytes);
  }
  template <typename T, int Blocks, bool FindsDelta, int Rows>
  int backward(const HopperBackwardArgs<T>& args) const {
    using Shape = HopperBackwardShape<T, Blocks, FindsDelta, Rows>;
    return run(hopper_backward_kernel<T, Blocks, FindsDelta, Rows>, args, args.overlaps, Shape::kThreads,
               Shape::kSharedBytes, Shape::kClusterBlocks);
  }
  template <typename T>
  int dense_delta(const DenseDeltaArgs<T>& args) const {
    return run(dense_delta_kernel<T>, args, false, kDenseDeltaThreads, 0);
  }

 private:
  // `overlaps`: it may begin before the launch before has ended, once all CTAs of that have allowed it. The first of a
  // backward pass does not: both passes in succession take less time so at most sizes (docs/performance.md).
  template <typename Args>
  int run(void (*kernel)(Args), const Args& args, bool overlaps, int threads, int shared_bytes,
          int cluster_blocks = 1) const {
    cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return static_cast<int>(error);
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = overlaps;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(args.blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    config.attrs = attributes;
    config.numAttrs = cluster_blocks > 1 ? 2 : 1;
    error = cudaLaunchKernelEx(&config, kernel, args);
    return static_cast<int>(error == cudaSuccess ? cudaGetLastError() : error);
  }

  cudaStream_t stream_;
};

template <typename T>
Kernels hopper_kernels_of() {
  Kernels k{};
  k.takes_forward = hopper_takes_forward<T>;
  k.forward_scratch = [](const Grid& grid, const DeviceInfo&) { return hopper_forward_scratch(grid); };
  k.takes_backward = hopper_takes_backward<T>;
  k.forward = [](const ForwardRequest& request) { return hopper_forward<T>(request, HopperLauncher(request.stream)); };
  k.backward = [](const BackwardRequest& request) { return hopper_backward<T>(request, HopperLauncher(request.stream)); };
  return k;
}

}  // namespace cuda
}  // namespace ccnet
