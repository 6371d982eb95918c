// What the kernels for compute capability 9.0 ask of the machine beyond device.h: barriers in shared memory, boxes
// copied by the tensor memory accelerator (TMA), products of a warpgroup (wgmma), and launches that overlap. On a GPU
// these are PTX for sm_90a; with CCNET_EMULATION the same kernel sources compile against emulation/hopper_device.h.
//
// Tiles in shared memory are panels (panel.h) at multiples of 1024 bytes: 128-byte rows, the eight 16-byte segments
// of a row permuted by exclusive-or with the row's number. The TMA calls this the 128-byte swizzle and writes it, and
// wgmma reads it.
#pragma once

#include "panel.h"

namespace ccnet {
namespace cuda {

constexpr int kWarpgroup = 128;
constexpr int kPanelAlignment = 1024;

// How an operand of a product lies in its panel.
enum class Major {
  kDepth,  // [row of A, or column of B][depth]: the depth is contiguous
  kOuter,  // [depth][row of A, or column of B]
};

// How soon the L2 cache gives up what an access brings or writes; the numbers that createpolicy answers with for all of
// its bytes. kUnchanged leaves what is there as it is.
enum class CachePolicy : uint64_t {
  kUnchanged = 0x10f0000000000000,
  kFirst = 0x12f0000000000000,
  kLast = 0x14f0000000000000,
  kNormal = 0x16f0000000000000,
};

}  // namespace cuda
}  // namespace ccnet

#if defined(CCNET_EMULATION)
#include "emulation/hopper_device.h"
#else

#include <cuda.h>  // CUtensorMap; nothing of the driver is linked

namespace ccnet {
namespace cuda {

using TensorMap = CUtensorMap;

#define CCNET_CONSTANT_PARAMETER const __grid_constant__

// A barrier in shared memory. A phase ends when `count` threads have arrived and all bytes expected in it have come.
using SharedBarrier = uint64_t;

// By one thread; the others may use it after fence_barriers() and barrier().
CCNET_DEVICE void init_barrier(SharedBarrier* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(b)), "r"(count) : "memory");
}
CCNET_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
CCNET_DEVICE void arrive(SharedBarrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(b)) : "memory");
}
// Arrives, and makes the phase wait for `bytes` more.
CCNET_DEVICE void arrive_and_expect(SharedBarrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, ...; `scope`: of the threads whose work
// before their arrivals is waited for.
#define CCNET_WAIT_PHASE(b, parity, scope) \
  asm volatile( \
      "{\n" \
      ".reg .pred done;\n" \
      "again:\n" \
      "mbarrier.try_wait.parity" scope ".shared::cta.b64 done, [%0], %1;\n" \
      "@done bra finished;\n" \
      "bra again;\n" \
      "finished:\n" \
      "}\n" ::"r"(shared_address(b)), \
      "r"(parity) \
      : "memory")
CCNET_DEVICE void wait_phase(SharedBarrier* b, int parity) { CCNET_WAIT_PHASE(b, parity, ""); }
// Where threads of other CTAs arrive.
CCNET_DEVICE void wait_phase_in_cluster(SharedBarrier* b, int parity) { CCNET_WAIT_PHASE(b, parity, ".acquire.cluster"); }
#undef CCNET_WAIT_PHASE

// CTAs of a cluster run at the same time. The number of this one:
CCNET_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
// A barrier of all threads of the cluster.
CCNET_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}
// Arrives at the barrier of the CTA with this number that has the place of `b`. That CTA must not have ended.
CCNET_DEVICE void arrive_in_cluster(SharedBarrier* b, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(b)),
      "r"(rank)
      : "memory");
}

// Copies the box at coordinates (channel, position, other, other, batch) into a panel; what lies outside the tensor
// becomes zero. Counts the whole box's bytes on the barrier. By one thread.
CCNET_DEVICE void load_box(char* panel, const TensorMap* map, int channel, int position, int other0, int other1,
                           int batch, SharedBarrier* b, CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2], %8;\n" ::"r"(shared_address(panel)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(b)), "r"(channel), "r"(position), "r"(other0),
      "r"(other1), "r"(batch), "l"(static_cast<uint64_t>(policy))
      : "memory");
}
// The inverse: what of a box lies in the tensor is written from a panel, which holds what threads wrote before
// fence_shared_for_async() and a barrier. By one thread, which commits boxes in groups: until wait_stores_read() the panel
// may still be read. Written for the launches to come: nothing in this one may read it.
CCNET_DEVICE void store_box(const TensorMap* map, const char* panel, int channel, int position, int other0, int other1,
                            int batch, CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5, %6}], [%1], %7;\n" ::
          "l"(reinterpret_cast<uint64_t>(map)),
      "r"(shared_address(panel)), "r"(channel), "r"(position), "r"(other0), "r"(other1), "r"(batch),
      "l"(static_cast<uint64_t>(policy))
      : "memory");
}
CCNET_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
CCNET_DEVICE void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }
CCNET_DEVICE void store_global(Segment* p, Segment v, CachePolicy policy) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;\n" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3]), "l"(static_cast<uint64_t>(policy))
               : "memory");
}
CCNET_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// Makes this thread's ordinary writes to shared memory visible to wgmma and the TMA; a barrier must follow.
CCNET_DEVICE void fence_shared_for_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Brings the lanes of a warp together again (the instructions of a warpgroup want whole warps), and orders their
// accesses to shared memory.
CCNET_DEVICE void converge_warp() { __syncwarp(); }

// The inverse of load_matrices(): lane l passes in word i the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of
// matrix i; lane 8 i + r passes the address of row r of matrix i.
CCNET_DEVICE void store_matrices(char* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// A barrier of `threads` threads, numbered 1 to 15.
CCNET_DEVICE void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

// Launches that overlap: the next launch may begin once every CTA of this one has said so (or has ended); what it reads
// of this one's results it reads after wait_for_previous_launch().
CCNET_DEVICE void allow_next_launch() { asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory"); }
CCNET_DEVICE void wait_for_previous_launch() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }

// Moves registers between warpgroups: a kernel's threads begin with equal shares of them. By all warps of a warpgroup;
// `Count` is a multiple of 8. claim_registers() waits until there are so many.
template <int Count>
CCNET_DEVICE void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Count));
}
template <int Count>
CCNET_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Count));
}

// 2^x to within two units in the last place; 0 where that is below the smallest normal number.
CCNET_DEVICE float exp2_rounded(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

CCNET_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
CCNET_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Waits until at most `Pending` committed groups are under way.
template <int Pending>
CCNET_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving accesses to the registers of a product across this place.
template <int Count>
CCNET_DEVICE void hold(float (&r)[Count]) {
  CCNET_UNROLL
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

#define CCNET_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CCNET_D8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define CCNET_D32(d, i) CCNET_D8(d, i), CCNET_D8(d, i + 8), CCNET_D8(d, i + 16), CCNET_D8(d, i + 24)
#define CCNET_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define CCNET_R52 \
  CCNET_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51"
#define CCNET_R64 \
  CCNET_R52 ", " \
            "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = a b, or d += a b where `add`: a 64 rows x 16 deep, b 16 deep x N columns, d in fp32, of which a lane of warp w of
// the warpgroup holds in d[4 j + e] row 16 w + lane / 4 (+ 8 for e >= 2), column 8 j + lane % 4 * 2 + e % 2. Asynchronous:
// begin_products(), products, commit_products(), wait_products().
// Operands in shared memory are given by descriptors, or `a` by registers: a[0..3] = (row lane / 4, depth lane % 4 * 2
// and the next), (row + 8, same), (row, depth + 8), (row + 8, depth + 8), as for mma.m16n8k16.
template <typename T, int N>
struct WarpgroupProduct;

#define CCNET_DEFINE_PRODUCT(T, type, N, D, R, a0, a1, a2, a3, b, add) \
  template <> \
  struct WarpgroupProduct<T, N> { \
    template <Major A, Major B> \
    static CCNET_DEVICE void multiply(float (&d)[N / 2], uint64_t a, uint64_t b_matrix, bool add_to) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" a2 ", 0;\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" R "}, %" a0 ", %" a1 \
                   ", p, 1, 1, %" a3 ", %" b ";\n}\n" \
                   : D \
                   : "l"(a), "l"(b_matrix), "r"(static_cast<int>(add_to)), "n"(A == Major::kOuter ? 1 : 0), \
                     "n"(B == Major::kOuter ? 1 : 0)); \
    } \
    template <Major B> \
    static CCNET_DEVICE void multiply(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_matrix, bool add_to) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" add ", 0;\n" \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" R "}, {%" a0 ", %" a1 ", %" a2 \
                   ", %" a3 "}, %" b ", p, 1, 1, %" CCNET_NEXT_##N ";\n}\n" \
                   : D \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix), "r"(static_cast<int>(add_to)), \
                     "n"(B == Major::kOuter ? 1 : 0)); \
    } \
  };
#define CCNET_NEXT_64 "38"
#define CCNET_NEXT_104 "58"
#define CCNET_NEXT_128 "70"
#define CCNET_D64N CCNET_D32(d, 0)
#define CCNET_D104N CCNET_D32(d, 0), CCNET_D8(d, 32), CCNET_D8(d, 40), CCNET_D4(d, 48)
#define CCNET_D128N CCNET_D32(d, 0), CCNET_D32(d, 32)

CCNET_DEFINE_PRODUCT(Half, "f16", 64, CCNET_D64N, CCNET_R32, "32", "33", "34", "35", "36", "37")
CCNET_DEFINE_PRODUCT(BFloat16, "bf16", 64, CCNET_D64N, CCNET_R32, "32", "33", "34", "35", "36", "37")
CCNET_DEFINE_PRODUCT(Half, "f16", 104, CCNET_D104N, CCNET_R52, "52", "53", "54", "55", "56", "57")
CCNET_DEFINE_PRODUCT(BFloat16, "bf16", 104, CCNET_D104N, CCNET_R52, "52", "53", "54", "55", "56", "57")
CCNET_DEFINE_PRODUCT(Half, "f16", 128, CCNET_D128N, CCNET_R64, "64", "65", "66", "67", "68", "69")
CCNET_DEFINE_PRODUCT(BFloat16, "bf16", 128, CCNET_D128N, CCNET_R64, "64", "65", "66", "67", "68", "69")

#undef CCNET_DEFINE_PRODUCT
#undef CCNET_NEXT_64
#undef CCNET_NEXT_104
#undef CCNET_NEXT_128
#undef CCNET_D64N
#undef CCNET_D104N
#undef CCNET_D128N
#undef CCNET_D4
#undef CCNET_D8
#undef CCNET_D32
#undef CCNET_R32
#undef CCNET_R52
#undef CCNET_R64

}  // namespace cuda
}  // namespace ccnet

#endif  // CCNET_EMULATION

namespace ccnet {
namespace cuda {

// A matrix in a panel, for wgmma: 128-byte swizzle, groups of eight rows 1024 bytes apart. One panel's width (64
// elements) is all that a product takes of it, so that the distance between panels does not matter.
CCNET_DEVICE uint64_t panel_descriptor(const char* p) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kLeading = uint64_t{1} << 16;
  constexpr uint64_t kStride = uint64_t{8 * kRowBytes >> 4} << 32;
  return kSwizzle128 | kStride | kLeading | (shared_address(p) >> 4 & 0x3fff);
}

}  // namespace cuda
}  // namespace ccnet
