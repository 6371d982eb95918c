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

#include "accuracy.h"
#include "brute_force.h"
#include "kernel_runs.h"

namespace ccnet {
namespace cuda {
namespace {

using emulation::Error;
using emulation::Fault;

struct Worst {
  Errors out, lse, grad;
  Counts counts;
};

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
      {"skip-store-wait", Fault::kSkipStoreWait},
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
  return emulation::status_of([&] {
    std::mt19937 random(seed);
    check_lines(random);
    check_pairs();
    if (dtype.empty() || dtype == "float") check_dtype<float>("float", cases, capability, seed, fault);
    if (dtype.empty() || dtype == "half") check_dtype<Half>("half", cases, capability, seed, fault);
    if (dtype.empty() || dtype == "bfloat16") check_dtype<BFloat16>("bfloat16", cases, capability, seed, fault);
  });
}

}  // namespace
}  // namespace cuda
}  // namespace ccnet

int main(int argc, char** argv) { return ccnet::cuda::run(argc, argv); }
