// Interface between the binding (bind.cpp) and the per-instruction-set kernels (kernel_*.cpp).
#pragma once

#include <stdint.h>

#include "../lines.h"

namespace ccnet {
namespace cpu {

enum class DType : int { kFloat, kHalf, kBFloat16, kDouble };

// Runs fn(ctx, worker) for worker = 0 .. workers - 1, possibly at the same time.
using Parallel = void (*)(int workers, void (*fn)(void* ctx, int worker), void* ctx);

// The forward and backward kernels want a channel stride of 1 (channels-last memory) everywhere; to_channels_last brings
// other tensors into it.
struct AttentionArgs {
  Grid grid;
  int64_t qk_channels;  // C'
  int64_t channels;     // C
  DType dtype;
  TensorRef query, key, value, out;
  int workers;
  Parallel parallel;
};

struct ForwardArgs : AttentionArgs {
  void* max;  // (B, N) running maximum; fp32, fp64 for kDouble, as are the others below
  void* lse;  // (B, N) holds the running sum until the last axis is done, log-sum-exp afterwards
};

struct BackwardArgs : AttentionArgs {
  TensorRef grad_out;
  TensorRef grad_query, grad_key, grad_value;
  const void* lse;
  void* delta;       // (B, N) sum_c grad_out * out, written by the first axis
  bool delta_first;  // before anything else: grad_value is written over out
  bool accumulate;   // add to grad_query and grad_key, which are replaced otherwise
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

// The layer's last step and its backward.
struct ResidualArgs {
  int64_t batch, channels, positions;
  int64_t piece_channels, piece_positions;  // worked on at once
  DType attended_dtype;  // of attended and its gradient
  DType dtype;           // of x, the result and its gradient: attended_dtype, or kFloat
  double gamma;
  FlatMap attended;  // channels side by side
  FlatMap x;         // backward: the gradient of the result
  FlatMap out;       // forward: the result; backward: the gradient of attended, channels side by side
  double* sums;      // backward: sum_n x * attended of each of residual_items(args) pieces
  int workers;
  Parallel parallel;
};

// Pieces that the residual is worked in.
inline int64_t residual_items(const ResidualArgs& args) {
  return args.batch * ((args.channels + args.piece_channels - 1) / args.piece_channels) *
         ((args.positions + args.piece_positions - 1) / args.piece_positions);
}

// An fp32 matrix: strides in numbers, one of row and column is 1.
struct MatrixRef {
  void* data;
  int64_t batch, row, column;
};

// Products of fp32 matrices.
struct MatmulArgs {
  int64_t batch, rows, depth, columns;
  MatrixRef left;     // (batch, rows, depth)
  MatrixRef right;    // (batch or 1, depth, columns)
  MatrixRef out;      // (batch or 1, rows, columns)
  MatrixRef added;    // like out, or null
  const float* bias;  // (columns), or null
  int workers;
  Parallel parallel;
};

struct Kernels {
  const char* name;
  void (*to_channels_last)(const CopyArgs&);
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*residual_forward)(const ResidualArgs&);
  void (*residual_backward)(const ResidualArgs&);
  // Null where PyTorch's products are as fast or faster on every processor:
  void (*matmul)(const MatmulArgs&) = nullptr;      // out[b] = left[b] right + bias + added[b]
  void (*matmul_sum)(const MatmulArgs&) = nullptr;  // out = sum_b left[b] right[b]
  bool matmul_pays = false;                         // they are faster than PyTorch's on this processor
};

// Each returns nullptr where this build or this processor lacks the instruction set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();  // bf16 only, as are the next
const Kernels* amx_kernels();
const Kernels* amx_split_kernels();  // fp32 and fp16

// The processor has AMX, the system keeps its state, and this process may use it (Linux asks for permission).
bool matrix_units_usable();

}  // namespace cpu
}  // namespace ccnet
