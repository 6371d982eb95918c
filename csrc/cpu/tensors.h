// What the operators of the CPU library share beyond ../tensors.h: memory, and the choice of kernels.
#pragma once

#include "../tensors.h"
#include "attention.h"

namespace ccnet {
namespace cpu {

// The best kernels for this dtype that the processor runs.
const Kernels& select_kernels(DType dtype);

// torch's threads as the kernels' `Parallel`.
void parallel(int workers, void (*fn)(void*, int), void* ctx);

template <class Args>
void use_all_threads(Args* args) {
  args->workers = static_cast<int>(torch::stable::get_num_threads());
  args->parallel = parallel;
}

// Raises an error where the kernels do not know the dtype.
DType kernel_dtype(const Tensor& t);

// Asks the system for huge pages for a new tensor without gaps of 32 MiB or more, and has it give them out; smaller ones
// are mostly given what a call before gave back, which is there already. Does nothing where the system has none.
void use_huge_pages_if_new(const Tensor& t);

// An uninitialised (B, channels, *S) tensor in channels-last memory.
Tensor empty_channels_last(const Tensor& like, int64_t channels);

// The same in NCHW memory.
Tensor empty_channels_second(const Tensor& like, int64_t channels);

Tensor copy_channels_last(const Tensor& t, const Grid& grid);

// The tensor itself where its channels lie one beside the other, else a channels-last copy.
Tensor channels_last(const Tensor& t, const Grid& grid);

}  // namespace cpu
}  // namespace ccnet
