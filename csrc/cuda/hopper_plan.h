// The launches of a call on a GPU of compute capability 9.0: plan.h for the kernels with wgmma and TMA. `launch` runs
// one kernel and returns 0, or an error code that ends the call.
#pragma once

#include "hopper_backward.h"
#include "hopper_forward.h"
#include "plan.h"

namespace ccnet {
namespace cuda {

constexpr int kHopperCapability = 90;

// Whether an output can be written in whole segments.
template <typename T>
bool hopper_output_fits(const TensorRef& t, const Grid& g, int channels) {
  // The kernels count segments of an output in 32 bits.
  constexpr int64_t kMostSegments = int64_t{0xffffffff};
  int64_t last = (g.batch - 1) * t.strides.batch + channels;
  for (int a = 0; a < g.axes; ++a) last += (g.size[a] - 1) * t.strides.axis[a];
  return boxes_fit<T>(t, g, channels) && channels % kSegmentLength<T> == 0 && last / kSegmentLength<T> < kMostSegments;
}

template <typename T>
bool hopper_takes_forward(const ForwardRequest& call) {
  const Grid& g = call.grid;
  return call.device.capability == kHopperCapability &&
         call.device.shared_bytes >= HopperForwardShape<2>::kSharedBytes &&
         boxes_fit<T>(call.query, g, call.qk_channels) && boxes_fit<T>(call.key, g, call.qk_channels) &&
         boxes_fit<T>(call.value, g, call.channels) && hopper_output_fits<T>(call.out, g, call.channels);
}

constexpr int kHopperKeysPerLaunch = 2 * kTileRows;

inline int64_t hopper_forward_launches(const Grid& g) {
  int64_t launches = 0;
  for (int axis = 0; axis < g.axes; ++axis) {
    if (has_keys(g, axis)) launches += ceil_div(g.size[axis], kHopperKeysPerLaunch);
  }
  return launches;
}

inline int64_t hopper_forward_scratch(const Grid& g) {
  return stats_buffers(hopper_forward_launches(g)) * g.batch * g.positions() * int64_t{sizeof(Stats<float>)};
}

// What the L2 cache can keep from one launch to the next while other things pass through it, panel by panel of all
// positions. The caches of recent GPUs have two halves, and what both read stands in both.
class CacheRoom {
 public:
  CacheRoom(const Grid& g, const DeviceInfo& device)
      : panels_(device.l2_bytes * 2 / 5 / (g.batch * g.positions() * kRowBytes)) {}
  // Takes room for the same number of panels of each of so many tensors, `wanted` of them or fewer.
  int64_t take(int64_t wanted, int tensors) {
    const int64_t taken = min_of(wanted, panels_ / tensors);
    panels_ -= taken * tensors;
    return taken;
  }

 private:
  int64_t panels_;
};

// launch.template forward<T, Blocks, Keys>(args)
template <typename T, typename Launch>
int hopper_forward(const ForwardRequest& call, Launch&& launch) {
  const Grid& g = call.grid;
  Stats<float>* const stats = static_cast<Stats<float>*>(call.stats);
  const int64_t positions = g.batch * g.positions();
  const int64_t launches = hopper_forward_launches(g);
  int64_t done = 0;
  for (int axis = 0; axis < g.axes; ++axis) {
    if (!has_keys(g, axis)) continue;
    HopperForwardArgs args{};
    args.tiling = tiling_along(g, axis);
    const Tiling& tiling = args.tiling;
    const auto map = [&](TensorMap* to, const TensorRef& t, int channels) {
      return make_map(to, box_source<T>(t, g, axis, channels, tiling));
    };
    int error = map(&args.query, call.query, call.qk_channels);
    if (error == 0) error = map(&args.key, call.key, call.qk_channels);
    if (error == 0) error = map(&args.value, call.value, call.channels);
    if (error == 0) error = map(&args.out, call.out, call.channels);
    if (error != 0) return error;
    args.position = row_strides(strides_along(g, scalar_strides(g), axis), 1);
    args.drop_self = !keeps_self(g.axes, axis);
    args.qk_channels = call.qk_channels;
    args.channels = call.channels;
    const int64_t tiles = line_groups(tiling, g.batch) * tiling.line_tiles;
    const int64_t steps = ceil_div(call.channels, kPanelWidth<T>);
    for (int64_t first_key = 0; first_key < tiling.length; first_key += kHopperKeysPerLaunch, ++done) {
      args.first_key = static_cast<int>(first_key);
      const int64_t keys = tiling.group > 1 ? tile_rows(tiling) : tiling.length - first_key;
      const bool two_blocks = keys > kTileRows;
      // A job for each place on the machine, where there are channels enough to share out.
      const int64_t places =
          (two_blocks ? HopperForwardShape<2>::kBlocksPerSm : HopperForwardShape<1>::kBlocksPerSm) *
          int64_t{call.device.multiprocessors};
      int64_t splits = places / tiles;
      splits = splits < 1 ? 1 : splits > steps ? steps : splits;
      args.steps_per_split = static_cast<int>(ceil_div(steps, splits));
      splits = ceil_div(steps, args.steps_per_split);
      args.by_split = divisor_of(splits);
      args.within = divisor_of(tiling.line_tiles * splits);
      args.jobs = static_cast<int>(tiles * splits);
      args.blocks = static_cast<int>(args.jobs < places ? args.jobs : places);
      const bool last = done + 1 == launches;
      if (!last) {
        // The output first: what is written again before it has gone is not written twice.
        CacheRoom room(g, call.device);
        args.kept_out_steps = static_cast<int>(room.take(steps, 1) / splits);
        args.kept_value_steps = static_cast<int>(room.take(steps, 1) / splits);
      }
      args.backwards = done % 2 != 0;
      args.stats_in = done == 0 ? nullptr : stats + (done - 1) % 2 * positions;
      args.stats_out = last ? nullptr : stats + done % 2 * positions;
      args.lse = last ? call.lse : nullptr;
      error = two_blocks          ? launch.template forward<T, 2, kTileRows>(args)
              : keys > kFewerRows ? launch.template forward<T, 1, kTileRows>(args)
                                  : launch.template forward<T, 1, kFewerRows>(args);
      if (error != 0) return error;
    }
  }
  return 0;
}

// The step from a position (B, *S) to the next, where it is the same all over; otherwise 0.
inline int64_t position_step(const TensorRef& t, const Grid& g) {
  int64_t step = 0, positions = 1;
  const auto joins = [&](int64_t size, int64_t stride) {
    if (size > 1 && step == 0 && positions == 1) step = stride;
    const bool even = size == 1 || stride == step * positions;
    positions *= size;
    return even;
  };
  for (int a = g.axes - 1; a >= 0; --a) {
    if (!joins(g.size[a], t.strides.axis[a])) return 0;
  }
  if (!joins(g.batch, t.strides.batch)) return 0;
  return positions == 1 ? 1 << 16 : step;  // of a single position any
}

template <typename T>
bool hopper_takes_backward(const BackwardRequest& call) {
  const Grid& g = call.grid;
  bool takes = call.device.capability == kHopperCapability &&
               call.device.shared_bytes >= HopperBackwardShape<T, 1, true>::kSharedBytes &&
               call.device.shared_bytes >= HopperBackwardShape<T, 2>::kSharedBytes &&
               boxes_fit<T>(call.query, g, call.qk_channels) && boxes_fit<T>(call.key, g, call.qk_channels) &&
               boxes_fit<T>(call.value, g, call.channels) && boxes_fit<T>(call.grad_out, g, call.channels) &&
               boxes_fit<T>(call.out, g, call.channels) &&
               hopper_output_fits<T>(call.grad_query, g, call.qk_channels) &&
               hopper_output_fits<T>(call.grad_key, g, call.qk_channels) &&
               hopper_output_fits<T>(call.grad_value, g, call.channels) && position_step(call.out, g) > 0 &&
               position_step(call.grad_out, g) > 0;
  for (int axis = 0; axis < g.axes; ++axis) takes = takes && g.size[axis] <= 2 * kTileRows;
  return takes;
}

// One CTA for each multiprocessor, or fewer where there are fewer tiles of keys; in whole clusters.
inline int hopper_backward_blocks(const Tiling& tiling, int64_t groups, const DeviceInfo& device) {
  const int64_t clusters = device.multiprocessors / tiling.line_tiles;
  return static_cast<int>((clusters < 1 ? 1 : groups < clusters ? groups : clusters) * tiling.line_tiles);
}

// delta in a launch of its own, which may overlap the first axis's.
template <typename T, typename Launch>
int hopper_delta(const BackwardRequest& call, int blocks, Launch&& launch) {
  const Grid& g = call.grid;
  DenseDeltaArgs<T> args{};
  args.grad_out = static_cast<const T*>(call.grad_out.data);
  args.out = static_cast<const T*>(call.out.data);
  args.grad_out_step = position_step(call.grad_out, g);
  args.out_step = position_step(call.out, g);
  args.positions = g.batch * g.positions();
  args.channels = call.channels;
  args.delta = call.delta;
  const int64_t most = ceil_div(args.positions, 2 * (kDenseDeltaThreads / kWarp));
  args.blocks = most < blocks ? static_cast<int>(most) : blocks;
  return launch.template dense_delta<T>(args);
}

// launch.template backward<T, Blocks, FindsDelta, Rows>(args), launch.template dense_delta<T>(args)
template <typename T, typename Launch>
int hopper_backward(const BackwardRequest& call, Launch&& launch) {
  const Grid& g = call.grid;
  // The first axis needs delta late: where its CTAs leave many multiprocessors free, those compute delta meanwhile.
  // Otherwise it finds delta itself, which saves reading dO once more, if its lines have one tile.
  int first_axis = 0;
  while (first_axis + 1 < g.axes && !has_keys(g, first_axis)) ++first_axis;
  const Tiling first_tiling = tiling_along(g, first_axis);
  const int processors = call.device.multiprocessors;
  const int free = processors - hopper_backward_blocks(first_tiling, line_groups(first_tiling, g.batch), call.device);
  const bool many_free = 4 * free >= processors;
  const bool finds_delta = !many_free && first_tiling.line_tiles == 1;
  if (!finds_delta) {
    const int error = hopper_delta<T>(call, many_free ? free : processors, launch);
    if (error != 0) return error;
  }
  const int64_t steps = ceil_div(call.channels, kPanelWidth<T>);
  bool accumulate = false;
  int last_axis = g.axes - 1;
  while (last_axis > 0 && !has_keys(g, last_axis)) --last_axis;
  int backwards = 0;
  for (int axis = 0; axis < g.axes; ++axis) {
    if (!has_keys(g, axis)) continue;
    HopperBackwardArgs<T> args{};
    args.tiling = tiling_along(g, axis);
    const auto map = [&](TensorMap* to, const TensorRef& t, int channels) {
      return make_map(to, box_source<T>(t, g, axis, channels, args.tiling));
    };
    int error = map(&args.query, call.query, call.qk_channels);
    if (error == 0) error = map(&args.key, call.key, call.qk_channels);
    if (error == 0) error = map(&args.value, call.value, call.channels);
    if (error == 0) error = map(&args.grad_out, call.grad_out, call.channels);
    if (error == 0) error = map(&args.out, call.out, call.channels);
    if (error != 0) return error;
    args.position = row_strides(strides_along(g, scalar_strides(g), axis), 1);
    args.drop_self = !keeps_self(g.axes, axis);
    args.qk_channels = call.qk_channels;
    args.channels = call.channels;
    const auto output = [&](const TensorRef& t, int channels) {
      return segment_output(output_of<T>(t, g, axis, channels), channels);
    };
    args.grad_query = output(call.grad_query, call.qk_channels);
    args.grad_key = output(call.grad_key, call.qk_channels);
    args.grad_value = output(call.grad_value, call.channels);
    args.lse = call.lse;
    args.delta = call.delta;
    args.accumulate = accumulate;
    args.backwards = backwards;
    args.keeps_grads_from = args.keeps_values_from = static_cast<int>(steps);
    if (axis != last_axis) {
      // dV first: what is added to before it has gone is neither written nor read twice.
      CacheRoom room(g, call.device);
      args.keeps_grads_from -= static_cast<int>(room.take(steps, 1));
      args.keeps_values_from -= static_cast<int>(room.take(steps, 2));
    }
    backwards ^= 1;
    args.groups = static_cast<int>(line_groups(args.tiling, g.batch));
    args.blocks = hopper_backward_blocks(args.tiling, args.groups, call.device);
    const int rows = args.tiling.group > 1 ? tile_rows(args.tiling) : args.tiling.length;
    const bool first = finds_delta && axis == first_axis;
    args.overlaps = !first;
    if (first) {
      error = launch.template backward<T, 1, true, kTileRows>(args);
    } else if (args.tiling.line_tiles > 1) {
      error = launch.template backward<T, 2, false, kTileRows>(args);
    } else {
      error = rows > kFewerRows ? launch.template backward<T, 1, false, kTileRows>(args)
                                : launch.template backward<T, 1, false, kFewerRows>(args);
    }
    if (error != 0) return error;
    accumulate = true;
  }
  return 0;
}

}  // namespace cuda
}  // namespace ccnet
