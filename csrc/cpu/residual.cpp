// The layer's last step, x + gamma * attended, and its backward, between memory layouts: the attention works on
// channels-last memory while most networks are NCHW. One pass instead of a transposing copy and two products.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "tensors.h"

namespace ccnet {
namespace cpu {
namespace {

void check(const Tensor& a, const Tensor& b, const Tensor& gamma, ScalarType computed) {
  require(a.is_cpu() && b.is_cpu() && gamma.is_cpu(), "the residual takes CPU tensors.");
  require(a.dim() == b.dim() && is_map(a), "the residual takes tensors (B, C, *S) with one to three spatial axes.");
  for (int64_t d = 0; d < a.dim(); ++d) {
    require(a.size(d) == b.size(d), "attended and x must have one shape.");
  }
  require(gamma.numel() == 1 && gamma.scalar_type() == computed,
          "gamma must be one number, float64 if x is, else float32.");
}

ScalarType computed_dtype(ScalarType x) { return x == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// All but the sums; attended is channels-last.
ResidualArgs arguments(const Tensor& attended, const Tensor& gamma, const Tensor& x, const Tensor& out) {
  ResidualArgs args{};
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.positions = grid_of(x).positions();
  args.attended_dtype = kernel_dtype(attended);
  args.dtype = kernel_dtype(x);
  const bool wider = args.dtype == DType::kFloat && args.attended_dtype != DType::kDouble;
  require(args.dtype == args.attended_dtype || wider,
          "the residual takes attended and x of one floating dtype, or x of float32.");
  args.gamma = args.dtype == DType::kDouble ? static_cast<const double*>(gamma.data_ptr())[0]
                                            : static_cast<const float*>(gamma.data_ptr())[0];
  args.attended = flat_map(attended, "attended");
  args.x = flat_map(x, "x");
  args.out = flat_map(out, "the result");
  // Channels-last maps are worked through as they lie in memory; with an NCHW one beside them, in long rows of that and
  // two cache lines of attended at once.
  const bool nchw = args.x.position == 1 || args.out.position == 1;
  args.piece_channels = nchw ? 128 / static_cast<int64_t>(attended.element_size()) : args.channels;
  args.piece_positions = nchw ? 512 : 8192 / args.channels + 1;
  use_all_threads(&args);
  return args;
}

void run_forward(const Tensor& attended, const Tensor& gamma, const Tensor& x, const Tensor& out) {
  const Tensor attended_last = channels_last(attended, grid_of(attended));
  select_kernels(kernel_dtype(x)).residual_forward(arguments(attended_last, gamma, x, out));
}

Tensor residual_forward(Tensor attended, Tensor gamma, Tensor x, bool out_channels_last) {
  check(attended, x, gamma, computed_dtype(x.scalar_type()));
  const Tensor out = out_channels_last ? empty_channels_last(x, x.size(1)) : empty_channels_second(x, x.size(1));
  if (x.numel() > 0) run_forward(attended, gamma, x, out);
  return out;
}

// All or some channels of a map, into the same channels of another of its dtype.
void residual_forward_into(Tensor attended, Tensor gamma, Tensor x, Tensor out) {
  check(attended, x, gamma, computed_dtype(x.scalar_type()));
  check(out, x, gamma, computed_dtype(x.scalar_type()));
  require(out.scalar_type() == x.scalar_type(), "the result must have the dtype of x.");
  if (x.numel() > 0) run_forward(attended, gamma, x, out);
}

std::tuple<Tensor, Tensor> residual_backward(Tensor grad, Tensor attended, Tensor gamma) {
  check(attended, grad, gamma, computed_dtype(grad.scalar_type()));
  Tensor grad_attended = empty_channels_last(attended, attended.size(1));
  Tensor grad_gamma = torch::stable::empty_like(gamma);
  if (grad.numel() == 0) return {grad_attended, torch::stable::fill_(grad_gamma, 0.0)};
  attended = channels_last(attended, grid_of(attended));
  ResidualArgs args = arguments(attended, gamma, grad, grad_attended);
  std::vector<double> sums(static_cast<size_t>(residual_items(args)));
  args.sums = sums.data();
  select_kernels(args.dtype).residual_backward(args);
  double total = 0;
  for (double sum : sums) total += sum;
  return {grad_attended, torch::stable::fill_(grad_gamma, total)};
}

}  // namespace
}  // namespace cpu
}  // namespace ccnet

STABLE_TORCH_LIBRARY_FRAGMENT(ccnet_d2, m) {
  m.def("gated_residual_forward(Tensor attended, Tensor gamma, Tensor x, bool channels_last) -> Tensor");
  m.def("gated_residual_forward_into(Tensor attended, Tensor gamma, Tensor x, Tensor(a!) out) -> ()");
  m.def(
      "gated_residual_backward(Tensor grad, Tensor attended, Tensor gamma) -> (Tensor grad_attended, Tensor "
      "grad_gamma)");
}

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CPU, m) {
  m.impl("gated_residual_forward", TORCH_BOX(&ccnet::cpu::residual_forward));
  m.impl("gated_residual_forward_into", TORCH_BOX(&ccnet::cpu::residual_forward_into));
  m.impl("gated_residual_backward", TORCH_BOX(&ccnet::cpu::residual_backward));
}
