// The launches of the layer's last step, its backward pass, and copies to channels-last memory. Host code, the same for
// the GPU and for the emulation.
#pragma once

#include "interface.h"
#include "residual.h"

namespace ccnet {
namespace cuda {

inline bool is_across(const FlatMap& map) { return map.channel != 1; }

inline int64_t residual_blocks(const ResidualRequest& call) {
  return call.batch * ceil_div(call.positions, kResidualTile) * ceil_div(call.channels, kResidualTile);
}

// Whether channels can be moved in pairs.
template <typename T>
bool has_pairs(const FlatMap& map, int channels) {
  return sizeof(T) == 2 && channels % 2 == 0 && map.batch % 2 == 0 && map.position % 2 == 0 &&
         reinterpret_cast<uintptr_t>(map.data) % 4 == 0;
}

template <typename T, ResidualStep Step, typename Launch>
int residual(const ResidualRequest& call, Launch&& launch) {
  const auto map = [](auto* type, const FlatMap& m) {
    using Element = std::remove_pointer_t<decltype(type)>;
    return ResidualMap<Element>{static_cast<Element*>(m.data), m.batch, m.channel, m.position};
  };
  ResidualArgs<T> args{};
  args.x = map(static_cast<const T*>(nullptr), call.x);
  args.out = map(static_cast<T*>(nullptr), call.out);
  args.x_across = is_across(call.x);
  args.out_across = is_across(call.out);
  args.channels = call.channels;
  args.positions = call.positions;
  args.position_tiles = ceil_div(call.positions, kResidualTile);
  args.channel_tiles = ceil_div(call.channels, kResidualTile);
  args.blocks = residual_blocks(call);
  bool pairs = (args.x_across || has_pairs<T>(call.x, call.channels)) &&
               (args.out_across || has_pairs<T>(call.out, call.channels)) && call.channels % 2 == 0;
  if (Step != ResidualStep::kCopy) {
    args.attended = map(static_cast<const T*>(nullptr), call.attended);
    args.gamma = call.gamma;
    args.sums = call.sums;
    pairs = pairs && has_pairs<T>(call.attended, call.channels);
  }
  int error = 0;
  if constexpr (sizeof(T) == 2) {
    if (pairs) error = launch.template residual<T, 2, Step>(args);
  }
  if (!pairs) error = launch.template residual<T, 1, Step>(args);
  if (error != 0 || Step != ResidualStep::kBackward) return error;
  ResidualSumArgs sum{};
  sum.sums = call.sums;
  sum.count = args.blocks;
  sum.total = call.total;
  sum.blocks = 1;
  return launch.residual_sum(sum);
}

}  // namespace cuda
}  // namespace ccnet
