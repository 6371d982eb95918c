// The operators of the CUDA library: argument checks, memory, device and stream. LibTorch stable ABI only. The schemas
// are defined by the CPU library.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <tuple>

#include "interface.h"

namespace ccnet {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
          10 * major + attribute(cudaDevAttrComputeCapabilityMinor, device)};
}

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

TensorRef reference(const Tensor& t, const Grid& grid) {
  TensorRef r{};
  r.data = t.data_ptr();
  r.strides.batch = t.stride(0);
  r.strides.channel = t.stride(1);
  for (int a = 0; a < grid.axes; ++a) r.strides.axis[a] = t.stride(2 + a);
  return r;
}

void check_alike(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  " must be on the CUDA device of query.");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of query.");
  STD_TORCH_CHECK(t.dim() == like.dim() && t.size(0) == like.size(0), name, " must have the batch size of query.");
  for (int64_t d = 2; d < like.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) == like.size(d), name, " must have the spatial sizes of query.");
  }
}

Grid checked_grid(const Tensor& query, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(query.dim() >= 3 && query.dim() <= 2 + kMaxAxes,
                  "query must be (B, C', *S) with one to three spatial axes.");
  check_alike(query, query, "query");
  check_alike(key, query, "key");
  check_alike(value, query, "value");
  STD_TORCH_CHECK(key.size(1) == query.size(1), "key must have the channels of query.");
  Grid grid{};
  grid.batch = query.size(0);
  grid.axes = static_cast<int>(query.dim()) - 2;
  // The kernels count positions of a line and channels in 32 bits, with room for the last tile.
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 1024;
  for (int a = 0; a < grid.axes; ++a) {
    grid.size[a] = query.size(2 + a);
    STD_TORCH_CHECK(grid.size[a] <= kMost, "criss-cross attention takes at most ", kMost, " positions on an axis.");
  }
  STD_TORCH_CHECK(query.size(1) <= kMost && value.size(1) <= kMost, "criss-cross attention takes at most ", kMost,
                  " channels.");
  return grid;
}

// An uninitialised (B, channels, *S) tensor in channels-last memory.
Tensor empty_channels_last(const Tensor& like, int64_t channels) {
  int64_t sizes[2 + kMaxAxes];
  const int64_t dims = like.dim();
  sizes[0] = like.size(0);
  for (int64_t d = 2; d < dims; ++d) sizes[d - 1] = like.size(d);
  sizes[dims - 1] = channels;
  Tensor t = torch::stable::new_empty(like, {sizes, static_cast<size_t>(dims)});
  for (int64_t d = dims - 1; d > 1; --d) t = torch::stable::transpose(t, d - 1, d);
  return t;
}

// The tensor itself where its channels are neighbours in memory, otherwise a channels-last copy.
Tensor with_dense_channels(const Tensor& t) {
  if (t.stride(1) == 1 || t.size(1) == 1) return t;
  Tensor copy = empty_channels_last(t, t.size(1));
  torch::stable::copy_(copy, t);
  return copy;
}

// Uninitialised fp32 tensors: (B, *S), and of `count` elements.
Tensor empty_statistic(const Tensor& like) {
  int64_t sizes[1 + kMaxAxes];
  sizes[0] = like.size(0);
  for (int64_t d = 2; d < like.dim(); ++d) sizes[d - 1] = like.size(d);
  return torch::stable::new_empty(like, {sizes, static_cast<size_t>(like.dim() - 1)}, ScalarType::Float);
}
Tensor empty_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {&count, 1}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value) {
  const Grid grid = checked_grid(query, key, value);
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
  check_alike(grad_out, query, "grad_out");
  check_alike(out, query, "out");
  STD_TORCH_CHECK(grad_out.size(1) == value.size(1) && out.size(1) == value.size(1),
                  "grad_out and out must have the channels of value.");
  STD_TORCH_CHECK(lse.is_cuda() && lse.get_device_index() == query.get_device_index() &&
                      lse.scalar_type() == ScalarType::Float && lse.is_contiguous() &&
                      lse.numel() == grid.batch * grid.positions(),
                  "lse must be the one that the forward pass returned.");
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
