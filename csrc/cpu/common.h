// What every kernel_*.cpp includes before it chooses its instruction set: no function of these headers may be
// compiled for a newer processor than the build's baseline.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <initializer_list>
#include <limits>
#include <new>
#include <type_traits>

#include "attention.h"

#if defined(__clang__)
#define CCNET_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define CCNET_UNROLL _Pragma("GCC unroll 16")
#else
#define CCNET_UNROLL
#endif

// Of lambdas.
#if defined(__GNUC__) || defined(__clang__)
#define CCNET_INLINE __attribute__((always_inline))
#else
#define CCNET_INLINE
#endif

#if defined(__GNUC__) || defined(__clang__)
#define CCNET_PREFETCH(p) __builtin_prefetch((p), 0, 2)
#else
#define CCNET_PREFETCH(p) (void)(p)
#endif

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define CCNET_X86_DISPATCH 1
#endif

// CCNET_LEAVE_OUT_KERNEL, set by setup.py where the compiler does not know a kernel's instructions, leaves only the
// function that says so.

// Where softmax weights in fp32 end: exp of less is 0. Beside the largest weight 1e-24 is nothing, while numbers near or
// below the smallest normal one cost the processor hundreds of cycles, here and in the products that follow.
constexpr float kLeastExponent = -55.0f;

namespace ccnet {
namespace cpu {

// The plain kernels, but for the two passes.
inline Kernels with_passes(const char* name, void (*forward)(const ForwardArgs&),
                           void (*backward)(const BackwardArgs&), Kernels plain) {
  plain.name = name;
  plain.forward = forward;
  plain.backward = backward;
  return plain;
}

#if defined(CCNET_X86_DISPATCH)
// Kernels whose products of fp32 on vector units pay unless the processor is Intel's, whose library PyTorch's products
// are: on others' processors it is slower, and keeps to vectors of 256 bits where there are longer ones.
inline Kernels paying_where_not_intel(Kernels kernels) {
  __builtin_cpu_init();
  kernels.matmul_pays = !__builtin_cpu_is("intel");
  return kernels;
}
#endif

}  // namespace cpu
}  // namespace ccnet
