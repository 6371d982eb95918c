// Interface between the binding (bind.cpp) and the per-instruction-set kernels (kernel_*.cpp).
#pragma once

#include <stdint.h>

#include "../lines.h"

namespace ccnet {
namespace cpu {

enum class DType : int { kFloat, kHalf, kBFloat16, kDouble };

// A (B, C, *S) tensor; `data` points at its first element. The forward and backward kernels want a channel stride of 1
// (channels-last memory) everywhere; to_channels_last brings other tensors into it.
struct TensorRef {
  void* data;
  Strides strides;
};

// Runs fn(ctx, worker) for worker = 0 .. workers - 1, possibly at the same time.
using Parallel = void (*)(int workers, void (*fn)(void* ctx, int worker), void* ctx);

struct ForwardArgs {
  Grid grid;
  int64_t qk_channels;  // C'
  int64_t channels;     // C
  DType dtype;
  TensorRef query, key, value;
  TensorRef out;
  void* max;      // (B, N) running maximum; fp32, fp64 for kDouble, as are the next two
  void* lse;      // (B, N) holds the running sum until the last axis is done, log-sum-exp afterwards
  int workers;
  Parallel parallel;
};

struct BackwardArgs {
  Grid grid;
  int64_t qk_channels;
  int64_t channels;
  DType dtype;
  TensorRef query, key, value, out, grad_out;
  TensorRef grad_query, grad_key, grad_value;
  const void* lse;
  void* delta;  // (B, N) sum_c grad_out * out, written by the first axis
  int workers;
  Parallel parallel;
};

struct CopyArgs {
  Grid grid;
  int64_t channels;
  DType dtype;
  TensorRef from;  // any strides
  TensorRef to;    // dense, channels-last
  int workers;
  Parallel parallel;
};

struct Kernels {
  const char* name;
  void (*to_channels_last)(const CopyArgs&);
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
};

// Each returns nullptr where this build or this processor lacks the instruction set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();  // bf16 only, as are the next
const Kernels* amx_kernels();

}  // namespace cpu
}  // namespace ccnet
