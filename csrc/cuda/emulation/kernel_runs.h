// A forward and a backward pass of the kernels on the emulated machine.
#pragma once

#include <string.h>

#include <string>
#include <vector>

#include "case_tensors.h"
#include "machine.h"

namespace ccnet {
namespace cuda {

using emulation::Error;
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

  template <typename T, int Blocks, int Keys>
  int forward(const HopperForwardArgs& args) {
    using Shape = HopperForwardShape<Blocks, Keys>;
    machine_.run_grid(args.blocks, Shape::kThreads, Shape::kSharedBytes,
                      [&] { hopper_forward_kernel<T, Blocks, Keys>(args); }, true);
    return 0;
  }
  template <typename T, int Blocks, bool FindsDelta, int Rows>
  int backward(const HopperBackwardArgs<T>& args) {
    using Shape = HopperBackwardShape<T, Blocks, FindsDelta, Rows>;
    machine_.run_grid(args.blocks, Shape::kThreads, Shape::kSharedBytes,
                      [&] { hopper_backward_kernel<T, Blocks, FindsDelta, Rows>(args); }, args.overlaps,
                      Shape::kClusterBlocks);
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

inline void check(int error) {
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

}  // namespace cuda
}  // namespace ccnet
