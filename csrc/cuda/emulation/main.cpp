// Runs the CUDA kernels on the emulated machine and compares them with float64 brute force, over drawn shapes, strides,
// devices and thread orders.
//
//   emulate --traffic HEIGHTxWIDTH
//   emulate [--cases N] [--seed S] [--dtype float|half|bfloat16] [--capability 80|90] [--fault NAME]
//
// Prints one line for each dtype and exits with 0, or says what is wrong and exits with 1.
#include <stdio.h>
#include <stdlib.h>

#include <cmath>
#include <map>

#include "../plan.h"
#include "hopper_map.h"
// after make_map()
#include "../hopper_plan.h"

namespace ccnet {
namespace cuda {
namespace {

using emulation::Error;
using emulation::Fault;
using emulation::Machine;
using emulation::Options;

class Launcher {
 public:
  explicit Launcher(Machine& machine) : machine_(machine) {}

  template <typename T>
  int operator()(const ForwardArgs<T>& args, int shared_bytes) {
    machine_.run_grid(args.blocks, ForwardShape<T>::kThreads, shared_bytes, [&] { forward_kernel<T>(args); });
    return 0;
  }
  template <typename T>
  int operator()(const BackwardArgs<T>& args, int shared_bytes) {
    machine_.run_grid(args.blocks, BackwardShape<T>::kThreads, shared_bytes, [&] { backward_kernel<T>(args); });
    return 0;
  }
  template <typename T>
  int operator()(const DeltaArgs<T>& args, int shared_bytes) {
    machine_.run_grid(args.blocks, kDeltaThreads, shared_bytes, [&] { delta_kernel<T>(args); });
    return 0;
  }

 private:
  Machine& machine_;
};

class HopperLauncher {
 public:
  explicit HopperLauncher(Machine& machine) : machine_(machine) {}

  template <typename T, int Blocks>
  int forward(const HopperForwardArgs<T>& args, bool overlaps_previous) {
    using Shape = HopperForwardShape<Blocks>;
    machine_.run_grid(args.blocks, Shape::kThreads, Shape::kSharedBytes, [&] { hopper_forward_kernel<T, Blocks>(args); },
                      overlaps_previous);
    return 0;
  }
  template <typename T, int Blocks>
  int backward(const HopperBackwardArgs<T>& args, bool overlaps_previous) {
    using Shape = HopperBackwardShape<T, Blocks>;
    machine_.run_grid(args.blocks, Shape::kThreads, Shape::kSharedBytes,
                      [&] { hopper_backward_kernel<T, Blocks>(args); }, overlaps_previous);
    return 0;
  }
  template <typename T>
  int dense_delta(const DenseDeltaArgs<T>& args) {
    machine_.run_grid(args.blocks, kDenseDeltaThreads, 0, [&] { dense_delta_kernel<T>(args); });
    return 0;
  }

 private:
  Machine& machine_;
};

// How an input lies in memory.
enum class Layout { kChannelsLast, kPadded, kMisaligned, kChannelsFirst, kExpanded };

struct Case {
  Grid grid;
  int qk_channels, channels;
  Layout layout;
  float logit_scale;
  DeviceInfo device;
};

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

int64_t element_at(const Grid& g, const Strides& s, int64_t b, int c, int64_t p) {
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

// Whether positions p and q of a grid differ along at most one axis.
bool share_a_line(const Grid& g, int64_t p, int64_t q) {
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
Expected brute_force(const Case& c, const std::vector<double>& q, const std::vector<double>& k,
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

// Errors in units of the expected tensor's root mean square.
struct Errors {
  double worst = 0, rms = 0;

  void join(const Errors& e) {
    worst = std::max(worst, e.worst);
    rms = std::max(rms, e.rms);
  }
  bool within(const Errors& tolerance, double slack) const {
    return worst <= tolerance.worst * slack && rms <= tolerance.rms * slack;
  }
};

// `least` is the smallest unit, for tensors that vanish by cancellation.
Errors errors_of(const std::vector<double>& got, const std::vector<double>& expected, const char* what, double least) {
  double squares = 0, error_squares = 0;
  Errors e;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(got[i])) throw Error(std::string(what) + " is not finite");
    squares += expected[i] * expected[i];
    error_squares += (got[i] - expected[i]) * (got[i] - expected[i]);
    e.worst = std::max(e.worst, fabs(got[i] - expected[i]));
  }
  const double count = static_cast<double>(got.size());
  const double unit = std::max(sqrt(squares / count), least);
  e.worst /= unit;
  e.rms = sqrt(error_squares / count) / unit;
  return e;
}

template <typename T>
struct Run {
  Tensor<T> out, grad_query, grad_key, grad_value;
  std::vector<float> lse;
};

struct Counts {
  long bank_conflicts = 0, matrix_loads = 0;
  int64_t forward_bytes = 0, backward_bytes = 0;

  void add(const Machine& machine, int64_t& bytes) {
    bank_conflicts += machine.bank_conflicts();
    matrix_loads += machine.matrix_loads();
    bytes += machine.bytes_read() + machine.bytes_written();
  }
};

template <typename T>
bool takes_hopper_forward(const ForwardRequest& request) {
  if constexpr (sizeof(T) == 2) return hopper_takes_forward<T>(request);
  return false;
}

void check(int error) {
  if (error != 0) throw Error("a launch failed with code " + std::to_string(error));
}

template <typename T>
Run<T> run_kernels(const Case& c, Inputs<T>& inputs, const Options& options, Counts& counts) {
  const Grid& g = c.grid;
  auto& [query, key, value, grad_out] = inputs;
  const int64_t positions = g.batch * g.positions();
  Run<T> run;
  run.out = make_tensor<T>(g, c.channels, Layout::kChannelsLast);
  run.grad_query = make_tensor<T>(g, c.qk_channels, Layout::kChannelsLast);
  run.grad_key = make_tensor<T>(g, c.qk_channels, Layout::kChannelsLast);
  run.grad_value = make_tensor<T>(g, c.channels, Layout::kChannelsLast);
  run.lse.assign(static_cast<size_t>(positions), NAN);
  ForwardRequest request{g,           c.qk_channels, c.channels, query.ref(),     key.ref(), value.ref(),
                         run.out.ref(), nullptr,       run.lse.data(), c.device, nullptr};
  const bool special_forward = takes_hopper_forward<T>(request);
  std::vector<double> stats(
      static_cast<size_t>((special_forward ? hopper_forward_scratch(g) : forward_scratch<T>(g, c.device)) / 8), NAN);
  request.stats = stats.data();
  std::vector<float> delta(static_cast<size_t>(positions), NAN);
  const auto add = [](Machine& machine, Tensor<T>& t, bool writable, const char* name) {
    machine.add_region(t.data, t.count * sizeof(T), writable, name);
  };
  {
    Machine machine(options);
    add(machine, query, false, "query");
    add(machine, key, false, "key");
    add(machine, value, false, "value");
    add(machine, run.out, true, "out");
    machine.add_region(run.lse.data(), run.lse.size() * 4, true, "lse");
    if (!stats.empty()) machine.add_region(stats.data(), stats.size() * 8, true, "statistics");
    if constexpr (sizeof(T) == 2) {
      if (special_forward) check(hopper_forward<T>(request, HopperLauncher(machine)));
    }
    if (!special_forward) check(forward<T>(request, Launcher(machine)));
    machine.check_outputs_written();
    counts.add(machine, counts.forward_bytes);
  }
  {
    Machine machine(options);
    add(machine, query, false, "query");
    add(machine, key, false, "key");
    add(machine, value, false, "value");
    add(machine, run.out, false, "out");
    add(machine, grad_out, false, "grad_out");
    machine.add_region(run.lse.data(), run.lse.size() * 4, false, "lse");
    machine.add_region(delta.data(), delta.size() * 4, true, "delta");
    add(machine, run.grad_query, true, "grad_query");
    add(machine, run.grad_key, true, "grad_key");
    add(machine, run.grad_value, true, "grad_value");
    BackwardRequest request{g,
                            c.qk_channels,
                            c.channels,
                            query.ref(),
                            key.ref(),
                            value.ref(),
                            run.out.ref(),
                            grad_out.ref(),
                            run.grad_query.ref(),
                            run.grad_key.ref(),
                            run.grad_value.ref(),
                            run.lse.data(),
                            delta.data(),
                            c.device,
                            nullptr};
    bool special = false;
    if constexpr (sizeof(T) == 2) {
      special = hopper_takes_backward<T>(request);
      if (special) check(hopper_backward<T>(request, HopperLauncher(machine)));
    }
    if (!special) check(backward<T>(request, Launcher(machine)));
    machine.check_outputs_written();
    counts.add(machine, counts.backward_bytes);
  }
  read_back(run.out, g, c.channels);
  read_back(run.grad_query, g, c.qk_channels);
  read_back(run.grad_key, g, c.qk_channels);
  read_back(run.grad_value, g, c.channels);
  return run;
}

template <typename T>
bool same_bits(const Tensor<T>& a, const Tensor<T>& b) {
  return memcmp(a.data, b.data, a.count * sizeof(T)) == 0;
}

// What the formats allow. The root mean square is the sharp test; single elements scatter, most of all where a few keys
// attract every query.
template <typename T>
struct Tolerance;
template <>
struct Tolerance<float> {
  static constexpr Errors out{1e-5, 2e-6}, grad{6e-5, 1e-5};
};
template <>
struct Tolerance<Half> {
  static constexpr Errors out{1e-2, 1e-3}, grad{8e-2, 4e-3};
};
template <>
struct Tolerance<BFloat16> {
  static constexpr Errors out{8e-2, 8e-3}, grad{4e-1, 3e-2};
};
constexpr Errors kLseTolerance{1e-5, 2e-6};

struct Worst {
  Errors out, lse, grad;
  Counts counts;
};

std::string text_of(const Errors& e) {
  char text[64];
  snprintf(text, sizeof text, "%.1e (rms %.1e)", e.worst, e.rms);
  return text;
}

std::string describe(const Case& c) {
  std::string text = "B=" + std::to_string(c.grid.batch) + " S=";
  for (int a = 0; a < c.grid.axes; ++a) text += (a ? "x" : "") + std::to_string(c.grid.size[a]);
  static const char* const layouts[] = {"channels-last", "padded", "misaligned", "channels-first", "expanded"};
  return text + " C'=" + std::to_string(c.qk_channels) + " C=" + std::to_string(c.channels) + " " +
         layouts[static_cast<int>(c.layout)] + " logits x" + std::to_string(c.logit_scale) + " shared " +
         std::to_string(c.device.shared_bytes) + " capability " +
         std::to_string(c.device.capability) + " SMs " + std::to_string(c.device.multiprocessors);
}

template <typename T>
void check_case(const Case& c, uint32_t seed, Fault fault, Worst& worst) {
  std::mt19937 random(seed);
  const float scale = static_cast<float>(sqrt(c.logit_scale / sqrt(static_cast<double>(c.qk_channels))));
  Inputs<T> inputs(c, random, scale);
  const Expected expected = brute_force(c, inputs.query.values, inputs.key.values, inputs.value.values,
                                        inputs.grad_out.values);

  Options options;
  options.fault = fault;
  options.seed = seed;
  options.order = emulation::Order::kRandom;
  Run<T> run = run_kernels(c, inputs, options, worst.counts);
  const Errors out = errors_of(run.out.values, expected.out, "out", 0.05);
  // Energies of the size of logit_scale may cancel, most of all the single one of a single position.
  const Errors lse = errors_of({run.lse.begin(), run.lse.end()}, expected.lse, "lse",
                               0.1 * std::max(1.0, static_cast<double>(c.logit_scale)));
  // dP and delta, which mostly cancel, are of the size of sqrt(C).
  const double qk_unit = 0.1 * scale * sqrt(static_cast<double>(c.channels));
  Errors grad = errors_of(run.grad_query.values, expected.grad_query, "grad_query", qk_unit);
  grad.join(errors_of(run.grad_key.values, expected.grad_key, "grad_key", qk_unit));
  grad.join(errors_of(run.grad_value.values, expected.grad_value, "grad_value", 0.05));
  // Large energies amplify the rounding of the inputs' products and of lse.
  const double slack = std::max(1.0, static_cast<double>(c.logit_scale) / 3);
  if (!out.within(Tolerance<T>::out, slack) || !lse.within(kLseTolerance, slack) ||
      !grad.within(Tolerance<T>::grad, slack)) {
    throw Error("errors: out " + text_of(out) + ", lse " + text_of(lse) + ", gradients " + text_of(grad));
  }
  worst.out.join(out);
  worst.lse.join(lse);
  worst.grad.join(grad);

  // Other orders of threads and CTAs, copies landing at once: not one bit may differ.
  options.order = seed % 2 == 0 ? emulation::Order::kAscending : emulation::Order::kDescending;
  options.copies_land_late = false;
  Run<T> again = run_kernels(c, inputs, options, worst.counts);
  if (!same_bits(run.out, again.out) || !same_bits(run.grad_query, again.grad_query) ||
      !same_bits(run.grad_key, again.grad_key) || !same_bits(run.grad_value, again.grad_value) ||
      memcmp(run.lse.data(), again.lse.data(), run.lse.size() * 4) != 0) {
    throw Error("the result depends on the order of the threads");
  }
}

// A key that is not a number reaches the queries on its lines, and no others.
template <typename T>
void check_nan(const Case& c, uint32_t seed) {
  const Grid& g = c.grid;
  std::mt19937 random(seed);
  Inputs<T> inputs(c, random, 1.f);
  Tensor<T>& key = inputs.key;
  const int64_t poisoned = g.positions() / 2;
  key.data[element_at(g, key.strides, 0, c.qk_channels - 1, poisoned)] = from_float<T>(NAN);
  Options options;
  options.seed = seed;
  Counts counts;
  const Run<T> run = run_kernels(c, inputs, options, counts);
  for_each_element(g, c.channels, [&](int64_t b, int, int64_t p, size_t i) {
    const bool wanted = (b == 0 || key.strides.batch == 0) && share_a_line(g, p, poisoned);
    if (std::isnan(run.out.values[i]) != wanted) {
      throw Error("position " + std::to_string(p) + (wanted ? " misses" : " has") + " the NaN of key " +
                  std::to_string(poisoned));
    }
  });
}

// Shared memory for `key_blocks` blocks of keys in the forward pass, and for the backward pass.
template <typename T>
DeviceInfo device_with(int key_blocks, int multiprocessors, int64_t blocks_per_grid) {
  const int shared =
      std::max(ForwardShape<T>::shared_bytes(key_blocks), static_cast<int>(BackwardShape<T>::kSharedBytes));
  return {multiprocessors, shared, blocks_per_grid, 80};
}
DeviceInfo hopper(int multiprocessors) { return {multiprocessors, 227 * 1024, 1 << 30, kHopperCapability}; }

// What a drawn case might miss: every path of the kernels and of the plan.
template <typename T>
std::vector<Case> fixed_cases() {
  const auto grid = [](int64_t batch, std::vector<int64_t> sizes) {
    Grid g{};
    g.batch = batch;
    g.axes = static_cast<int>(sizes.size());
    for (size_t a = 0; a < sizes.size(); ++a) g.size[a] = sizes[a];
    return g;
  };
  const int64_t all = 1 << 30;
  return {
      {grid(1, {1, 1}), 1, 1, Layout::kChannelsLast, 1.f, device_with<T>(1, 1, all)},
      {grid(1, {1, 5}), 8, 16, Layout::kChannelsLast, 1.f, device_with<T>(4, 1, all)},
      {grid(2, {6, 1}), 3, 5, Layout::kChannelsLast, 1.f, device_with<T>(4, 100, all)},
      // one key block with a tail, several channel steps, split and unsplit
      {grid(1, {2, 97}), 64, 136, Layout::kChannelsLast, 1.f, device_with<T>(4, 1, all)},
      {grid(1, {3, 33}), 72, 264, Layout::kChannelsLast, 1.f, device_with<T>(4, 100, all)},
      // several key blocks in one launch; several query tiles; whole lines in one CTA
      {grid(1, {300}), 16, 24, Layout::kChannelsLast, 2.f, device_with<T>(4, 1, all)},
      {grid(1, {129, 2}), 8, 8, Layout::kPadded, 1.f, device_with<T>(2, 1, all)},
      // several launches for a long line, one of them with nothing but the masked self for one row; block pairs over
      // several launches; several grids for one launch
      {grid(1, {129, 1}), 8, 40, Layout::kChannelsLast, 1.f, device_with<T>(1, 1000, 2)},
      {grid(1, {260, 2}), 8, 16, Layout::kChannelsLast, 1.f, device_with<T>(1, 1000, 3)},
      // one query attends almost only to itself, energies beyond the range of half precision
      {grid(1, {9, 17}), 24, 32, Layout::kChannelsLast, 100.f, device_with<T>(4, 10, all)},
      // three axes
      {grid(1, {3, 4, 5}), 16, 32, Layout::kChannelsLast, 1.f, device_with<T>(4, 10, all)},
      {grid(1, {2, 1, 7}), 5, 19, Layout::kChannelsFirst, 1.f, device_with<T>(4, 10, 5)},
      // memory formats
      {grid(2, {7, 9}), 12, 20, Layout::kMisaligned, 1.f, device_with<T>(4, 10, all)},
      {grid(2, {5, 6}), 8, 16, Layout::kExpanded, 1.f, device_with<T>(4, 10, all)},
      {grid(2, {8, 5}), 9, 21, Layout::kPadded, 1.f, device_with<T>(4, 10, all)},
      // compute capability 9.0: lines alone, several in a tile, of several blocks, of several launches
      {grid(1, {2, 97}), 64, 136, Layout::kChannelsLast, 1.f, hopper(1)},
      {grid(2, {5, 33}), 72, 264, Layout::kChannelsLast, 1.f, hopper(100)},
      {grid(1, {3, 130}), 64, 72, Layout::kPadded, 2.f, hopper(1)},
      {grid(1, {2, 300}), 72, 72, Layout::kChannelsLast, 2.f, hopper(4)},
      {grid(2, {3, 4, 5}), 16, 32, Layout::kChannelsLast, 30.f, hopper(10)},
      {grid(2, {7, 1}), 8, 8, Layout::kChannelsLast, 1.f, hopper(10)},
      // items enough to go around the ring of panels several times
      {grid(1, {1, 97}), 136, 520, Layout::kChannelsLast, 1.f, hopper(1)},
  };
}

template <typename T>
Case draw_case(std::mt19937& random) {
  const auto draw = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<uint32_t>(high - low + 1));
  };
  Case c{};
  c.grid.axes = draw(1, 3);
  c.grid.batch = draw(1, 2);
  int64_t positions = 1;
  for (int a = 0; a < c.grid.axes; ++a) {
    const int most = c.grid.axes == 1 ? 290 : c.grid.axes == 2 ? 40 : 9;
    c.grid.size[a] = draw(0, 5) == 0 ? 1 : draw(1, most);
    positions *= c.grid.size[a];
  }
  if (positions > 400) c.grid.size[0] = std::max<int64_t>(1, c.grid.size[0] * 400 / positions);
  c.qk_channels = draw(0, 1) ? 8 * draw(1, 17) : draw(1, 70);
  c.channels = draw(0, 1) ? 8 * draw(1, 33) : draw(1, 150);
  c.layout = static_cast<Layout>(draw(0, 4));
  const float scales[] = {0.1f, 1.f, 1.f, 3.f, 30.f};
  c.logit_scale = scales[draw(0, 4)];
  c.device = draw(0, 1) ? hopper(draw(0, 1) ? 1 : 200)
                        : device_with<T>(draw(1, 4), draw(0, 1) ? 1 : 200, draw(0, 3) == 0 ? 3 : 1 << 30);
  return c;
}

// lines_io.h against lines.h, for drawn grids and strides.
void check_lines(std::mt19937& random) {
  for (int i = 0; i < 2000; ++i) {
    Grid g{};
    Strides s{};
    g.axes = 1 + static_cast<int>(random() % 3);
    g.batch = 1 + random() % 3;
    s.batch = random() % 100000;
    for (int a = 0; a < g.axes; ++a) {
      g.size[a] = i % 10 == 0 ? (int64_t{1} << 32) + random() % 7 : 1 + random() % 9;
      s.axis[a] = random() % 1000;
    }
    for (int axis = 0; axis < g.axes; ++axis) {
      for (int j = 0; j < 20; ++j) {
        const int64_t lines = g.axes == 3 && i % 10 == 0 ? int64_t{1} << 40 : g.lines(axis);
        const int64_t number =
            static_cast<int64_t>((static_cast<uint64_t>(random()) << 32 | random()) >> 1) % lines;
        const int64_t offset = offset_of(find_line(lines_along(g, axis), number), strides_along(g, s, axis));
        if (offset != line_offset(g, s, axis, number)) throw Error("a line's offset differs from that of lines.h");
      }
    }
  }
}

// Every pair of blocks once, no block twice in one launch.
void check_pairs() {
  for (int blocks = 1; blocks < 9; ++blocks) {
    std::map<std::pair<int, int>, int> by_launch, by_line;
    for (int shift = 0; shift < blocks; ++shift) {
      std::map<int, int> keys;
      for (int i = 0; i < blocks; ++i) {
        const Pair pair = pair_of_launch(i, shift, blocks, false);
        ++by_launch[{pair.query_block, pair.key_block}];
        if (++keys[pair.key_block] > 1 || pair.query_block != i) throw Error("a launch takes a block twice");
      }
    }
    for (int turn = 0; turn < blocks * blocks; ++turn) {
      const Pair pair = pair_of_line(turn, blocks, false);
      if (pair.add_query != (turn % blocks > 0) || pair.add_key != (pair.query_block > 0)) {
        throw Error("a block's first results are added to nothing");
      }
      ++by_line[{pair.query_block, pair.key_block}];
    }
    if (by_launch.size() != static_cast<size_t>(blocks * blocks) || by_line != by_launch) {
      throw Error("a pair of blocks is missing");
    }
  }
}

// `capability`: of all cases; 0 for any.
template <typename T>
void check_dtype(const char* name, int cases, int capability, uint32_t seed, Fault fault) {
  Worst worst;
  std::vector<Case> list;
  const auto add = [&](const Case& c) {
    if (capability == 0 || c.device.capability == capability) list.push_back(c);
  };
  for (const Case& c : fixed_cases<T>()) add(c);
  std::mt19937 random(seed);
  while (list.size() < static_cast<size_t>(cases)) add(draw_case<T>(random));
  list.resize(static_cast<size_t>(cases));
  for (size_t i = 0; i < list.size(); ++i) {
    try {
      check_case<T>(list[i], seed + static_cast<uint32_t>(i), fault, worst);
      if (i % 3 == 0 && fault == Fault::kNone) check_nan<T>(list[i], seed + static_cast<uint32_t>(i));
    } catch (const std::exception& e) {
      throw Error(std::string(name) + ", case " + std::to_string(i) + " (" + describe(list[i]) + "): " + e.what());
    }
  }
  if (worst.counts.bank_conflicts != 0) {
    throw Error(std::string(name) + ": " + std::to_string(worst.counts.bank_conflicts) + " of " +
                std::to_string(worst.counts.matrix_loads) + " matrix loads have bank conflicts");
  }
  printf("%s: %d cases; largest errors: out %s, lse %s, gradients %s; %ld matrix loads without bank conflicts\n", name,
         cases, text_of(worst.out).c_str(), text_of(worst.lse).c_str(), text_of(worst.grad).c_str(),
         worst.counts.matrix_loads);
}

// Global memory traffic of one call, against the least: every operand read once, every result written once.
template <typename T>
void print_traffic(const char* name, int64_t height, int64_t width) {
  Case c{};
  c.grid.batch = 1;
  c.grid.axes = 2;
  c.grid.size[0] = height;
  c.grid.size[1] = width;
  c.qk_channels = 64;
  c.channels = 512;
  c.device = hopper(132);
  std::mt19937 random(1);
  c.layout = Layout::kChannelsLast;
  Inputs<T> inputs(c, random, 0.3f);
  Counts counts;
  run_kernels(c, inputs, Options(), counts);
  const double least = static_cast<double>(height * width * 2 * (64 + 512) * int64_t{sizeof(T)});
  printf("%s %ldx%ld, C'=64, C=512: forward %.1f MB, %.2f x the least; backward %.1f MB, %.2f x the least\n", name,
         static_cast<long>(height), static_cast<long>(width), static_cast<double>(counts.forward_bytes) / 1e6,
         static_cast<double>(counts.forward_bytes) / least, static_cast<double>(counts.backward_bytes) / 1e6,
         static_cast<double>(counts.backward_bytes) / (2 * least));
}

int run(int argc, char** argv) {
  int cases = 22, capability = 0;
  uint32_t seed = 1;
  std::string dtype;
  Fault fault = Fault::kNone;
  const std::map<std::string, Fault> faults = {
      {"skip-barrier", Fault::kSkipBarrier},     {"copy-late", Fault::kCopyLate},
      {"swap-fragments", Fault::kSwapFragments}, {"transpose-mma", Fault::kTransposeMma},
      {"shuffle", Fault::kShuffleNeighbour},     {"drop-tail", Fault::kDropTail},
      {"skip-phase", Fault::kSkipPhase},         {"wrong-parity", Fault::kWrongParity},
      {"refill-early", Fault::kRefillEarly},     {"lose-arrival", Fault::kLoseArrival},
      {"skip-fence", Fault::kSkipFence},         {"plain-box", Fault::kPlainBox},
      {"keep-outside", Fault::kKeepOutside},     {"transpose-descriptor", Fault::kTransposeDescriptor},
      {"wait-too-little", Fault::kWaitTooLittle}, {"skip-launch-wait", Fault::kSkipLaunchWait},
  };
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    if (option == "--cases") {
      cases = atoi(value.c_str());
    } else if (option == "--seed") {
      seed = static_cast<uint32_t>(atoi(value.c_str()));
    } else if (option == "--dtype") {
      dtype = value;
    } else if (option == "--capability" && (value == "80" || value == "90")) {
      capability = atoi(value.c_str());
    } else if (option == "--traffic") {
      long height = 0, width = 0;
      if (sscanf(value.c_str(), "%ldx%ld", &height, &width) != 2 || height < 1 || width < 1) {
        fprintf(stderr, "--traffic takes HEIGHTxWIDTH\n");
        return 2;
      }
      print_traffic<BFloat16>("bfloat16", height, width);
      return 0;
    } else if (option == "--fault" && faults.count(value)) {
      fault = faults.at(value);
    } else {
      fprintf(stderr, "unknown option %s %s\n", option.c_str(), value.c_str());
      return 2;
    }
  }
  try {
    std::mt19937 random(seed);
    check_lines(random);
    check_pairs();
    if (dtype.empty() || dtype == "float") check_dtype<float>("float", cases, capability, seed, fault);
    if (dtype.empty() || dtype == "half") check_dtype<Half>("half", cases, capability, seed, fault);
    if (dtype.empty() || dtype == "bfloat16") check_dtype<BFloat16>("bfloat16", cases, capability, seed, fault);
  } catch (const std::exception& e) {
    printf("FAILED: %s\n", e.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace cuda
}  // namespace ccnet

int main(int argc, char** argv) { return ccnet::cuda::run(argc, argv); }
