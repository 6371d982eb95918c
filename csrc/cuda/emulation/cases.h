// Calls to try: fixed ones that reach every path of the kernels and of the plan, and drawn ones.
#pragma once

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace ccnet {
namespace cuda {

// How an input lies in memory.
enum class Layout { kChannelsLast, kPadded, kMisaligned, kChannelsFirst, kExpanded };

struct Case {
  Grid grid;
  int qk_channels, channels;
  Layout layout;
  float logit_scale;
  DeviceInfo device;
};

inline std::string describe(const Case& c) {
  std::string text = "B=" + std::to_string(c.grid.batch) + " S=";
  for (int a = 0; a < c.grid.axes; ++a) text += (a ? "x" : "") + std::to_string(c.grid.size[a]);
  static const char* const layouts[] = {"channels-last", "padded", "misaligned", "channels-first", "expanded"};
  return text + " C'=" + std::to_string(c.qk_channels) + " C=" + std::to_string(c.channels) + " " +
         layouts[static_cast<int>(c.layout)] + " logits x" + std::to_string(c.logit_scale) + " shared " +
         std::to_string(c.device.shared_bytes) + " capability " +
         std::to_string(c.device.capability) + " SMs " + std::to_string(c.device.multiprocessors);
}

// Shared memory for `key_blocks` blocks of keys in the forward pass, and for the backward pass.
template <typename T>
DeviceInfo device_with(int key_blocks, int multiprocessors, int64_t blocks_per_grid) {
  const int shared =
      std::max(ForwardShape<T>::shared_bytes(key_blocks), static_cast<int>(BackwardShape<T>::kSharedBytes));
  return {multiprocessors, shared, blocks_per_grid, 80, 0};
}
inline DeviceInfo hopper(int multiprocessors) {
  return {multiprocessors, 227 * 1024, 1 << 30, kHopperCapability, 50 << 20};
}

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
      {grid(1, {202, 2}), 136, 40, Layout::kChannelsLast, 1.f, hopper(3)},
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

}  // namespace cuda
}  // namespace ccnet
