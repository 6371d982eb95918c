// What the kernels ask of the machine: thread numbers, barriers, warp collectives, asynchronous copies, tensor-core
// products and memory accesses. On a GPU these are CUDA and PTX (sm_80 and later); with CCNET_EMULATION the same
// kernel sources compile with a host compiler against emulation/device.h, which implements every function below on
// the CPU with the fragment layouts of the PTX manual and checks each access.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../lines.h"

namespace ccnet {
namespace cuda {

// Storage types: 16 bits and no arithmetic of their own.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What one thread moves at a time.
struct alignas(16) Segment {
  uint32_t word[4];
};

constexpr int kWarp = 32;
constexpr float kLog2E = 1.4426950408889634f;

}  // namespace cuda
}  // namespace ccnet

#if defined(CCNET_EMULATION)
#include "emulation/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CCNET_UNROLL _Pragma("unroll")
#define CCNET_UNROLL_BY(n) _Pragma(CCNET_STRING(unroll n))
#define CCNET_STRING(x) #x
#define CCNET_DEVICE __device__ __forceinline__
#define CCNET_KERNEL(threads, blocks_per_sm) __global__ __launch_bounds__(threads, blocks_per_sm)

namespace ccnet {
namespace cuda {

CCNET_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
CCNET_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
CCNET_DEVICE void barrier() { __syncthreads(); }
CCNET_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// A value that is the same for all lanes of a warp, in a way that tells the compiler so. A collective of the warp.
CCNET_DEVICE int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }

// The same value, but computed anew: keeps what follows from it from being hoisted out of a loop, where it would occupy
// registers all along.
CCNET_DEVICE int recompute(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

CCNET_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(1024) char ccnet_dynamic_shared[];
  return ccnet_dynamic_shared;
}

CCNET_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8x8 matrices of 16-bit elements. Lane 8 i + r passes the address of row r of matrix i; lane l receives in
// word i the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i (of its transpose, in the second form).
CCNET_DEVICE void load_matrices(uint32_t (&r)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
CCNET_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b with a 16x16 (row), b 16x8 (col), c 16x8 in fp32.
template <typename T>
CCNET_DEVICE void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
CCNET_DEVICE void multiply_accumulate<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
CCNET_DEVICE void multiply_accumulate<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c = a b, and c += a b, with a 16x8 (row), b 8x8 (col), c 16x8, all in fp32; of a and b the first 19 bits count alone.
CCNET_DEVICE void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%10, %10, %10, %10};\n"
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
CCNET_DEVICE void multiply_accumulate_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies `bytes` (0 to 16) from global to shared memory and fills the rest of the 16 bytes with zeros. Visible to this
// thread after wait_copies(), to the others after the barrier that follows it.
CCNET_DEVICE void copy_async(char* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
CCNET_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

template <typename V>
CCNET_DEVICE V load_shared(const char* p) {
  return *reinterpret_cast<const V*>(p);
}
template <typename V>
CCNET_DEVICE void store_shared(char* p, V v) {
  *reinterpret_cast<V*>(p) = v;
}
template <>
CCNET_DEVICE Segment load_shared<Segment>(const char* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
template <>
CCNET_DEVICE void store_shared<Segment>(char* p, Segment v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

template <typename V>
CCNET_DEVICE V load_global(const V* p) {
  return *p;
}
template <typename V>
CCNET_DEVICE void store_global(V* p, V v) {
  *p = v;
}
template <>
CCNET_DEVICE Segment load_global<Segment>(const Segment* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
template <>
CCNET_DEVICE void store_global<Segment>(Segment* p, Segment v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

CCNET_DEVICE float bits_to_float(uint32_t v) { return __uint_as_float(v); }
CCNET_DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }

template <typename T>
CCNET_DEVICE float to_float(T v);
template <>
CCNET_DEVICE float to_float<float>(float v) {
  return v;
}
template <>
CCNET_DEVICE float to_float<Half>(Half v) {
  return __half2float(__ushort_as_half(v.bits));
}
template <>
CCNET_DEVICE float to_float<BFloat16>(BFloat16 v) {
  return __bfloat162float(__ushort_as_bfloat16(v.bits));
}

template <typename T>
CCNET_DEVICE T from_float(float v);
template <>
CCNET_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
CCNET_DEVICE Half from_float<Half>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}
template <>
CCNET_DEVICE BFloat16 from_float<BFloat16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}

// Two rounded values in one word, `low` in the low half.
template <typename T>
CCNET_DEVICE uint32_t pack(float low, float high);
template <>
CCNET_DEVICE uint32_t pack<Half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(__low2half(v))) |
         static_cast<uint32_t>(__half_as_ushort(__high2half(v))) << 16;
}
template <>
CCNET_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return static_cast<uint32_t>(__bfloat16_as_ushort(__low2bfloat16(v))) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__high2bfloat16(v))) << 16;
}

}  // namespace cuda
}  // namespace ccnet

#endif  // CCNET_EMULATION
