// The operators of the layer's last step and of copies to channels-last memory. LibTorch stable ABI only. The schemas are
// defined by the CPU library.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace ccnet {
namespace cuda {
namespace {

const ResidualKernels& kernels_for(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return float_residual_kernels();
    case ScalarType::Half: return half_residual_kernels();
    case ScalarType::BFloat16: return bfloat16_residual_kernels();
    default: refuse("the residual on CUDA takes float16, bfloat16 or float32.");
  }
}

ResidualRequest request_of(const Tensor& x, const Tensor& out) {
  require(is_map(x), "the residual takes tensors (B, C, *S) with one to three spatial axes.");
  check_counts(grid_of(x), x, x);
  ResidualRequest request{};
  request.batch = x.size(0);
  request.channels = static_cast<int>(x.size(1));
  request.positions = grid_of(x).positions();
  request.x = flat_map(x, "x");
  request.out = flat_map(out, "the result");
  request.stream = current_stream(x);
  return request;
}

void check_gamma(const Tensor& gamma, const Tensor& x) {
  require(gamma.numel() == 1 && gamma.scalar_type() == ScalarType::Float && gamma.is_cuda() &&
              gamma.get_device_index() == x.get_device_index(),
          "gamma must be one number of float32, on the device of x.");
}

void add_attended(const Tensor& attended, const Tensor& gamma, ResidualRequest* request) {
  request->attended = flat_map(attended, "attended");
  require(request->attended.channel == 1, "attended must be channels-last in memory.");
  request->gamma = static_cast<const float*>(gamma.data_ptr());
}

void check_attended(const Tensor& attended, const Tensor& x) {
  check_alike(attended, x, "attended");
  require(attended.size(1) == x.size(1), "attended and x must have one shape.");
}

void run_forward(const Tensor& attended, const Tensor& gamma, const Tensor& x, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  ResidualRequest request = request_of(x, out);
  add_attended(attended, gamma, &request);
  check(kernels_for(x).forward(request));
}

Tensor residual_forward(Tensor attended, Tensor gamma, Tensor x, bool out_channels_last) {
  check_attended(attended, x);
  check_gamma(gamma, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = out_channels_last ? empty_channels_last(x, x.size(1)) : empty_positions_last(x, x.size(1));
  if (x.numel() > 0) run_forward(with_dense_channels(attended), gamma, x, out);
  return out;
}

void residual_forward_into(Tensor attended, Tensor gamma, Tensor x, Tensor out) {
  check_attended(attended, x);
  check_attended(out, x);
  check_gamma(gamma, x);
  if (x.numel() > 0) run_forward(with_dense_channels(attended), gamma, x, out);
}

std::tuple<Tensor, Tensor> residual_backward(Tensor grad, Tensor attended, Tensor gamma) {
  check_attended(attended, grad);
  check_gamma(gamma, grad);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const Tensor grad_attended = empty_channels_last(attended, attended.size(1));
  Tensor grad_gamma = torch::stable::empty_like(gamma);
  if (grad.numel() == 0) return {grad_attended, torch::stable::fill_(grad_gamma, 0.0)};
  ResidualRequest request = request_of(grad, grad_attended);
  attended = with_dense_channels(attended);
  add_attended(attended, gamma, &request);
  const ResidualKernels& kernels = kernels_for(grad);
  const Tensor sums = empty_floats(grad, kernels.sums(request));
  request.sums = static_cast<float*>(sums.data_ptr());
  request.total = static_cast<float*>(grad_gamma.data_ptr());
  check(kernels.backward(request));
  return {grad_attended, grad_gamma};
}

Tensor to_channels_last(Tensor x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor copy = empty_channels_last(x, x.size(1));
  if (x.numel() > 0) check(kernels_for(x).copy(request_of(x, copy)));
  return copy;
}

}  // namespace
}  // namespace cuda
}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CUDA, m) {
  m.impl("gated_residual_forward", TORCH_BOX(&ccnet::cuda::residual_forward));
  m.impl("gated_residual_forward_into", TORCH_BOX(&ccnet::cuda::residual_forward_into));
  m.impl("gated_residual_backward", TORCH_BOX(&ccnet::cuda::residual_backward));
  m.impl("to_channels_last", TORCH_BOX(&ccnet::cuda::to_channels_last));
}
