#include "tensors.h"

#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ccnet {
namespace cpu {
namespace {

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
  require(rank >= 0, "CCNET_CPU_ISA=", wanted,
          " is unknown: choose portable, avx2, avx512, avx512_bf16 or amx.");
  return rank;
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
  if (last < first + 3 * huge) return;  // smaller tensors would hold more memory than they use
  if (madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) != 0) return;
  torch::stable::parallel_for(0, static_cast<int64_t>((last - first) / huge), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) *reinterpret_cast<volatile char*>(first + static_cast<uintptr_t>(i) * huge) = 0;
  });
#else
  (void)t;
#endif
}

}  // namespace

const Kernels& select_kernels(DType dtype) {
  const int cap = isa_cap();
  if (dtype != DType::kDouble) {
    if (cap >= 4) {
      const Kernels* amx = dtype == DType::kBFloat16 ? amx_kernels() : amx_split_kernels();
      if (amx != nullptr) return *amx;
    }
    if (dtype == DType::kBFloat16 && cap >= 3 && avx512bf16_kernels() != nullptr) return *avx512bf16_kernels();
    if (cap >= 2 && avx512_kernels() != nullptr) return *avx512_kernels();
    if (cap >= 1 && avx2_kernels() != nullptr) return *avx2_kernels();
  }
  return *portable_kernels();
}

Tensor empty_channels_last(const Tensor& like, int64_t channels) {
  const Tensor t = empty_positions_first(like, channels, like.scalar_type());
  use_huge_pages(t);
  return with_channels_second(t);
}

void use_huge_pages_if_new(const Tensor& t) {
  // glibc's largest threshold of what it keeps for the next call.
  constexpr int64_t always_new = int64_t(32) << 20;
  if (t.numel() * static_cast<int64_t>(t.element_size()) >= always_new) use_huge_pages(t);
}

Tensor empty_channels_second(const Tensor& like, int64_t channels) {
  const Tensor t = empty_positions_last(like, channels);
  use_huge_pages_if_new(t);
  return t;
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
    default: refuse("criss-cross attention takes float16, bfloat16, float32 or float64.");
  }
}

Tensor copy_channels_last(const Tensor& t, const Grid& grid) {
  const Tensor copy = empty_channels_last(t, t.size(1));
  if (t.numel() == 0) return copy;
  CopyArgs args{};
  args.grid = grid;
  args.channels = t.size(1);
  args.dtype = kernel_dtype(t);
  args.from = reference(t, grid);
  args.to = reference(copy, grid);
  use_all_threads(&args);
  select_kernels(args.dtype).to_channels_last(args);
  return copy;
}

Tensor channels_last(const Tensor& t, const Grid& grid) {
  const bool in_place = t.stride(1) == 1 || t.size(1) == 1 || t.numel() == 0;
  return in_place ? t : copy_channels_last(t, grid);
}

}  // namespace cpu
}  // namespace ccnet
