// Any processor, and float64 everywhere: short arrays that the compiler turns into whatever vectors it has.
#include "common.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ccnet {
namespace cpu {
namespace {

#include "storage.h"
#include "vector_portable.h"
#include "work.h"
#include "line_kernels.h"
#include "residual_kernels.h"

void forward(const ForwardArgs& args) {
  if (args.dtype == DType::kDouble) return forward_typed<ArrayVector<double, 2>, double>(args);
  forward_any<FloatVector>(args);
}

void backward(const BackwardArgs& args) {
  if (args.dtype == DType::kDouble) return backward_typed<ArrayVector<double, 2>, double>(args);
  backward_any<FloatVector>(args);
}

void to_channels_last(const CopyArgs& args) {
  if (args.dtype == DType::kDouble) return to_channels_last_typed<ArrayVector<double, 2>, double>(args);
  to_channels_last_any<FloatVector>(args);
}

void residual_forward(const ResidualArgs& args) {
  if (args.dtype == DType::kDouble) return residual_forward_typed<ArrayVector<double, 2>, double, double>(args);
  residual_forward_any<FloatVector>(args);
}

void residual_backward(const ResidualArgs& args) {
  if (args.dtype == DType::kDouble) return residual_backward_typed<ArrayVector<double, 2>, double, double>(args);
  residual_backward_any<FloatVector>(args);
}

const Kernels kKernels{"portable", to_channels_last, forward, backward, residual_forward, residual_backward};

}  // namespace

const Kernels* portable_kernels() { return &kKernels; }

}  // namespace cpu
}  // namespace ccnet
