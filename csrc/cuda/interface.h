// Between the operators (bind_cuda.cpp) and the kernels (kernels_*.cu): plain structures, no CUDA and no torch types.
#pragma once

#include <stdint.h>

#include "../lines.h"

namespace ccnet {
namespace cuda {

struct DeviceInfo {
  int multiprocessors;
  int shared_bytes;  // most that one block may have, opt-in
  int64_t blocks_per_grid;
  int capability;    // 90 for compute capability 9.0
  int64_t l2_bytes;  // of the L2 cache
};

struct ForwardRequest {
  Grid grid;
  int qk_channels, channels;  // C', C
  TensorRef query, key, value;
  TensorRef out;  // channel stride 1
  void* stats;    // forward_scratch bytes
  float* lse;     // (B, N)
  DeviceInfo device;
  void* stream;
};

struct BackwardRequest {
  Grid grid;
  int qk_channels, channels;
  TensorRef query, key, value, out, grad_out;
  TensorRef grad_query, grad_key, grad_value;  // channel stride 1
  const float* lse;                            // (B, N)
  float* delta;                                // (B, N) scratch
  DeviceInfo device;
  void* stream;
};

// A step of residual.h on maps of one dtype, of which those that are not NCHW have their channels side by side.
struct ResidualRequest {
  int64_t batch, positions;
  int channels;
  FlatMap attended, x, out;  // attended is not there in a copy
  const float* gamma;
  float* sums;   // residual_sums many, and
  float* total;  // their sum, one: of the backward pass
  void* stream;
};

// The current CUDA device must be the tensors'. The results are cudaError_t values, 0 for success.
struct Kernels {
  bool (*takes_forward)(const ForwardRequest&);  // whether this device and these tensors are for these kernels
  bool (*takes_backward)(const BackwardRequest&);
  int64_t (*forward_scratch)(const Grid&, const DeviceInfo&);   // bytes
  int (*forward)(const ForwardRequest&);
  int (*backward)(const BackwardRequest&);
};
struct ResidualKernels {
  int64_t (*sums)(const ResidualRequest&);  // how many the backward pass makes
  int (*copy)(const ResidualRequest&);
  int (*forward)(const ResidualRequest&);
  int (*backward)(const ResidualRequest&);
};

const Kernels& float_kernels();
const Kernels& half_kernels();
const Kernels& bfloat16_kernels();
const ResidualKernels& float_residual_kernels();
const ResidualKernels& half_residual_kernels();
const ResidualKernels& bfloat16_residual_kernels();

// For compute capability 9.0; there where the library is built for it.
#if defined(CCNET_HOPPER)
const Kernels& hopper_half_kernels();
const Kernels& hopper_bfloat16_kernels();
#endif

}  // namespace cuda
}  // namespace ccnet
