// Geometry of criss-cross attention, shared by the CPU and the CUDA kernels.
//
// A tensor (B, C, *S) with one to three spatial axes is seen as sets of lines: along axis a there are
// B * N / S_a lines of S_a positions each. A position attends to every position of the lines it lies on. Each of
// its lines contains the position itself, so that all but the last axis mask it (self is counted once).
// Nothing here assumes a memory layout: tensors are described by element strides, so that channels-first,
// channels-last, sliced and expanded tensors are all read in place.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define CCNET_HD __host__ __device__ __forceinline__
#else
#define CCNET_HD inline
#endif

namespace ccnet {

constexpr int kMaxAxes = 3;

// Sizes of one call: batch B, spatial sizes S_0 .. S_{axes-1}.
struct Grid {
  int64_t batch;
  int axes;
  int64_t size[kMaxAxes];

  // N, the number of positions of one image.
  CCNET_HD int64_t positions() const {
    int64_t n = 1;
    for (int a = 0; a < axes; ++a) n *= size[a];
    return n;
  }
  // Number of lines along `axis` over the whole batch.
  CCNET_HD int64_t lines(int axis) const {
    int64_t n = batch;
    for (int a = 0; a < axes; ++a) n *= (a == axis) ? 1 : size[a];
    return n;
  }
};

// Element strides of a (B, C, *S) tensor; a tensor without channels (the softmax statistics) has channel = 0.
struct Strides {
  int64_t batch;
  int64_t channel;
  int64_t axis[kMaxAxes];
};

// A (B, C, *S) tensor; `data` points at its first element.
struct TensorRef {
  void* data;
  Strides strides;
};

// A (B, C, N) map, N the positions: strides in numbers; channels or positions lie side by side.
struct FlatMap {
  void* data;
  int64_t batch, channel, position;
};

// Strides of a dense (B, *S) tensor: one scalar per position.
CCNET_HD Strides scalar_strides(const Grid& g) {
  Strides s{};
  int64_t step = 1;
  for (int a = g.axes - 1; a >= 0; --a) {
    s.axis[a] = step;
    step *= g.size[a];
  }
  s.batch = step;
  s.channel = 0;
  return s;
}

// Element offset of the first position (channel 0) of line number `line` along `axis`. Lines are numbered with the
// remaining axes in row-major order (last axis fastest) and the batch slowest; position i of the line lies
// i * s.axis[axis] elements further.
CCNET_HD int64_t line_offset(const Grid& g, const Strides& s, int axis, int64_t line) {
  int64_t offset = 0;
  for (int a = g.axes - 1; a >= 0; --a) {
    if (a == axis) continue;
    offset += (line % g.size[a]) * s.axis[a];
    line /= g.size[a];
  }
  return offset + line * s.batch;
}

// Self is kept on the last axis only.
CCNET_HD bool keeps_self(int axes, int axis) { return axis == axes - 1; }

// Whether query i and key j of one line along `axis` are masked (energy -inf).
CCNET_HD bool is_masked(int axes, int axis, int64_t i, int64_t j) { return i == j && !keeps_self(axes, axis); }

// Softmax statistics of one position over the keys seen so far: the largest energy and sum_j exp(S_j - max).
// An empty set (a fully masked line: the axis has size 1) is max = -inf, sum = 0.
template <typename T>
struct Stats {
  T max;
  T sum;
};

template <typename T>
CCNET_HD Stats<T> empty_stats() {
  return {static_cast<T>(-INFINITY), T(0)};
}

// Result of joining two disjoint key sets: the joint statistics, and the factors that bring values accumulated as
// sum_j exp(S_j - max_of_that_set) V_j to the joint maximum. exp(-inf - -inf) is NaN, therefore the guards.
template <typename T>
struct Merge {
  Stats<T> stats;
  T scale_a;
  T scale_b;
};

template <typename T>
CCNET_HD Merge<T> merge(const Stats<T>& a, const Stats<T>& b) {
  Merge<T> m;
  m.stats.max = a.max > b.max ? a.max : b.max;
  m.scale_a = a.sum > T(0) ? static_cast<T>(exp(a.max - m.stats.max)) : T(0);
  m.scale_b = b.sum > T(0) ? static_cast<T>(exp(b.max - m.stats.max)) : T(0);
  m.stats.sum = a.sum * m.scale_a + b.sum * m.scale_b;
  return m;
}

// log sum_j exp(S_j); -inf for an empty set.
template <typename T>
CCNET_HD T log_sum_exp(const Stats<T>& s) {
  return s.sum > T(0) ? s.max + static_cast<T>(log(s.sum)) : static_cast<T>(-INFINITY);
}

}  // namespace ccnet
