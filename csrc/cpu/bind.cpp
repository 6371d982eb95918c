// The attention operators of the CPU library: argument checks and memory. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "tensors.h"

namespace ccnet {
namespace cpu {
namespace {

// Where the operands of one call begin: three tensors, or one that holds them side by side.
struct Operands {
  TensorRef query, key, value;
  int64_t qk_channels, channels;
};

template <class Args>
Args arguments(const Grid& grid, DType dtype, const Operands& in, const Tensor& out) {
  Args args{};
  args.grid = grid;
  args.qk_channels = in.qk_channels;
  args.channels = in.channels;
  args.dtype = dtype;
  args.query = in.query;
  args.key = in.key;
  args.value = in.value;
  args.out = reference(out, grid);
  use_all_threads(&args);
  return args;
}

void run_forward(const Grid& grid, DType dtype, const Operands& in, const Tensor& out, const Tensor& lse) {
  Tensor max = torch::stable::empty_like(lse);
  auto args = arguments<ForwardArgs>(grid, dtype, in, out);
  args.max = max.data_ptr();
  args.lse = lse.data_ptr();
  select_kernels(dtype).forward(args);
}

void run_backward(const Grid& grid, DType dtype, const Operands& in, const Tensor& grad_out, const Tensor& out,
                  const Tensor& lse, const Operands& grad, bool accumulate = false) {
  const Tensor grad_out_last = channels_last(grad_out, grid), out_last = channels_last(out, grid);
  Tensor delta = torch::stable::empty_like(lse);
  auto args = arguments<BackwardArgs>(grid, dtype, in, out_last);
  args.grad_out = reference(grad_out_last, grid);
  args.grad_query = grad.query;
  args.grad_key = grad.key;
  args.grad_value = grad.value;
  args.lse = lse.data_ptr();
  args.delta = delta.data_ptr();
  args.delta_first = args.out.data == grad.value.data;
  args.accumulate = accumulate;
  select_kernels(dtype).backward(args);
}

Operands separate(const Tensor& query, const Tensor& key, const Tensor& value, const Grid& grid) {
  return {reference(query, grid), reference(key, grid), reference(value, grid), query.size(1), value.size(1)};
}

// A tensor that a result is written to: all or some channels of a channels-last one.
void check_result(const Tensor& result, const Tensor& query, int64_t channels, const char* name) {
  check_alike(result, query, name);
  require(result.size(1) == channels, name, " must have ", channels, " channels, got ", result.size(1), ".");
  require(result.stride(1) == 1 || channels == 1, name, " must be channels-last in memory.");
}

Tensor forward_into(Tensor query, Tensor key, Tensor value, Tensor out) {
  const Grid grid = checked_grid(query, key, value);
  check_result(out, query, value.size(1), "out");
  Tensor lse = empty_statistic(query);
  if (lse.numel() > 0) {
    query = channels_last(query, grid);
    key = channels_last(key, grid);
    value = channels_last(value, grid);
    run_forward(grid, kernel_dtype(query), separate(query, key, value, grid), out, lse);
  }
  return lse;
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value) {
  checked_grid(query, key, value);  // before its sizes are read
  Tensor out = empty_channels_last(value, value.size(1));
  const Tensor lse = forward_into(query, key, value, out);
  return {out, lse};
}

// grad_value may be the memory of out; grad_query and grad_key are added to if so asked.
void backward_into(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_query,
                   Tensor grad_key, Tensor grad_value, bool accumulate) {
  const Grid grid = checked_grid(query, key, value);
  check_backward(query, value.size(1), grad_out, out, lse, grid);
  check_result(grad_query, query, query.size(1), "grad_query");
  check_result(grad_key, query, query.size(1), "grad_key");
  check_result(grad_value, query, value.size(1), "grad_value");
  if (lse.numel() == 0) return;
  query = channels_last(query, grid);
  key = channels_last(key, grid);
  value = channels_last(value, grid);
  run_backward(grid, kernel_dtype(query), separate(query, key, value, grid), grad_out, out, lse,
               separate(grad_query, grad_key, grad_value, grid), accumulate);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,
                                            Tensor lse) {
  checked_grid(query, key, value);
  Tensor grad_query = empty_channels_last(query, query.size(1));
  Tensor grad_key = empty_channels_last(key, key.size(1));
  Tensor grad_value = empty_channels_last(value, value.size(1));
  backward_into(grad_out, query, key, value, out, lse, grad_query, grad_key, grad_value, false);
  return {grad_query, grad_key, grad_value};
}

// (B, 2C' + C, *S) in channels-last memory as query, key and value.
Operands side_by_side(const Tensor& packed, int64_t qk_channels, const Grid& grid) {
  return {reference(packed, grid), reference(packed, grid, qk_channels), reference(packed, grid, 2 * qk_channels),
          qk_channels, packed.size(1) - 2 * qk_channels};
}

std::tuple<Tensor, Tensor> packed_forward(Tensor packed, int64_t key_channels) {
  const Grid grid = checked_packed_grid(packed, key_channels);
  Tensor out = empty_channels_last(packed, packed.size(1) - 2 * key_channels);
  Tensor lse = empty_statistic(packed);
  if (lse.numel() > 0) {
    packed = channels_last(packed, grid);
    run_forward(grid, kernel_dtype(packed), side_by_side(packed, key_channels, grid), out, lse);
  }
  return {out, lse};
}

Tensor packed_backward(Tensor grad_out, Tensor packed, int64_t key_channels, Tensor out, Tensor lse) {
  const Grid grid = checked_packed_grid(packed, key_channels);
  check_backward(packed, packed.size(1) - 2 * key_channels, grad_out, out, lse, grid);
  Tensor grad_packed = empty_channels_last(packed, packed.size(1));
  if (lse.numel() > 0) {
    packed = channels_last(packed, grid);
    run_backward(grid, kernel_dtype(packed), side_by_side(packed, key_channels, grid), grad_out, out, lse,
                 side_by_side(grad_packed, key_channels, grid));
  }
  return grad_packed;
}

// A channels-last copy.
Tensor to_channels_last(Tensor x) {
  require(x.is_cpu() && is_map(x), "x must be a CPU tensor (B, C, *S) with one to three spatial axes.");
  return copy_channels_last(x, grid_of(x));
}

// Which kernels run for this dtype ("avx512", ...): for collect_env, tests and the benchmark.
std::string instruction_set(std::string dtype) {
  if (dtype == "bfloat16") return select_kernels(DType::kBFloat16).name;
  if (dtype == "float64") return select_kernels(DType::kDouble).name;
  return select_kernels(DType::kFloat).name;
}

}  // namespace
}  // namespace cpu
}  // namespace ccnet

STABLE_TORCH_LIBRARY(ccnet_d2, m) {
  m.def("criss_cross_forward(Tensor query, Tensor key, Tensor value) -> (Tensor out, Tensor lse)");
  m.def(
      "criss_cross_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def("criss_cross_forward_into(Tensor query, Tensor key, Tensor value, Tensor(a!) out) -> Tensor");
  m.def(
      "criss_cross_backward_into(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, bool accumulate) -> ()");
  m.def("criss_cross_packed_forward(Tensor packed, int key_channels) -> (Tensor out, Tensor lse)");
  m.def(
      "criss_cross_packed_backward(Tensor grad_out, Tensor packed, int key_channels, Tensor out, Tensor lse) -> "
      "Tensor");
  m.def("to_channels_last(Tensor x) -> Tensor");
  m.def("use_huge_pages(Tensor(a!) x) -> ()");
  m.def("cpu_instruction_set(str dtype) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CPU, m) {
  m.impl("criss_cross_forward", TORCH_BOX(&ccnet::cpu::forward));
  m.impl("criss_cross_backward", TORCH_BOX(&ccnet::cpu::backward));
  m.impl("criss_cross_forward_into", TORCH_BOX(&ccnet::cpu::forward_into));
  m.impl("criss_cross_backward_into", TORCH_BOX(&ccnet::cpu::backward_into));
  m.impl("criss_cross_packed_forward", TORCH_BOX(&ccnet::cpu::packed_forward));
  m.impl("criss_cross_packed_backward", TORCH_BOX(&ccnet::cpu::packed_backward));
  m.impl("to_channels_last", TORCH_BOX(&ccnet::cpu::to_channels_last));
  m.impl("use_huge_pages", TORCH_BOX(&ccnet::cpu::use_huge_pages_if_new));
}

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&ccnet::cpu::instruction_set));
}
