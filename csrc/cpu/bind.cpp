// The operators of the CPU library: argument checks, memory, choice of the kernel. LibTorch stable ABI only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <stdlib.h>
#include <string.h>

#include <string>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention.h"

namespace ccnet {
namespace cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Best first. CCNET_CPU_ISA=portable|avx2|avx512|avx512_bf16|amx caps the choice, for tests and for finding faults.
int isa_rank(const char* name) {
  const char* const order[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  for (int i = 0; i < 5; ++i) {
    if (strcmp(order[i], name) == 0) return i;
  }
  return -1;
}

int isa_cap() {
  const char* wanted = getenv("CCNET_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return 4;
  const int rank = isa_rank(wanted);
  STD_TORCH_CHECK(rank >= 0, "CCNET_CPU_ISA=", wanted, " is unknown: choose portable, avx2, avx512, avx512_bf16 or amx.");
  return rank;
}

const Kernels& select_kernels(DType dtype) {
  const int cap = isa_cap();
  if (dtype != DType::kDouble) {
    if (dtype == DType::kBFloat16 && cap >= 4 && amx_kernels() != nullptr) return *amx_kernels();
    if (dtype == DType::kBFloat16 && cap >= 3 && avx512bf16_kernels() != nullptr) return *avx512bf16_kernels();
    if (cap >= 2 && avx512_kernels() != nullptr) return *avx512_kernels();
    if (cap >= 1 && avx2_kernels() != nullptr) return *avx2_kernels();
  }
  return *portable_kernels();
}

void parallel(int workers, void (*fn)(void*, int), void* ctx) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) fn(ctx, static_cast<int>(w));
  });
}

DType kernel_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Half: return DType::kHalf;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Double: return DType::kDouble;
    default: STD_TORCH_CHECK(false, "criss-cross attention takes float16, bfloat16, float32 or float64.");
  }
}

// t from channel `first` on.
TensorRef reference(const Tensor& t, const Grid& grid, int64_t first = 0) {
  TensorRef r{};
  r.data = static_cast<char*>(t.data_ptr()) + first * t.stride(1) * t.element_size();
  r.strides.batch = t.stride(0);
  r.strides.channel = t.stride(1);
  for (int a = 0; a < grid.axes; ++a) r.strides.axis[a] = t.stride(2 + a);
  return r;
}

Tensor empty_channels_last(const Tensor& like, int64_t channels);

// The tensor itself where its channels lie one beside the other, else a channels-last copy.
Tensor channels_last(const Tensor& t, const Grid& grid) {
  if (t.stride(1) == 1 || t.size(1) == 1 || t.numel() == 0) return t;
  Tensor copy = empty_channels_last(t, t.size(1));
  CopyArgs args{};
  args.grid = grid;
  args.channels = t.size(1);
  args.dtype = kernel_dtype(t);
  args.from = reference(t, grid);
  args.to = reference(copy, grid);
  args.workers = static_cast<int>(torch::stable::get_num_threads());
  args.parallel = parallel;
  select_kernels(args.dtype).to_channels_last(args);
  return copy;
}

void check_alike(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor.");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of query.");
  STD_TORCH_CHECK(t.dim() == like.dim() && t.size(0) == like.size(0), name, " must have the batch size of query.");
  for (int64_t d = 2; d < like.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) == like.size(d), name, " must have the spatial sizes of query.");
  }
}

Grid checked_grid(const Tensor& query, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(query.dim() >= 3 && query.dim() <= 2 + kMaxAxes,
                  "query must be (B, C', *S) with one to three spatial axes.");
  check_alike(query, query, "query");
  check_alike(key, query, "key");
  check_alike(value, query, "value");
  STD_TORCH_CHECK(key.size(1) == query.size(1), "key must have the channels of query.");
  Grid grid{};
  grid.batch = query.size(0);
  grid.axes = static_cast<int>(query.dim()) - 2;
  for (int a = 0; a < grid.axes; ++a) grid.size[a] = query.size(2 + a);
  return grid;
}

// Nothing depends on it: lines along the slow axes touch a page for every position, and first touching a large result
// in 4 KiB pages costs as much as a good part of the arithmetic. The huge pages are touched here, each by one thread:
// along those lines all threads would come to the same page at once, and the system would clear it for each of them.
void use_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  if (last <= first || madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) != 0) return;
  torch::stable::parallel_for(0, static_cast<int64_t>((last - first) / huge), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) *reinterpret_cast<volatile char*>(first + static_cast<uintptr_t>(i) * huge) = 0;
  });
#else
  (void)t;
#endif
}

// An uninitialised (B, channels, *S) tensor in channels-last memory.
Tensor empty_channels_last(const Tensor& like, int64_t channels) {
  int64_t sizes[2 + kMaxAxes];
  const int64_t dims = like.dim();
  sizes[0] = like.size(0);
  for (int64_t d = 2; d < dims; ++d) sizes[d - 1] = like.size(d);
  sizes[dims - 1] = channels;
  Tensor t = torch::stable::new_empty(like, {sizes, static_cast<size_t>(dims)});
  use_huge_pages(t);
  for (int64_t d = dims - 1; d > 1; --d) t = torch::stable::transpose(t, d - 1, d);
  return t;
}

// An uninitialised (B, *S) tensor of fp32, or fp64 for fp64 inputs.
Tensor empty_statistic(const Tensor& like) {
  int64_t sizes[1 + kMaxAxes];
  sizes[0] = like.size(0);
  for (int64_t d = 2; d < like.dim(); ++d) sizes[d - 1] = like.size(d);
  const ScalarType dtype = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(like, {sizes, static_cast<size_t>(like.dim() - 1)}, dtype);
}

// Where the operands of one call begin: three tensors, or one that holds them side by side.
struct Operands {
  TensorRef query, key, value;
  int64_t qk_channels, channels;
};

void run_forward(const Grid& grid, DType dtype, const Operands& in, const Tensor& out, const Tensor& lse) {
  Tensor max = torch::stable::empty_like(lse);
  ForwardArgs args{};
  args.grid = grid;
  args.qk_channels = in.qk_channels;
  args.channels = in.channels;
  args.dtype = dtype;
  args.query = in.query;
  args.key = in.key;
  args.value = in.value;
  args.out = reference(out, grid);
  args.max = max.data_ptr();
  args.lse = lse.data_ptr();
  args.workers = static_cast<int>(torch::stable::get_num_threads());
  args.parallel = parallel;
  select_kernels(dtype).forward(args);
}

void run_backward(const Grid& grid, DType dtype, const Operands& in, const Tensor& grad_out, const Tensor& out,
                  const Tensor& lse, const Operands& grad) {
  const Tensor grad_out_last = channels_last(grad_out, grid), out_last = channels_last(out, grid);
  Tensor delta = torch::stable::empty_like(lse);
  BackwardArgs args{};
  args.grid = grid;
  args.qk_channels = in.qk_channels;
  args.channels = in.channels;
  args.dtype = dtype;
  args.query = in.query;
  args.key = in.key;
  args.value = in.value;
  args.out = reference(out_last, grid);
  args.grad_out = reference(grad_out_last, grid);
  args.grad_query = grad.query;
  args.grad_key = grad.key;
  args.grad_value = grad.value;
  args.lse = lse.data_ptr();
  args.delta = delta.data_ptr();
  args.workers = static_cast<int>(torch::stable::get_num_threads());
  args.parallel = parallel;
  select_kernels(dtype).backward(args);
}

Operands separate(const Tensor& query, const Tensor& key, const Tensor& value, const Grid& grid) {
  return {reference(query, grid), reference(key, grid), reference(value, grid), query.size(1), value.size(1)};
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value) {
  const Grid grid = checked_grid(query, key, value);
  Tensor out = empty_channels_last(value, value.size(1));
  Tensor lse = empty_statistic(query);
  if (lse.numel() > 0) {
    query = channels_last(query, grid);
    key = channels_last(key, grid);
    value = channels_last(value, grid);
    run_forward(grid, kernel_dtype(query), separate(query, key, value, grid), out, lse);
  }
  return {out, lse};
}

void check_backward(const Tensor& like, int64_t channels, const Tensor& grad_out, const Tensor& out, const Tensor& lse,
                    const Grid& grid) {
  check_alike(grad_out, like, "grad_out");
  check_alike(out, like, "out");
  STD_TORCH_CHECK(grad_out.size(1) == channels && out.size(1) == channels,
                  "grad_out and out must have the channels of value.");
  STD_TORCH_CHECK(lse.is_contiguous() && lse.numel() == grid.batch * grid.positions(),
                  "lse must be the one that the forward pass returned.");
}

// The gradient of value goes into grad_value, which may be some channels of a larger channels-last tensor.
std::tuple<Tensor, Tensor> backward_into(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,
                                         Tensor lse, Tensor grad_value) {
  const Grid grid = checked_grid(query, key, value);
  check_backward(query, value.size(1), grad_out, out, lse, grid);
  check_alike(grad_value, query, "grad_value");
  STD_TORCH_CHECK(grad_value.size(1) == value.size(1), "grad_value must have the channels of value.");
  STD_TORCH_CHECK(grad_value.stride(1) == 1 || grad_value.size(1) == 1, "grad_value must be channels-last in memory.");
  Tensor grad_query = empty_channels_last(query, query.size(1));
  Tensor grad_key = empty_channels_last(key, key.size(1));
  if (lse.numel() > 0) {
    query = channels_last(query, grid);
    key = channels_last(key, grid);
    value = channels_last(value, grid);
    run_backward(grid, kernel_dtype(query), separate(query, key, value, grid), grad_out, out, lse,
                 separate(grad_query, grad_key, grad_value, grid));
  }
  return {grad_query, grad_key};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out,
                                            Tensor lse) {
  Tensor grad_value = empty_channels_last(value, value.size(1));
  const auto [grad_query, grad_key] = backward_into(grad_out, query, key, value, out, lse, grad_value);
  return {grad_query, grad_key, grad_value};
}

// (B, 2C' + C, *S) in channels-last memory as query, key and value.
Operands side_by_side(const Tensor& packed, int64_t qk_channels, const Grid& grid) {
  return {reference(packed, grid), reference(packed, grid, qk_channels), reference(packed, grid, 2 * qk_channels),
          qk_channels, packed.size(1) - 2 * qk_channels};
}

Grid checked_packed_grid(const Tensor& packed, int64_t qk_channels) {
  const Grid grid = checked_grid(packed, packed, packed);
  STD_TORCH_CHECK(qk_channels >= 1 && packed.size(1) > 2 * qk_channels,
                  "packed must have 2 key_channels + C channels, got ", packed.size(1), " channels and key_channels=",
                  qk_channels, ".");
  return grid;
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
  m.def(
      "criss_cross_backward_into(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor(a!) grad_value) -> (Tensor grad_query, Tensor grad_key)");
  m.def("criss_cross_packed_forward(Tensor packed, int key_channels) -> (Tensor out, Tensor lse)");
  m.def(
      "criss_cross_packed_backward(Tensor grad_out, Tensor packed, int key_channels, Tensor out, Tensor lse) -> Tensor");
  m.def("cpu_instruction_set(str dtype) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CPU, m) {
  m.impl("criss_cross_forward", TORCH_BOX(&ccnet::cpu::forward));
  m.impl("criss_cross_backward", TORCH_BOX(&ccnet::cpu::backward));
  m.impl("criss_cross_backward_into", TORCH_BOX(&ccnet::cpu::backward_into));
  m.impl("criss_cross_packed_forward", TORCH_BOX(&ccnet::cpu::packed_forward));
  m.impl("criss_cross_packed_backward", TORCH_BOX(&ccnet::cpu::packed_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&ccnet::cpu::instruction_set));
}
