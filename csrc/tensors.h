// What both libraries' operators do with torch's tensors: checks, shapes, references. LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <exception>
#include <string>

#include "lines.h"
#include "require.h"

namespace ccnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether t is (B, C, *S) with one to three spatial axes, which is to be known before they are counted up to kMaxAxes.
inline bool is_map(const Tensor& t) { return t.dim() >= 3 && t.dim() <= 2 + kMaxAxes; }

// Of a (B, C, *S) tensor.
inline Grid grid_of(const Tensor& t) {
  Grid grid{};
  grid.batch = t.size(0);
  grid.axes = static_cast<int>(t.dim()) - 2;
  for (int a = 0; a < grid.axes; ++a) grid.size[a] = t.size(2 + a);
  return grid;
}

// t from channel `first` on.
inline TensorRef reference(const Tensor& t, const Grid& grid, int64_t first = 0) {
  TensorRef r{};
  r.data = static_cast<char*>(t.data_ptr()) + first * t.stride(1) * t.element_size();
  r.strides.batch = t.stride(0);
  r.strides.channel = t.stride(1);
  for (int a = 0; a < grid.axes; ++a) r.strides.axis[a] = t.stride(2 + a);
  return r;
}

// t as (B, C, N); an error where its positions are not evenly spaced or neither axis is dense.
inline FlatMap flat_map(const Tensor& t, const char* name) {
  int64_t step = 0, count = 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (count == 1) step = t.stride(d);
    require(t.stride(d) == step * count, name, " must have evenly spaced positions.");
    count *= t.size(d);
  }
  const int64_t channel = t.size(1) == 1 ? 1 : t.stride(1), position = count == 1 ? 1 : step;
  require(channel == 1 || position == 1, name, " must be dense over channels or positions.");
  return {t.data_ptr(), t.stride(0), channel, position};
}

inline void check_alike(const Tensor& t, const Tensor& like, const char* name) {
  require(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
          " must be on the device of query.");
  require(t.scalar_type() == like.scalar_type(), name, " must have the dtype of query.");
  require(t.dim() == like.dim() && t.size(0) == like.size(0), name, " must have the batch size of query.");
  for (int64_t d = 2; d < like.dim(); ++d) {
    require(t.size(d) == like.size(d), name, " must have the spatial sizes of query.");
  }
}

inline Grid checked_grid(const Tensor& query, const Tensor& key, const Tensor& value) {
  require(is_map(query), "query must be (B, C', *S) with one to three spatial axes.");
  check_alike(key, query, "key");
  check_alike(value, query, "value");
  require(key.size(1) == query.size(1), "key must have the channels of query.");
  return grid_of(query);
}

// Of (B, 2C' + C, *S): query, key and value side by side.
inline Grid checked_packed_grid(const Tensor& packed, int64_t qk_channels) {
  const Grid grid = checked_grid(packed, packed, packed);
  require(qk_channels >= 1 && packed.size(1) > 2 * qk_channels,
          "packed must have 2 key_channels + C channels, got ", packed.size(1), " channels and key_channels=",
          qk_channels, ".");
  return grid;
}

// What the backward pass is given beside the operands; value has `channels`.
inline void check_backward(const Tensor& like, int64_t channels, const Tensor& grad_out, const Tensor& out,
                           const Tensor& lse, const Grid& grid) {
  check_alike(grad_out, like, "grad_out");
  check_alike(out, like, "out");
  require(grad_out.size(1) == channels && out.size(1) == channels,
          "grad_out and out must have the channels of value.");
  const ScalarType statistic = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  require(lse.is_cuda() == like.is_cuda() && lse.get_device_index() == like.get_device_index() &&
              lse.scalar_type() == statistic && lse.is_contiguous() &&
              lse.numel() == grid.batch * grid.positions(),
          "lse must be the one that the forward pass returned.");
}

// Of what is made like another tensor.
inline void check_axes(const Tensor& like) {
  require(is_map(like), "a map must be (B, C, *S) with one to three spatial axes, got ", like.dim(), " dimensions.");
}

// An uninitialised tensor of these sizes. Up to torch 2.12, errors of torch's own arrive without their cause, with
// nothing but the call that failed: what it most likely was is said here, in words that callers know it by.
inline Tensor uninitialised(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType dtype) {
  try {
    return torch::stable::new_empty(like, {sizes, static_cast<size_t>(dims)}, dtype);
  } catch (const std::exception& error) {
    if (std::string(error.what()).rfind("torch_call_dispatcher", 0) != 0) throw;
    std::string shape;
    for (int64_t d = 0; d < dims; ++d) shape += (d > 0 ? ", " : "") + std::to_string(sizes[d]);
    refuse("a tensor of shape (", shape, ") could not be made, most likely as there is not enough memory.");
  }
}

// An uninitialised (B, *S, channels) tensor, and the same as (B, channels, *S): channels-last in memory.
inline Tensor empty_positions_first(const Tensor& like, int64_t channels, ScalarType dtype) {
  check_axes(like);
  int64_t sizes[2 + kMaxAxes];
  const int64_t dims = like.dim();
  sizes[0] = like.size(0);
  for (int64_t d = 2; d < dims; ++d) sizes[d - 1] = like.size(d);
  sizes[dims - 1] = channels;
  return uninitialised(like, sizes, dims, dtype);
}
inline Tensor with_channels_second(Tensor t) {
  for (int64_t d = t.dim() - 1; d > 1; --d) t = torch::stable::transpose(t, d - 1, d);
  return t;
}

// An uninitialised (B, channels, *S) tensor: NCHW in memory.
inline Tensor empty_positions_last(const Tensor& like, int64_t channels) {
  check_axes(like);
  int64_t sizes[2 + kMaxAxes];
  const int64_t dims = like.dim();
  for (int64_t d = 0; d < dims; ++d) sizes[d] = d == 1 ? channels : like.size(d);
  return uninitialised(like, sizes, dims, like.scalar_type());
}

// An uninitialised (B, *S) tensor of fp32, or fp64 for fp64 inputs.
inline Tensor empty_statistic(const Tensor& like) {
  int64_t sizes[1 + kMaxAxes];
  sizes[0] = like.size(0);
  for (int64_t d = 2; d < like.dim(); ++d) sizes[d - 1] = like.size(d);
  const ScalarType dtype = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return uninitialised(like, sizes, like.dim() - 1, dtype);
}

}  // namespace ccnet
