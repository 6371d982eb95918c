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

// The current CUDA device must be the tensors'. The results are cudaError_t values, 0 for success.
struct Kernels {
  bool (*takes_forward)(const ForwardRequest&);  // whether this device and these tensors are for these kernels
  bool (*takes_backward)(const BackwardRequest&);
  int64_t (*forward_scratch)(const Grid&, const DeviceInfo&);   // bytes
  int (*forward)(const ForwardRequest&);
  int (*backward)(const BackwardRequest&);
};

const Kernels& float_kernels();
const Kernels& half_kernels();
const Kernels& bfloat16_kernels();

// For compute capability 9.0; there where the library is built for it.
#if defined(CCNET_HOPPER)
const Kernels& hopper_half_kernels();
const Kernels& hopper_bfloat16_kernels();
#endif

}  // namespace cuda
}  // namespace ccnet
