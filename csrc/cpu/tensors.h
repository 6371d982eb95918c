// What the operators of the CPU library share: how torch's tensors become arguments of the kernels. LibTorch stable ABI
// only.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "attention.h"

namespace ccnet {
namespace cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The best kernels for this dtype that the processor runs.
const Kernels& select_kernels(DType dtype);

// torch's threads as the kernels' `Parallel`.
void parallel(int workers, void (*fn)(void*, int), void* ctx);

// Raises an error where the kernels do not know the dtype.
DType kernel_dtype(const Tensor& t);

// t from channel `first` on.
TensorRef reference(const Tensor& t, const Grid& grid, int64_t first = 0);

// An uninitialised (B, channels, *S) tensor in channels-last memory.
Tensor empty_channels_last(const Tensor& like, int64_t channels);

// The tensor itself where its channels lie one beside the other, else a channels-last copy.
Tensor channels_last(const Tensor& t, const Grid& grid);

}  // namespace cpu
}  // namespace ccnet
