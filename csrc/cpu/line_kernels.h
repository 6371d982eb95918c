// Forward and backward of criss-cross attention, line by line, for any vector type.
//
// Included once per instruction set, inside that translation unit's anonymous namespace: nothing here may have
// external linkage, or the linker could merge code compiled for different processors.
//
// Every product is a small matrix product C[M, N] (+)= A[M, K] B[K, N] done by register-blocked micro-kernels:
// B is packed into panels of kPanel columns, A is read by broadcasts either along K (row-major A) or along M
// (column-major A). Only packing and the epilogues know the storage type; all arithmetic is done in V::T.
//
// Forward, per line of length L and block of query rows i:
//   St[j, i] = K Q^T       transposed, so that the softmax over j runs down columns with vertical operations
//   O[i, c]  = St^T V      A = St is column-major here, its broadcasts read consecutive numbers
// Backward, per line and block of query rows i:
//   P[i, j]  = exp(Q K^T - lse_i),  dP = dO V^T,  dS = P * (dP - delta_i)
//   dV = P^T dO,  dK = dS^T Q,  dQ = dS K
// A line owns its positions, so lines run in parallel without atomics; one parallel region per axis, in which the
// second and third axis add to what the first wrote. The result does not depend on the number of threads.

#include "ahead.h"
#include "copy_channels_last.h"
#include "line_access.h"
#include "merge_rows.h"
#include "micro_kernels.h"

#include "delta.h"
#include "line_forward.h"
#include "line_backward.h"

// Calls run(S{}) with the type that numbers of this dtype are stored in.
template <class F>
void with_storage(DType dtype, const F& run) {
  switch (dtype) {
    case DType::kFloat: return run(float{});
    case DType::kHalf: return run(Half{});
    case DType::kBFloat16: return run(BFloat16{});
    case DType::kDouble: return;  // portable only
  }
}

template <class V>
void forward_any(const ForwardArgs& args) {
  with_storage(args.dtype, [&](auto s) { forward_typed<V, decltype(s)>(args); });
}

template <class V>
void backward_any(const BackwardArgs& args) {
  with_storage(args.dtype, [&](auto s) { backward_typed<V, decltype(s)>(args); });
}

template <class V>
void to_channels_last_any(const CopyArgs& args) {
  with_storage(args.dtype, [&](auto s) { to_channels_last_typed<V, decltype(s)>(args); });
}
