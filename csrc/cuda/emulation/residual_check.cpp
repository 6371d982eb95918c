// Runs the kernels of the layer's last step (residual.h) on the emulated machine and compares them with float64, over drawn
// shapes, layouts and thread orders.
//
//   residual_check [--cases N] [--seed S] [--fault skip-barrier|shuffle]
//
// Prints a line for each dtype and exits with 0, or says what is wrong and exits with 1.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>

#include "../residual_plan.h"
#include "case_tensors.h"
#include "machine.h"

namespace ccnet {
namespace cuda {
namespace {

using emulation::Error;
using emulation::Fault;
using emulation::Machine;
using emulation::Options;

class ResidualLauncher {
 public:
  // Runs the first `most` CTAs of a launch.
  explicit ResidualLauncher(Machine& machine, int64_t most = INT64_MAX) : machine_(machine), most_(most) {}

  template <typename T, int Width, ResidualStep Step>
  int residual(const ResidualArgs<T>& args) {
    machine_.run_grid(std::min(args.blocks, most_), kResidualThreads, kResidualSharedBytes<T>,
                      [&] { residual_kernel<T, Width, Step>(args); });
    ++launches_of_width[Width];
    return 0;
  }
  int residual_sum(const ResidualSumArgs& args) {
    machine_.run_grid(args.blocks, kResidualThreads, kResidualThreads * static_cast<int>(sizeof(double)),
                      [&] { residual_sum_kernel<double>(args); });
    return 0;
  }

  static inline int launches_of_width[3] = {};

 private:
  Machine& machine_;
  int64_t most_;
};

struct ResidualCase {
  Grid grid;
  int channels;
  Layout attended, x, out;
};

ResidualCase draw(std::mt19937& random) {
  const auto below = [&](unsigned n) { return static_cast<int64_t>(random() % n); };
  ResidualCase c{};
  c.grid.batch = 1 + below(2);
  c.grid.axes = 1;
  c.grid.size[0] = 1 + below(below(3) == 0 ? 200 : 70);
  c.channels = static_cast<int>(1 + below(below(3) == 0 ? 200 : 70));
  if (below(2) == 0) c.channels = (c.channels + 1) / 2 * 2;
  constexpr Layout kLast[] = {Layout::kChannelsLast, Layout::kChannelsLast, Layout::kPadded, Layout::kMisaligned};
  constexpr Layout kAny[] = {Layout::kChannelsLast, Layout::kChannelsFirst, Layout::kChannelsFirst, Layout::kPadded};
  c.attended = kLast[below(4)];
  c.x = kAny[below(4)];
  c.out = kAny[below(4)];
  return c;
}

template <typename T>
FlatMap flat(const Tensor<T>& t, int channels) {
  // What tensors.h makes of a tensor with one channel.
  return {t.data, t.strides.batch, channels == 1 ? 1 : t.strides.channel, t.strides.axis[0]};
}

// How far off a number is, 1 being half a unit in the last place: results are rounded once.
template <typename T>
double roundings(double got, double wanted) {
  const double relative = std::is_same_v<T, float> ? 0x1p-24 : std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
  const double least = std::is_same_v<T, Half> ? 0x1p-14 : 0x1p-126;  // below, numbers are evenly spaced
  return std::abs(got - wanted) / (relative * std::max(std::abs(wanted), least));
}

// Runs one step of a case, and says how far it is off, in roundings. `bits`: all results.
template <typename T, ResidualStep Step>
double check_step(const ResidualCase& c, uint32_t seed, const Options& options, std::vector<T>* bits) {
  constexpr bool kBackward = Step == ResidualStep::kBackward;
  const Grid& g = c.grid;
  std::mt19937 random(seed);
  Tensor<T> attended = make_tensor<T>(g, c.channels, c.attended), x = make_tensor<T>(g, c.channels, c.x);
  const Layout layout = Step == ResidualStep::kForward ? c.out : Layout::kChannelsLast;
  Tensor<T> out = make_tensor<T>(g, c.channels, layout);
  fill(attended, g, c.channels, random, 1.f);
  fill(x, g, c.channels, random, 1.f);
  const float gamma = 0.625f + static_cast<float>(random() % 100) / 128;
  float total = NAN;
  ResidualRequest request{};
  request.batch = g.batch;
  request.positions = g.positions();
  request.channels = c.channels;
  request.attended = flat(attended, c.channels);
  request.x = flat(x, c.channels);
  request.out = flat(out, c.channels);
  request.gamma = &gamma;
  std::vector<float> sums(static_cast<size_t>(residual_blocks(request)), NAN);
  request.sums = sums.data();
  request.total = &total;
  Machine machine(options);
  const auto add = [&](Tensor<T>& t, bool writable, const char* name) {
    machine.add_region(t.data, t.count * sizeof(T), writable, name);
  };
  if (Step != ResidualStep::kCopy) {
    add(attended, false, "attended");
    machine.add_region(&gamma, sizeof gamma, false, "gamma");
  }
  add(x, false, "x");
  add(out, true, "the result");
  if (kBackward) {
    machine.add_region(sums.data(), sums.size() * 4, true, "sums");
    machine.add_region(&total, sizeof total, true, "their sum");
  }
  if (residual<T, Step>(request, ResidualLauncher(machine)) != 0) throw Error("a launch failed");
  if (layout != Layout::kPadded) machine.check_outputs_written();
  read_back(out, g, c.channels);
  double worst = 0, sum = 0, sum_size = 0;
  for (size_t i = 0; i < out.values.size(); ++i) {
    const double wanted = Step == ResidualStep::kCopy      ? x.values[i]
                          : Step == ResidualStep::kForward ? x.values[i] + gamma * attended.values[i]
                                                           : gamma * x.values[i];
    worst = std::max(worst, roundings<T>(out.values[i], wanted));
    sum += x.values[i] * attended.values[i];
    sum_size += std::abs(x.values[i] * attended.values[i]);
  }
  if (!(worst <= (Step == ResidualStep::kCopy ? 0 : 1.001))) throw Error("errors: an element is off by " + std::to_string(worst) + " roundings");
  if (kBackward && !(std::abs(total - sum) <= 1e-6 * sum_size)) throw Error("errors: the sum is wrong");
  bits->assign(out.data, out.data + out.count);
  if (kBackward) bits->insert(bits->end(), reinterpret_cast<T*>(&total), reinterpret_cast<T*>(&total) + 4 / sizeof(T));
  return worst;
}

template <typename T, ResidualStep Step>
double check_orders(const ResidualCase& c, uint32_t seed, Fault fault) {
  Options options;
  options.fault = fault;
  options.seed = seed;
  options.order = emulation::Order::kRandom;
  std::vector<T> first, second;
  const double worst = check_step<T, Step>(c, seed, options, &first);
  options.order = seed % 2 == 0 ? emulation::Order::kAscending : emulation::Order::kDescending;
  check_step<T, Step>(c, seed, options, &second);
  if (memcmp(first.data(), second.data(), first.size() * sizeof(T)) != 0) {
    throw Error("the result depends on the order of the threads");
  }
  return worst;
}

template <typename T>
void check_dtype(const char* name, int cases, uint32_t seed, Fault fault) {
  std::mt19937 random(seed);
  double worst = 0;
  std::fill(ResidualLauncher::launches_of_width, ResidualLauncher::launches_of_width + 3, 0);
  for (int i = 0; i < cases; ++i) {
    const ResidualCase c = draw(random);
    const uint32_t own = seed + static_cast<uint32_t>(i);
    try {
      worst = std::max(worst, check_orders<T, ResidualStep::kCopy>(c, own, fault));
      worst = std::max(worst, check_orders<T, ResidualStep::kForward>(c, own, fault));
      worst = std::max(worst, check_orders<T, ResidualStep::kBackward>(c, own, fault));
    } catch (const std::exception& e) {
      throw Error(std::string(name) + ", case " + std::to_string(i) + ": B=" + std::to_string(c.grid.batch) + " C=" +
                  std::to_string(c.channels) + " N=" + std::to_string(c.grid.size[0]) + " layouts " +
                  std::to_string(static_cast<int>(c.attended)) + std::to_string(static_cast<int>(c.x)) +
                  std::to_string(static_cast<int>(c.out)) + ": " + e.what());
    }
  }
  printf("%s: %d cases, the largest error %.3f roundings; %d launches by element, %d by pair\n", name,
         cases, worst, ResidualLauncher::launches_of_width[1], ResidualLauncher::launches_of_width[2]);
}

// The first tile of a map with more positions than 31 bits count.
void check_many_positions() {
  std::vector<float> x(kResidualTile, 1.5f), out(kResidualTile, NAN);
  ResidualRequest request{};
  request.batch = request.channels = 1;
  request.positions = (int64_t{1} << 31) + 1;
  request.x = {x.data(), 0, 1, 1};
  request.out = {out.data(), 0, 1, 1};
  Machine machine(Options{});
  machine.add_region(x.data(), x.size() * sizeof(float), false, "x");
  machine.add_region(out.data(), out.size() * sizeof(float), true, "the result of many positions");
  residual<float, ResidualStep::kCopy>(request, ResidualLauncher(machine, 1));
  machine.check_outputs_written();
  if (out != x) throw Error("errors: the first tile of many positions is wrong");
}

int run(int argc, char** argv) {
  int cases = 40;
  uint32_t seed = 1;
  Fault fault = Fault::kNone;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    if (option == "--cases") {
      cases = atoi(value.c_str());
    } else if (option == "--seed") {
      seed = static_cast<uint32_t>(atoi(value.c_str()));
    } else if (option == "--fault" && value == "skip-barrier") {
      fault = Fault::kSkipBarrier;
    } else if (option == "--fault" && value == "shuffle") {
      fault = Fault::kShuffleNeighbour;
    } else {
      fprintf(stderr, "unknown option %s %s\n", option.c_str(), value.c_str());
      return 2;
    }
  }
  return emulation::status_of([&] {
    check_many_positions();
    check_dtype<float>("float", cases, seed, fault);
    check_dtype<Half>("half", cases, seed, fault);
    check_dtype<BFloat16>("bfloat16", cases, seed, fault);
  });
}

}  // namespace
}  // namespace cuda
}  // namespace ccnet

int main(int argc, char** argv) { return ccnet::cuda::run(argc, argv); }
