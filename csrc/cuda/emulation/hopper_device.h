// hopper_device.h on the emulated machine. Layouts and conditions are those of the PTX manual (products.h, boxes.h),
// written independently of how the kernels use them.
#pragma once

#include "machine.h"

#define CCNET_CONSTANT_PARAMETER const

namespace ccnet {
namespace cuda {

using TensorMap = emulation::BoxMap;
using SharedBarrier = uint64_t;

inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(machine().shared_address(p)); }

inline void init_barrier(SharedBarrier* b, int count) {
  machine().init_phase_barrier(reinterpret_cast<const char*>(b), count);
}
inline void fence_barriers() { machine().fence_phase_barriers(); }
inline void arrive(SharedBarrier* b) { machine().arrive(reinterpret_cast<const char*>(b), 0); }
inline void arrive_and_expect(SharedBarrier* b, int bytes) {
  machine().arrive(reinterpret_cast<const char*>(b), bytes);
}
inline void wait_phase(SharedBarrier* b, int parity) {
  machine().wait_phase(reinterpret_cast<const char*>(b), parity);
}

// Results do not depend on cache policies.
inline void load_box(char* panel, const TensorMap* map, int channel, int position, int other0, int other1, int batch,
                     SharedBarrier* b, CachePolicy = CachePolicy::kNormal) {
  machine().load_box(panel, *map, {channel, position, other0, other1, batch}, reinterpret_cast<const char*>(b));
}
inline void store_box(const TensorMap* map, const char* panel, int channel, int position, int other0, int other1,
                      int batch, CachePolicy = CachePolicy::kNormal) {
  machine().store_box(*map, panel, {channel, position, other0, other1, batch});
}
inline void commit_stores() { machine().commit_stores(); }
inline void wait_stores_read() { machine().wait_stores_read(); }
inline void store_global(Segment* p, Segment v, CachePolicy) { store_global(p, v); }
inline void prefetch_map(const TensorMap*) {}

inline int cluster_rank() { return machine().cluster_rank(); }
inline void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  machine().cluster_barrier({file, line});
}
inline void arrive_in_cluster(SharedBarrier* b, int rank) {
  machine().arrive_in_cluster(reinterpret_cast<const char*>(b), rank);
}
inline void wait_phase_in_cluster(SharedBarrier* b, int parity) {
  machine().wait_phase(reinterpret_cast<const char*>(b), parity, true);
}

inline void fence_shared_for_async() { machine().fence_shared_for_async(); }
inline void converge_warp() { machine().converge_warp(); }
inline void named_barrier(int number, int threads, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  machine().named_barrier(number, threads, {file, line});
}

// Row r of 8x8 matrix i goes to the address that lane 8 i + r passed; its elements 2 c and 2 c + 1 come from word i of
// lane 4 r + c.
struct MatrixStore {
  char* row;
  const uint32_t* words;
  int thread;
};
inline void run_matrix_stores(emulation::Machine& m, void* const* operands) {
  void* rows[32];
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixStore& store = *static_cast<MatrixStore*>(operands[lane]);
    rows[lane] = store.row;
    m.shared_access(store.row, 16, true, store.thread);
  }
  m.count_matrix_rows(rows);
  for (int i = 0; i < 4; ++i) {
    for (int r = 0; r < 8; ++r) {
      for (int c = 0; c < 4; ++c) {
        const uint32_t word = static_cast<MatrixStore*>(operands[4 * r + c])->words[i];
        memcpy(static_cast<char*>(rows[8 * i + r]) + 4 * c, &word, 4);
      }
    }
  }
}
inline void store_matrices(char* row, const uint32_t (&r)[4]) {
  MatrixStore store{row, r, machine().cluster_thread()};
  machine().collective(4, &store, run_matrix_stores);
}

inline void allow_next_launch() { machine().allow_next_launch(); }
inline void wait_for_previous_launch() { machine().wait_for_previous_launch(); }

template <int Count>
void claim_registers() {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256, "what setmaxnreg takes");
  machine().share_registers(Count);
}
template <int Count>
void release_registers() {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256, "what setmaxnreg takes");
  machine().share_registers(Count);
}

inline float exp2_rounded(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.f : y;
}

inline void begin_products() { machine().begin_products(); }
inline void commit_products() { machine().commit_products(); }
template <int Pending>
void wait_products() {
  machine().wait_products(Pending);
}
template <int Count>
void hold(float (&)[Count]) {}

template <typename T>
float element_value(uint16_t bits) {
  return to_float<T>(T{bits});
}

template <typename T, int N>
struct WarpgroupProduct {
  static_assert(sizeof(T) == 2 && (N == 64 || N == 104 || N == 128), "the products that hopper_device.h has");

  template <Major A, Major B>
  static void multiply(float (&d)[N / 2], uint64_t a, uint64_t b_matrix, bool add_to) {
    multiply(d, nullptr, a, b_matrix, add_to, A == Major::kOuter, B == Major::kOuter);
  }
  template <Major B>
  static void multiply(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_matrix, bool add_to) {
    multiply(d, a, 0, b_matrix, add_to, false, B == Major::kOuter);
  }

 private:
  static void multiply(float* d, const uint32_t* registers, uint64_t a, uint64_t b, bool add, bool a_outer,
                       bool b_outer) {
    const int kind = N + (registers != nullptr ? 1 : 0) + (a_outer ? 2 : 0) + (b_outer ? 4 : 0);
    const bool transposed = machine().options().fault == emulation::Fault::kTransposeDescriptor;
    machine().multiply(kind, {d, registers, a, b, add}, a_outer != transposed, b_outer != transposed, N,
                       element_value<T>);
  }
};

}  // namespace cuda
}  // namespace ccnet
