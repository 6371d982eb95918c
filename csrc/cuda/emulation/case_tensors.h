// A case's tensors in memory, with poison around them.
#pragma once

#include <string.h>

#include <random>
#include <vector>

#include "cases.h"

namespace ccnet {
namespace cuda {

// A tensor (B, C, *S), its memory and its exact values in (B, C, *S) order. The memory around it is poison.
template <typename T>
struct Tensor {
  std::vector<T> memory;  // 64 elements of margin on both sides
  T* data = nullptr;      // 16-byte aligned unless the layout is misaligned
  size_t count = 0;
  Strides strides{};
  std::vector<double> values;

  TensorRef ref() { return {data, strides}; }
};

template <typename F>
void for_each_element(const Grid& g, int channels, F f) {
  const int64_t n = g.positions();
  for (int64_t b = 0; b < g.batch; ++b) {
    for (int c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < n; ++p) f(b, c, p, static_cast<size_t>((b * channels + c) * n + p));
    }
  }
}

inline int64_t element_at(const Grid& g, const Strides& s, int64_t b, int c, int64_t p) {
  int64_t offset = b * s.batch + c * s.channel;
  for (int a = g.axes - 1; a >= 0; --a) {
    offset += p % g.size[a] * s.axis[a];
    p /= g.size[a];
  }
  return offset;
}

template <typename T>
Tensor<T> make_tensor(const Grid& g, int channels, Layout layout) {
  Tensor<T> t;
  const int64_t n = g.positions();
  const int shift = layout == Layout::kMisaligned ? 1 : 0;
  if (layout == Layout::kChannelsFirst) {
    t.strides.channel = n;
    t.strides.batch = n * channels;
  } else {
    const int row = layout == Layout::kPadded ? round_up(channels, 8) + 8 : channels;
    t.strides.channel = 1;
    t.strides.batch = layout == Layout::kExpanded ? 0 : n * row;
  }
  int64_t step = layout == Layout::kChannelsFirst ? 1
                 : layout == Layout::kPadded      ? round_up(channels, 8) + 8
                                                  : channels;
  for (int a = g.axes - 1; a >= 0; --a) {
    t.strides.axis[a] = step;
    step *= g.size[a];
  }
  const int64_t last =
      element_at(g, t.strides, g.batch - 1, channels - 1, n - 1);  // strides are not negative
  t.count = static_cast<size_t>(last + 1);
  T poison;
  memset(&poison, 0xff, sizeof(T));
  t.memory.assign(t.count + 128 + 16, poison);
  t.data = t.memory.data() + 64;
  while (reinterpret_cast<uintptr_t>(t.data) % 16 != 0) ++t.data;
  t.data += shift;
  t.values.resize(static_cast<size_t>(g.batch * channels * n));
  return t;
}

template <typename T>
void fill(Tensor<T>& t, const Grid& g, int channels, std::mt19937& random, float scale) {
  std::normal_distribution<float> normal(0.f, scale);
  for_each_element(g, channels, [&](int64_t b, int c, int64_t p, size_t i) {
    T& element = t.data[element_at(g, t.strides, b, c, p)];
    if (!(t.strides.batch == 0 && b > 0)) element = from_float<T>(normal(random));
    t.values[i] = to_float<T>(element);
  });
}

template <typename T>
void read_back(Tensor<T>& t, const Grid& g, int channels) {
  for_each_element(g, channels, [&](int64_t b, int c, int64_t p, size_t i) {
    t.values[i] = to_float<T>(t.data[element_at(g, t.strides, b, c, p)]);
  });
}

// What the kernels are given.
template <typename T>
struct Inputs {
  Tensor<T> query, key, value, grad_out;

  // `scale`: of query and key.
  Inputs(const Case& c, std::mt19937& random, float scale)
      : query(make_tensor<T>(c.grid, c.qk_channels, c.layout)),
        key(make_tensor<T>(c.grid, c.qk_channels, c.layout)),
        value(make_tensor<T>(c.grid, c.channels, c.layout)),
        grad_out(make_tensor<T>(c.grid, c.channels, c.layout)) {
    fill(query, c.grid, c.qk_channels, random, scale);
    fill(key, c.grid, c.qk_channels, random, scale);
    fill(value, c.grid, c.channels, random, 1.f);
    fill(grad_out, c.grid, c.channels, random, 1.f);
  }
};

}  // namespace cuda
}  // namespace ccnet
