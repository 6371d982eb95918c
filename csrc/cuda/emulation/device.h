// device.h on the emulated machine. Fragment layouts are those of the PTX manual (ldmatrix, mma.m16n8k16), written out
// element by element and independently of how the kernels use them.
#pragma once

#include "machine.h"

#define CCNET_UNROLL
#define CCNET_UNROLL_BY(n)
#define CCNET_DEVICE inline
#define CCNET_KERNEL(threads, blocks_per_sm) inline

namespace ccnet {
namespace cuda {

inline emulation::Machine& machine() { return *emulation::Machine::current(); }

inline int thread_index() { return machine().thread(); }
inline int64_t block_index() { return machine().block(); }
inline void barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  machine().barrier({file, line});
}
inline int recompute(int v) { return v; }
inline char* dynamic_shared() { return machine().shared(); }

inline float bits_to_float(uint32_t v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t v;
  memcpy(&v, &f, 4);
  return v;
}

template <typename T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline BFloat16 from_float<BFloat16>(float v) {
  const uint32_t bits = float_to_bits(v);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
// Round to nearest, ties to even, from the definition of the format.
template <>
inline Half from_float<Half>(float v) {
  const uint16_t sign = static_cast<uint16_t>(float_to_bits(v) >> 16 & 0x8000);
  if (v != v) return {0x7fff};
  const double magnitude = fabs(static_cast<double>(v));
  if (magnitude >= 65520.0) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = magnitude < 6.103515625e-05 ? -14 : ilogb(magnitude);
  double scaled = nearbyint(ldexp(magnitude, 10 - exponent));
  if (scaled >= 2048.0) {
    scaled /= 2;
    ++exponent;
  }
  const uint32_t units = static_cast<uint32_t>(scaled);
  const uint32_t bits = units < 1024 ? units : (static_cast<uint32_t>(exponent + 15) << 10) + (units - 1024);
  return {static_cast<uint16_t>(sign | bits)};
}

template <typename T>
float to_float(T v);
template <>
inline float to_float<float>(float v) {
  return v;
}
template <>
inline float to_float<BFloat16>(BFloat16 v) {
  return bits_to_float(static_cast<uint32_t>(v.bits) << 16);
}
inline float half_value(int bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double magnitude;
  if (exponent == 31) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = ldexp(fraction, -24);
  } else {
    magnitude = ldexp(1024 + fraction, exponent - 25);
  }
  return static_cast<float>(bits & 0x8000 ? -magnitude : magnitude);
}
template <>
inline float to_float<Half>(Half v) {
  static const std::vector<float> values = [] {
    std::vector<float> all(65536);
    for (int bits = 0; bits < 65536; ++bits) all[static_cast<size_t>(bits)] = half_value(bits);
    return all;
  }();
  return values[v.bits];
}

template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline int uniform(int v) {
  machine().collective(140, &v, [](emulation::Machine&, void* const* operands) {
    for (int lane = 1; lane < 32; ++lane) {
      if (*static_cast<int*>(operands[lane]) != *static_cast<int*>(operands[0])) {
        throw emulation::Error("uniform() of values that differ between the lanes of a warp");
      }
    }
  });
  return v;
}

inline float shuffle_xor(float v, int mask) {
  struct Operand {
    float value;
    int mask;
    float result;
  } operand{v, mask, 0.f};
  machine().collective(100 + mask, &operand, [](emulation::Machine& m, void* const* operands) {
    const int shift = m.options().fault == emulation::Fault::kShuffleNeighbour ? 1 : 0;
    for (int lane = 0; lane < 32; ++lane) {
      Operand& to = *static_cast<Operand*>(operands[lane]);
      to.result = static_cast<Operand*>(operands[((lane ^ to.mask) + shift) % 32])->value;
    }
  });
  return operand.result;
}

struct MatrixLoad {
  const char* row;
  uint32_t* words;
  int thread;
};

// Element (r, c) of 8x8 matrix i lies at the address that lane 8 i + r passed, plus 2 c bytes.
template <bool transposed>
void run_matrix_loads(emulation::Machine& m, void* const* operands) {
  void* rows[32];
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixLoad& load = *static_cast<MatrixLoad*>(operands[lane]);
    rows[lane] = const_cast<char*>(load.row);
    m.shared_access(load.row, 16, false, load.thread);
  }
  m.count_matrix_rows(rows);
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t* const words = static_cast<MatrixLoad*>(operands[lane])->words;
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int r = transposed ? 2 * (lane % 4) + e : lane / 4;
        const int c = transposed ? lane / 4 : 2 * (lane % 4) + e;
        memcpy(&pair[e], static_cast<const char*>(rows[8 * i + r]) + 2 * c, 2);
      }
      words[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    if (m.options().fault == emulation::Fault::kSwapFragments) std::swap(words[1], words[2]);
  }
}
inline void load_matrices(uint32_t (&r)[4], const char* row) {
  MatrixLoad load{row, r, machine().cluster_thread()};
  machine().collective(1, &load, run_matrix_loads<false>);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const char* row) {
  MatrixLoad load{row, r, machine().cluster_thread()};
  machine().collective(2, &load, run_matrix_loads<true>);
}

struct Mma {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
void run_mma(emulation::Machine& m, void* const* operands) {
  const auto half_of = [](uint32_t word, int e) {
    return to_float<T>(T{static_cast<uint16_t>(e == 0 ? word : word >> 16)});
  };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& op = *static_cast<Mma*>(operands[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {  // a_i: row = group (+ 8 for 2 <= i < 4 and i >= 6), column (+ 8 for i >= 4)
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      if (m.options().fault == emulation::Fault::kTransposeMma) {
        a[column][row] = half_of(op.a[i / 2], i % 2);
      } else {
        a[row][column] = half_of(op.a[i / 2], i % 2);
      }
    }
    for (int i = 0; i < 4; ++i) b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = half_of(op.b[i / 2], i % 2);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& op = *static_cast<Mma*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
      float sum = op.c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];  // a product of 16-bit numbers is exact
      op.c[i] = sum;
    }
  }
}
template <typename T>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma op{c, a, {b0, b1}};
  machine().collective(3, &op, run_mma<T>);
}

inline void run_mma_tf32(emulation::Machine& m, void* const* operands) {
  // The machine reads no more than 19 bits.
  const auto value_of = [](uint32_t word) { return bits_to_float(word & 0xffffe000u); };
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& op = *static_cast<Mma*>(operands[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {  // a_i: row = group (+ 8 for odd i), column = in_group (+ 4 for i >= 2)
      const int row = group + (i % 2 == 1 ? 8 : 0), column = in_group + (i >= 2 ? 4 : 0);
      if (m.options().fault == emulation::Fault::kTransposeMma && row < 8) {
        a[column][row] = value_of(op.a[i]);
      } else {
        a[row][column] = value_of(op.a[i]);
      }
    }
    for (int i = 0; i < 2; ++i) b[in_group + 4 * i][group] = value_of(op.b[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& op = *static_cast<Mma*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
      float sum = op.c[i];
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];  // a product of such numbers is exact
      op.c[i] = sum;
    }
  }
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  for (float& sum : c) sum = 0.f;
  Mma op{c, a, {b0, b1}};
  machine().collective(5, &op, run_mma_tf32);
}
inline void multiply_accumulate_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma op{c, a, {b0, b1}};
  machine().collective(5, &op, run_mma_tf32);
}

inline void copy_async(char* shared, const void* global, int bytes) { machine().copy_async(shared, global, bytes); }
inline void wait_copies() { machine().wait_copies(); }

template <typename V>
V load_shared(const char* p) {
  machine().shared_access(p, sizeof(V), false, machine().cluster_thread());
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
void store_shared(char* p, V v) {
  machine().shared_access(p, sizeof(V), true, machine().cluster_thread());
  memcpy(p, &v, sizeof(V));
}
template <typename V>
V load_global(const V* p) {
  machine().global_access(p, sizeof(V), false);
  return *p;
}
template <typename V>
void store_global(V* p, V v) {
  machine().global_access(p, sizeof(V), true);
  *p = v;
}

}  // namespace cuda
}  // namespace ccnet
