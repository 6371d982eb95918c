// Tensors for the checks of the emulated machine.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "hopper_map.h"

namespace ccnet {
namespace cuda {
namespace {

using emulation::Error;
using emulation::Fault;
using emulation::Machine;
using emulation::Options;

constexpr int kThreads = 2 * kWarpgroup;
constexpr int kBytes = panel_bytes(kTileRows);  // of a panel

void require(bool condition, const std::string& what) {
  if (!condition) throw Error(what);
}

// What an error says that ends `run`, or "nothing".
std::string said_by(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "nothing";
}

// Requires that a mistake of this kind was noticed, and for its own reason.
void require_noticed(const std::string& kind, const std::string& reason, const std::string& said) {
  require(said.find(reason) != std::string::npos,
          "a mistake with " + kind + " should be noticed (" + reason + "), but the machine said " + said);
}

// A tensor [batch][other0][other1][position][channel] whose rows are padded.
template <typename T>
struct Source {
  int64_t size[5];    // as a box counts them: channel, position, other1, other0, batch
  int64_t stride[5];  // elements
  std::vector<T> memory;
  T* data;

  Source(int64_t channels, int64_t positions, int64_t other1, int64_t other0, int64_t batch, std::mt19937& random)
      : size{channels, positions, other1, other0, batch} {
    stride[0] = 1;
    stride[1] = (channels + 7) / 8 * 8 + 16;
    for (int d = 2; d < 5; ++d) stride[d] = stride[d - 1] * size[d - 1] + 8 * d;
    memory.resize(static_cast<size_t>(stride[4] * batch + 8));
    std::normal_distribution<float> normal;
    for (T& e : memory) e = from_float<T>(normal(random));
    data = memory.data();
    while (reinterpret_cast<uintptr_t>(data) % 16 != 0) ++data;
  }
  bool has(const int64_t (&at)[5]) const {
    for (int d = 0; d < 5; ++d) {
      if (at[d] < 0 || at[d] >= size[d]) return false;
    }
    return true;
  }
  // An element; 0 outside.
  float value(int64_t channel, int64_t position, int64_t other1, int64_t other0, int64_t batch) const {
    const int64_t at[5] = {channel, position, other1, other0, batch};
    if (!has(at)) return 0.f;
    int64_t offset = 0;
    for (int d = 0; d < 5; ++d) offset += at[d] * stride[d];
    return to_float<T>(data[offset]);
  }
  BoxSource source(int positions, int group) const {
    BoxSource b{};
    b.data = data;
    b.element_bytes = static_cast<int>(sizeof(T));
    const int box[5] = {kPanelWidth<T>, positions, group, 1, 1};
    for (int d = 0; d < 5; ++d) {
      b.size[d] = size[d];
      b.stride[d] = stride[d];
      b.box[d] = box[d];
    }
    return b;
  }
  TensorMap map(int positions, int group) const {
    TensorMap m;
    make_map(&m, source(positions, group));
    return m;
  }
  void add_to(Machine& machine, const char* name) const {
    machine.add_region(data, static_cast<size_t>(memory.data() + memory.size() - data) * sizeof(T), false, name);
  }
};

// Barriers lie behind the panels.
SharedBarrier* barrier_at(int panels, int number) {
  return reinterpret_cast<SharedBarrier*>(dynamic_shared() + panels * kBytes) + number;
}

}  // namespace
}  // namespace cuda
}  // namespace ccnet
