// The layer's 1x1 projection and its gradients in fp32, where the library's products are faster than PyTorch's.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "tensors.h"

namespace ccnet {
namespace cpu {
namespace {

using Product = void (*)(const MatmulArgs&);

Product usable(Product product) {
  require(product != nullptr, "the kernels for this processor have no products of fp32.");
  return product;
}

// A map (B, c, *S) and the projection's weight (O, C), or its gradient.
void check(const Tensor& map, const char* name, int64_t channels, const Tensor& weight) {
  require(map.is_cpu() && is_map(map) && map.scalar_type() == ScalarType::Float, name,
          " must be a CPU tensor (B, C, *S) of float32 with one to three spatial axes.");
  require(weight.is_cpu() && weight.dim() == 2 && weight.scalar_type() == ScalarType::Float,
          "weight must be a CPU tensor (O, C) of float32.");
  require(map.size(1) == channels, name, " must have ", channels, " channels, got ", map.size(1), ".");
}

void check_same_positions(const Tensor& a, const Tensor& b) {
  bool alike = a.dim() == b.dim() && a.size(0) == b.size(0);
  for (int64_t d = 2; alike && d < a.dim(); ++d) alike = a.size(d) == b.size(d);
  require(alike, "both maps must have one batch and the same spatial sizes.");
}

// Positions as rows, channels as columns.
MatrixRef positions_first(const Tensor& map, const char* name) {
  const FlatMap flat = flat_map(map, name);
  return {flat.data, flat.batch, flat.position, flat.channel};
}

MatrixRef transposed(const MatrixRef& m) { return {m.data, m.batch, m.column, m.row}; }

MatrixRef matrix(const Tensor& weight) {
  const int64_t row = weight.size(0) == 1 ? weight.size(1) : weight.stride(0);
  const int64_t column = weight.size(1) == 1 ? 1 : weight.stride(1);
  require(column == 1, "weight must have its columns side by side.");
  return {weight.data_ptr(), 0, row, column};
}

MatmulArgs arguments(int64_t batch, int64_t rows, int64_t depth, int64_t columns) {
  MatmulArgs args{};
  args.batch = batch;
  args.rows = rows;
  args.depth = depth;
  args.columns = columns;
  use_all_threads(&args);
  return args;
}

// To all or some channels of a channels-last map.
void forward_into(Tensor x, Tensor weight, Tensor bias, Tensor out) {
  check(x, "x", weight.size(1), weight);
  require(bias.is_cpu() && bias.scalar_type() == ScalarType::Float && bias.dim() == 1 &&
              bias.size(0) == weight.size(0) && (bias.stride(0) == 1 || bias.size(0) == 1),
          "bias must be a dense CPU tensor (O,) of float32.");
  require(out.is_cpu() && out.dim() == x.dim() && out.scalar_type() == ScalarType::Float &&
              out.size(1) == weight.size(0),
          "out must be a CPU tensor (B, O, *S) of float32 with the channels of weight.");
  check_same_positions(x, out);
  if (out.numel() == 0) return;
  MatmulArgs args = arguments(x.size(0), grid_of(x).positions(), weight.size(1), weight.size(0));
  args.left = positions_first(x, "x");
  args.right = transposed(matrix(weight));
  args.out = positions_first(out, "the result");
  args.bias = static_cast<const float*>(bias.data_ptr());
  usable(select_kernels(DType::kFloat).matmul)(args);
}

Tensor forward(Tensor x, Tensor weight, Tensor bias) {
  const Tensor out = empty_channels_last(x, weight.size(0));
  forward_into(x, weight, bias, out);
  return out;
}

// out = the gradient of the input, and `residual` where there is one: out itself, or another.
void input_gradient_to(const Tensor& out, const Tensor& grad, const Tensor& weight,
                       const std::optional<Tensor>& residual) {
  check(grad, "grad", weight.size(0), weight);
  if (residual.has_value()) {
    check(*residual, "residual", weight.size(1), weight);
    check_same_positions(grad, *residual);
  }
  if (out.numel() == 0) return;
  MatmulArgs args = arguments(grad.size(0), grid_of(grad).positions(), weight.size(0), weight.size(1));
  args.left = positions_first(grad, "grad");
  args.right = matrix(weight);
  args.out = positions_first(out, "the result");
  if (residual.has_value()) args.added = positions_first(*residual, "residual");
  usable(select_kernels(DType::kFloat).matmul)(args);
}

// The gradient of the input, to which `residual` is added where there is one.
Tensor input_gradient(Tensor grad, Tensor weight, std::optional<Tensor> residual, bool out_channels_last) {
  const Tensor out = out_channels_last ? empty_channels_last(grad, weight.size(1))
                                       : empty_channels_second(grad, weight.size(1));
  input_gradient_to(out, grad, weight, residual);
  return out;
}

void input_gradient_into(Tensor grad, Tensor weight, Tensor residual, Tensor out) {
  check(out, "out", weight.size(1), weight);
  check_same_positions(grad, out);
  input_gradient_to(out, grad, weight, residual);
}

Tensor weight_gradient(Tensor grad, Tensor x) {
  Tensor out = torch::stable::new_empty(x, {grad.size(1), x.size(1)});
  check(grad, "grad", grad.size(1), out);
  check(x, "x", x.size(1), out);
  check_same_positions(grad, x);
  if (grad.numel() == 0 || x.numel() == 0) return torch::stable::fill_(out, 0.0);
  MatmulArgs args = arguments(x.size(0), grad.size(1), grid_of(x).positions(), x.size(1));
  args.left = transposed(positions_first(grad, "grad"));
  args.right = positions_first(x, "x");
  args.out = matrix(out);
  usable(select_kernels(DType::kFloat).matmul_sum)(args);
  return out;
}

bool has_fp32_products() { return select_kernels(DType::kFloat).matmul_pays; }

}  // namespace
}  // namespace cpu
}  // namespace ccnet

STABLE_TORCH_LIBRARY_FRAGMENT(ccnet_d2, m) {
  m.def("projection_forward(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def("projection_forward_into(Tensor x, Tensor weight, Tensor bias, Tensor(a!) out) -> ()");
  m.def("projection_weight_gradient(Tensor grad, Tensor x) -> Tensor");
  m.def("projection_input_gradient(Tensor grad, Tensor weight, Tensor? residual, bool channels_last) -> Tensor");
  m.def("projection_input_gradient_into(Tensor grad, Tensor weight, Tensor residual, Tensor(a!) out) -> ()");
  m.def("has_fp32_products() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CPU, m) {
  m.impl("projection_forward", TORCH_BOX(&ccnet::cpu::forward));
  m.impl("projection_input_gradient_into", TORCH_BOX(&ccnet::cpu::input_gradient_into));
  m.impl("projection_forward_into", TORCH_BOX(&ccnet::cpu::forward_into));
  m.impl("projection_weight_gradient", TORCH_BOX(&ccnet::cpu::weight_gradient));
  m.impl("projection_input_gradient", TORCH_BOX(&ccnet::cpu::input_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CompositeExplicitAutograd, m) {
  m.impl("has_fp32_products", TORCH_BOX(&ccnet::cpu::has_fp32_products));
}
