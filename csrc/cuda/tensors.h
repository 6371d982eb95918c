// What the operators of the CUDA library share beyond ../tensors.h: errors, stream and memory.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <limits>

#include "../tensors.h"
#include "interface.h"

namespace ccnet {
namespace cuda {

inline void check(int error) { STD_CUDA_CHECK(static_cast<cudaError_t>(error)); }

inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

// The kernels count positions of a line and channels in 32 bits, with room for the last tile, and divide by the latter.
inline void check_counts(const Grid& grid, const Tensor& query, const Tensor& value) {
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 1024;
  for (int a = 0; a < grid.axes; ++a) {
    require(grid.size[a] <= kMost, "criss-cross attention takes at most ", kMost, " positions on an axis.");
  }
  for (const int64_t channels : {query.size(1), value.size(1)}) {
    require(channels >= 1 && channels <= kMost, "criss-cross attention takes 1 to ", kMost, " channels.");
  }
}

// An uninitialised (B, channels, *S) tensor in channels-last memory.
inline Tensor empty_channels_last(const Tensor& like, int64_t channels) {
  return with_channels_second(empty_positions_first(like, channels, like.scalar_type()));
}

// The tensor itself where its channels are neighbours in memory, otherwise a channels-last copy.
inline Tensor with_dense_channels(const Tensor& t) {
  if (t.stride(1) == 1 || t.size(1) == 1) return t;
  Tensor copy = empty_channels_last(t, t.size(1));
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensor empty_floats(const Tensor& like, int64_t count) {
  return uninitialised(like, &count, 1, ScalarType::Float);
}

}  // namespace cuda
}  // namespace ccnet
