// The operators of the CUDA library: argument checks, memory, device and stream. LibTorch stable ABI only. The schemas
// are defined by the CPU library.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "../tensors.h"
#include "interface.h"

namespace ccnet {
namespace cuda {
namespace {

struct KernelChoice {
  const Kernels* special;  // for this GPU, null where there are none
  const Kernels& general;
};

KernelChoice kernels_for(const Tensor& t) {
#if defined(CCNET_HOPPER)
  const Kernels* const half = &hopper_half_kernels();
  const Kernels* const bfloat16 = &hopper_bfloat16_kernels();
#else
  const Kernels* const half = nullptr;
  const Kernels* const bfloat16 = nullptr;
#endif
  switch (t.scalar_type()) {
    case ScalarType::Float: return {nullptr, float_kernels()};
    case ScalarType::Half: return {half, half_kernels()};
    case ScalarType::BFloat16: return {bfloat16, bfloat16_kernels()};
    default: STD_TORCH_CHECK(false, "criss-cross attention on CUDA takes float16, bfloat16 or float32.");
  }
}

void check_takes(bool takes, const DeviceInfo& device) {
  STD_TORCH_CHECK(takes, "criss-cross attention needs more shared memory than the ", device.shared_bytes,
                  " bytes that this GPU offers to one block.");
}
const Kernels& kernels_for(const Tensor& t, const ForwardRequest& request) {
  const KernelChoice choice = kernels_for(t);
  if (choice.special != nullptr && choice.special->takes_forward(request)) return *choice.special;
  check_takes(choice.general.takes_forward(request), request.device);
  return choice.general;
}
const Kernels& kernels_for(const Tensor& t, const BackwardRequest& request) {
  const KernelChoice choice = kernels_for(t);
  if (choice.special != nullptr && choice.special->takes_backward(request)) return *choice.special;
  check_takes(choice.general.takes_backward(request), request.device);
  return choice.general;
}

void check(int error) { STD_CUDA_CHECK(static_cast<cudaError_t>(error)); }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

DeviceInfo device_info(const Tensor& t) {
  const int device = t.get_device_index();
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  STD_TORCH_CHECK(major >= 8, "criss-cross attention needs a GPU of compute capability 8.0 or later, this one has ",
                  major, ".", attribute(cudaDevAttrComputeCapabilityMinor, device), ".");
  return {attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxGridDimX, device),
          10 * major + attribute(cudaDevAttrComputeCapabilityMinor, device), attribute(cudaDevAttrL2CacheSize, device)};
}

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

// The kernels count positions of a line and channels in 32 bits, with room for the last tile, and divide by the latter.
void check_counts(const Grid& grid, const Tensor& query, const Tensor& value) {
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 1024;
  for (int a = 0; a < grid.axes; ++a) {
    STD_TORCH_CHECK(grid.size[a] <= kMost, "criss-cross attention takes at most ", kMost, " positions on an axis.");
  }
  for (const int64_t channels : {query.size(1), value.size(1)}) {
    STD_TORCH_CHECK(channels >= 1 && channels <= kMost, "criss-cross attention takes 1 to ", kMost, " channels.");
  }
}

// An uninitialised (B, channels, *S) tensor in channels-last memory.
Tensor empty_channels_last(const Tensor& like, int64_t channels) {
  return with_channels_second(empty_positions_first(like, channels, like.scalar_type()));
}

// The tensor itself where its channels are neighbours in memory, otherwise a channels-last copy.
Tensor with_dense_channels(const Tensor& t) {
  if (t.stride(1) == 1 || t.size(1) == 1) return t;
  Tensor copy = empty_channels_last(t, t.size(1));
  torch::stable::copy_(copy, t);
  return copy;
}

Tensor empty_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {&count, 1}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value) {
  const Grid grid = checked_grid(query, key, value);
  check_counts(grid, query, value);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor out = empty_channels_last(value, value.size(1));
  Tensor lse = empty_statistic(query);
  if (lse.numel() > 0) {
    query = with_dense_channels(query);
    key = with_dense_channels(key);
    value = with_dense_channels(value);
    ForwardRequest request{};
    request.device = device_info(query);
    request.grid = grid;
    request.qk_channels = static_cast<int>(query.size(1));
    request.channels = static_cast<int>(value.size(1));
    request.query = reference(query, grid);
    request.key = reference(key, grid);
    request.value = reference(value, grid);
    request.out = reference(out, grid);
    request.lse = static_cast<float*>(lse.data_ptr());
    request.stream = current_stream(query);
    const Kernels& kernels = kernels_for(query, request);
    Tensor stats = empty_floats(query, kernels.forward_scratch(grid, request.device) / int64_t{sizeof(float)});
    request.stats = stats.data_ptr();
    check(kernels.forward(request));
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,
                                            Tensor lse) {
  const Grid grid = checked_grid(query, key, value);
  check_counts(grid, query, value);
  check_backward(query, value.size(1), grad_out, out, lse, grid);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor grad_query = empty_channels_last(query, query.size(1));
  Tensor grad_key = empty_channels_last(key, key.size(1));
  Tensor grad_value = empty_channels_last(value, value.size(1));
  if (lse.numel() > 0) {
    query = with_dense_channels(query);
    key = with_dense_channels(key);
    value = with_dense_channels(value);
    out = with_dense_channels(out);
    grad_out = with_dense_channels(grad_out);
    Tensor delta = empty_statistic(query);
    BackwardRequest request{};
    request.device = device_info(query);
    request.grid = grid;
    request.qk_channels = static_cast<int>(query.size(1));
    request.channels = static_cast<int>(value.size(1));
    request.query = reference(query, grid);
    request.key = reference(key, grid);
    request.value = reference(value, grid);
    request.out = reference(out, grid);
    request.grad_out = reference(grad_out, grid);
    request.grad_query = reference(grad_query, grid);
    request.grad_key = reference(grad_key, grid);
    request.grad_value = reference(grad_value, grid);
    request.lse = static_cast<const float*>(lse.data_ptr());
    request.delta = static_cast<float*>(delta.data_ptr());
    request.stream = current_stream(query);
    check(kernels_for(query, request).backward(request));
  }
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace cuda
}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CUDA, m) {
  m.impl("criss_cross_forward", TORCH_BOX(&ccnet::cuda::forward));
  m.impl("criss_cross_backward", TORCH_BOX(&ccnet::cuda::backward));
}
