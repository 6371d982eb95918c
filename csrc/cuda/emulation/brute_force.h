// Criss-cross attention and its gradients in float64, from the definition.
#pragma once

#include <math.h>

#include <algorithm>
#include <vector>

#include "cases.h"

namespace ccnet {
namespace cuda {

// Whether positions p and q of a grid differ along at most one axis.
inline bool share_a_line(const Grid& g, int64_t p, int64_t q) {
  int different = 0;
  for (int a = g.axes - 1; a >= 0; --a) {
    different += p % g.size[a] != q % g.size[a];
    p /= g.size[a];
    q /= g.size[a];
  }
  return different <= 1;
}

struct Expected {
  std::vector<double> out, lse, grad_query, grad_key, grad_value;
};

// From the definition: every position attends to those that differ from it along at most one axis.
inline Expected brute_force(const Case& c, const std::vector<double>& q, const std::vector<double>& k,
                     const std::vector<double>& v, const std::vector<double>& grad_out) {
  const Grid& g = c.grid;
  const int64_t n = g.positions();
  Expected e;
  e.out.assign(v.size(), 0);
  e.grad_value.assign(v.size(), 0);
  e.grad_query.assign(q.size(), 0);
  e.grad_key.assign(q.size(), 0);
  e.lse.assign(static_cast<size_t>(g.batch * n), 0);
  const auto at = [n](int channels, int64_t b, int channel, int64_t p) {
    return static_cast<size_t>((b * channels + channel) * n + p);
  };
  std::vector<int64_t> keys;
  std::vector<double> weight, slope;
  for (int64_t b = 0; b < g.batch; ++b) {
    for (int64_t p = 0; p < n; ++p) {
      keys.clear();
      for (int64_t r = 0; r < n; ++r) {
        if (share_a_line(g, p, r)) keys.push_back(r);
      }
      weight.assign(keys.size(), 0);
      slope.assign(keys.size(), 0);
      double max = -INFINITY, sum = 0;
      for (size_t j = 0; j < keys.size(); ++j) {
        for (int ch = 0; ch < c.qk_channels; ++ch) {
          weight[j] += q[at(c.qk_channels, b, ch, p)] * k[at(c.qk_channels, b, ch, keys[j])];
        }
        max = std::max(max, weight[j]);
      }
      for (double& w : weight) sum += w = exp(w - max);
      for (double& w : weight) w /= sum;
      e.lse[static_cast<size_t>(b * n + p)] = max + log(sum);
      double delta = 0;
      for (int ch = 0; ch < c.channels; ++ch) {
        const double grad = grad_out[at(c.channels, b, ch, p)];
        double out = 0;
        for (size_t j = 0; j < keys.size(); ++j) {
          const double value = v[at(c.channels, b, ch, keys[j])];
          out += weight[j] * value;
          slope[j] += grad * value;
          e.grad_value[at(c.channels, b, ch, keys[j])] += weight[j] * grad;
        }
        e.out[at(c.channels, b, ch, p)] = out;
        delta += out * grad;
      }
      for (size_t j = 0; j < keys.size(); ++j) {
        const double grad_energy = weight[j] * (slope[j] - delta);
        for (int ch = 0; ch < c.qk_channels; ++ch) {
          e.grad_query[at(c.qk_channels, b, ch, p)] += grad_energy * k[at(c.qk_channels, b, ch, keys[j])];
          e.grad_key[at(c.qk_channels, b, ch, keys[j])] += grad_energy * q[at(c.qk_channels, b, ch, p)];
        }
      }
    }
  }
  return e;
}

}  // namespace cuda
}  // namespace ccnet
