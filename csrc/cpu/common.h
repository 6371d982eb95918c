// What every kernel_*.cpp includes before it chooses its instruction set: no function of these headers may be
// compiled for a newer processor than the build's baseline.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <initializer_list>
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

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define CCNET_X86_DISPATCH 1
#endif

// CCNET_LEAVE_OUT_KERNEL, set by setup.py where the compiler does not know a kernel's instructions, leaves only the
// function that says so.

#if defined(__GNUC__) || defined(__clang__)
#define CCNET_PREFETCH(p) __builtin_prefetch((p), 0, 2)
#else
#define CCNET_PREFETCH(p) (void)(p)
#endif
