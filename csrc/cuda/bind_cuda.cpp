// The operators of the CUDA library: argument checks, memory, device and stream. LibTorch stable ABI only. The schemas
// are defined by the CPU library.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

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
    default: refuse("criss-cross attention on CUDA takes float16, bfloat16 or float32.");
  }
}

void check_takes(bool takes, const DeviceInfo& device) {
  require(takes, "criss-cross attention needs more shared memory than the ", device.shared_bytes,
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

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

DeviceInfo device_info(const Tensor& t) {
  const int device = t.get_device_index();
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  require(major >= 8, "criss-cross attention needs a GPU of compute capability 8.0 or later, this one has ", major, ".",
          minor, ".");
  return {attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxGridDimX, device), 10 * major + minor, attribute(cudaDevAttrL2CacheSize, device)};
}

// Query, key and value, or their gradients.
struct Parts {
  TensorRef query, key, value;
};
Parts separate(const Tensor& query, const Tensor& key, const Tensor& value, const Grid& grid) {
  return {reference(query, grid), reference(key, grid), reference(value, grid)};
}
// Of (B, 2C' + C, *S) in channels-last memory.
Parts side_by_side(const Tensor& packed, int64_t qk_channels, const Grid& grid) {
  return {reference(packed, grid), reference(packed, grid, qk_channels), reference(packed, grid, 2 * qk_channels)};
}

// What both passes ask for. The operands have their channels side by side in memory. `like`: on their device, of their
// dtype.
template <typename Request>
Request request_for(const Tensor& like, const Grid& grid, int64_t qk_channels, const Parts& operands,
                    const Tensor& out, const Tensor& lse) {
  Request request{};
  request.device = device_info(like);
  request.grid = grid;
  request.qk_channels = static_cast<int>(qk_channels);
  request.channels = static_cast<int>(out.size(1));
  request.query = operands.query;
  request.key = operands.key;
  request.value = operands.value;
  request.out = reference(out, grid);
  request.lse = static_cast<float*>(lse.data_ptr());
  request.stream = current_stream(like);
  return request;
}

void run_forward(const Tensor& like, const Grid& grid, int64_t qk_channels, const Parts& operands, const Tensor& out,
                 const Tensor& lse) {
  auto request = request_for<ForwardRequest>(like, grid, qk_channels, operands, out, lse);
  const Kernels& kernels = kernels_for(like, request);
  const Tensor stats = empty_floats(like, kernels.forward_scratch(grid, request.device) / int64_t{sizeof(float)});
  request.stats = stats.data_ptr();
  check(kernels.forward(request));
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
    run_forward(query, grid, query.size(1), separate(query, key, value, grid), out, lse);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor> packed_forward(Tensor packed, int64_t key_channels) {
  const Grid grid = checked_packed_grid(packed, key_channels);
  check_counts(grid, packed, packed);
  const torch::stable::accelerator::DeviceGuard guard(packed.get_device_index());
  Tensor out = empty_channels_last(packed, packed.size(1) - 2 * key_channels);
  Tensor lse = empty_statistic(packed);
  if (lse.numel() > 0) {
    packed = with_dense_channels(packed);
    run_forward(packed, grid, key_channels, side_by_side(packed, key_channels, grid), out, lse);
  }
  return {out, lse};
}

void run_backward(const Tensor& like, const Grid& grid, int64_t qk_channels, const Parts& operands, Tensor grad_out,
                  Tensor out, const Tensor& lse, const Parts& grads) {
  out = with_dense_channels(out);
  grad_out = with_dense_channels(grad_out);
  Tensor delta = empty_statistic(like);
  auto request = request_for<BackwardRequest>(like, grid, qk_channels, operands, out, lse);
  request.grad_out = reference(grad_out, grid);
  request.grad_query = grads.query;
  request.grad_key = grads.key;
  request.grad_value = grads.value;
  request.delta = static_cast<float*>(delta.data_ptr());
  check(kernels_for(like, request).backward(request));
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
    run_backward(query, grid, query.size(1), separate(query, key, value, grid), grad_out, out, lse,
                 separate(grad_query, grad_key, grad_value, grid));
  }
  return {grad_query, grad_key, grad_value};
}

Tensor packed_backward(Tensor grad_out, Tensor packed, int64_t key_channels, Tensor out, Tensor lse) {
  const Grid grid = checked_packed_grid(packed, key_channels);
  check_counts(grid, packed, packed);
  check_backward(packed, packed.size(1) - 2 * key_channels, grad_out, out, lse, grid);
  const torch::stable::accelerator::DeviceGuard guard(packed.get_device_index());
  Tensor grad_packed = empty_channels_last(packed, packed.size(1));
  if (lse.numel() > 0) {
    packed = with_dense_channels(packed);
    run_backward(packed, grid, key_channels, side_by_side(packed, key_channels, grid), grad_out, out, lse,
                 side_by_side(grad_packed, key_channels, grid));
  }
  return grad_packed;
}

}  // namespace
}  // namespace cuda
}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CUDA, m) {
  m.impl("criss_cross_forward", TORCH_BOX(&ccnet::cuda::forward));
  m.impl("criss_cross_backward", TORCH_BOX(&ccnet::cuda::backward));
  m.impl("criss_cross_packed_forward", TORCH_BOX(&ccnet::cuda::packed_forward));
  m.impl("criss_cross_packed_backward", TORCH_BOX(&ccnet::cuda::packed_backward));
}
