// The launches of a call: which axes, key ranges and block pairs, how many CTAs, how much shared memory. Host code, the
// same for the GPU and for the emulation: `launch` runs one kernel and returns 0, or an error code that ends the call.
#pragma once

#include "backward.h"
#include "forward.h"
#include "interface.h"

namespace ccnet {
namespace cuda {

// Whether every row of channels begins at a multiple of 16 bytes and is dense.
template <typename T>
bool has_vectors(const TensorRef& t, const Grid& g, int channels) {
  const auto aligned = [](int64_t bytes) { return bytes % kSegmentBytes == 0; };
  bool vectors = (t.strides.channel == 1 || channels == 1) &&
                 aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data) % kSegmentBytes)) &&
                 (g.batch == 1 || aligned(t.strides.batch * static_cast<int64_t>(sizeof(T))));
  for (int a = 0; a < g.axes; ++a) {
    vectors = vectors && (g.size[a] == 1 || aligned(t.strides.axis[a] * static_cast<int64_t>(sizeof(T))));
  }
  return vectors;
}

template <typename T>
Input<T> input_of(const TensorRef& t, const Grid& g, int axis, int channels) {
  return {static_cast<const T*>(t.data), strides_along(g, t.strides, axis), has_vectors<T>(t, g, channels)};
}

template <typename T>
Output<T> output_of(const TensorRef& t, const Grid& g, int axis, int channels) {
  const bool vectors = has_vectors<T>(t, g, channels) && channels % kSegmentLength<T> == 0;
  return {static_cast<T*>(t.data), strides_along(g, t.strides, axis), vectors};
}

// An axis of size 1 that masks self has no keys.
inline bool has_keys(const Grid& g, int axis) { return g.size[axis] > 1 || keeps_self(g.axes, axis); }

// Keys that one forward launch attends to: 128 to 512, as shared memory allows; 0 where it allows not even that.
template <typename T>
int keys_per_launch(const DeviceInfo& device) {
  using Shape = ForwardShape<T>;
  const int blocks = (device.shared_bytes - Shape::shared_bytes(0)) / Shape::kWeightsBytes;
  return blocks < 0 ? 0 : min_of(blocks, 4) * Shape::kKeys;
}

template <typename T>
bool fits(const DeviceInfo& device) {
  return keys_per_launch<T>(device) > 0 && BackwardShape<T>::kSharedBytes <= device.shared_bytes;
}

template <typename T>
int64_t forward_launches(const Grid& g, const DeviceInfo& device) {
  int64_t launches = 0;
  for (int axis = 0; axis < g.axes; ++axis) {
    if (has_keys(g, axis)) launches += ceil_div(g.size[axis], keys_per_launch<T>(device));
  }
  return launches;
}

// The statistics are kept between launches in turn in two buffers: a CTA of a launch may still read what another has
// replaced.
inline int64_t stats_buffers(int64_t launches) { return launches < 2 ? 0 : launches == 2 ? 1 : 2; }

// Bytes of these.
template <typename T>
int64_t forward_scratch(const Grid& g, const DeviceInfo& device) {
  return stats_buffers(forward_launches<T>(g, device)) * g.batch * g.positions() * int64_t{sizeof(Stats<float>)};
}

// Runs `args` over `blocks` CTAs, in several grids where one cannot hold them.
template <typename Args, typename Launch>
int launch_blocks(Args args, int64_t blocks, const DeviceInfo& device, int shared_bytes, Launch& launch) {
  for (int64_t first = 0; first < blocks; first += device.blocks_per_grid) {
    args.first_block = first;
    args.blocks = blocks - first < device.blocks_per_grid ? blocks - first : device.blocks_per_grid;
    const int error = launch(args, shared_bytes);
    if (error != 0) return error;
  }
  return 0;
}

template <typename T, typename Launch>
int forward(const ForwardRequest& call, Launch&& launch) {
  using Shape = ForwardShape<T>;
  const Grid& g = call.grid;
  const DeviceInfo& device = call.device;
  Stats<float>* const stats = static_cast<Stats<float>*>(call.stats);
  const int64_t positions = g.batch * g.positions();
  const int64_t launches = forward_launches<T>(g, device);
  int64_t done = 0;
  for (int axis = 0; axis < g.axes; ++axis) {
    if (!has_keys(g, axis)) continue;
    const int64_t length = g.size[axis];
    // Key ranges of equal numbers of whole blocks.
    const int64_t ranges = ceil_div(length, keys_per_launch<T>(device));
    const int64_t range_keys = ceil_div(ceil_div(length, Shape::kKeys), ranges) * Shape::kKeys;
    for (int64_t first_key = 0; first_key < length; first_key += range_keys, ++done) {
      ForwardArgs<T> args{};
      args.lines = lines_along(g, axis);
      args.position = strides_along(g, scalar_strides(g), axis);
      args.drop_self = !keeps_self(g.axes, axis);
      args.length = static_cast<int>(length);
      args.first_key = static_cast<int>(first_key);
      args.keys = static_cast<int>(length - first_key < range_keys ? length - first_key : range_keys);
      args.qk_channels = call.qk_channels;
      args.channels = call.channels;
      args.query = input_of<T>(call.query, g, axis, call.qk_channels);
      args.key = input_of<T>(call.key, g, axis, call.qk_channels);
      args.value = input_of<T>(call.value, g, axis, call.channels);
      args.out = output_of<T>(call.out, g, axis, call.channels);
      const bool last = first_key + range_keys >= length && done + 1 == launches;
      args.stats_in = done == 0 ? nullptr : stats + (done - 1) % 2 * positions;
      args.stats_out = last ? nullptr : stats + done % 2 * positions;
      args.lse = last ? call.lse : nullptr;
      args.query_tiles = static_cast<int>(ceil_div(length, Shape::kQueries));
      // Two CTAs for each multiprocessor, where there are channels enough to share out.
      const int64_t tiles = g.lines(axis) * args.query_tiles;
      const int64_t steps = ceil_div(call.channels, Shape::kChannels);
      int64_t splits = 2 * device.multiprocessors / tiles;
      splits = splits < 1 ? 1 : splits > steps ? steps : splits;
      args.steps_per_split = static_cast<int>(ceil_div(steps, splits));
      args.splits = static_cast<int>(ceil_div(steps, args.steps_per_split));
      const int shared_bytes = Shape::shared_bytes(static_cast<int>(ceil_div(args.keys, Shape::kKeys)));
      const int error = launch_blocks(args, tiles * args.splits, device, shared_bytes, launch);
      if (error != 0) return error;
    }
  }
  return 0;
}

template <typename T, typename Launch>
int backward(const BackwardRequest& call, Launch&& launch) {
  using Shape = BackwardShape<T>;
  const Grid& g = call.grid;
  const DeviceInfo& device = call.device;
  {
    const int axis = g.axes - 1;  // along the last, positions are numbered line by line
    DeltaArgs<T> args{};
    args.lines = lines_along(g, axis);
    args.length = static_cast<int>(g.size[axis]);
    args.positions = g.batch * g.positions();
    args.channels = call.channels;
    args.grad_out = input_of<T>(call.grad_out, g, axis, call.channels);
    args.out = input_of<T>(call.out, g, axis, call.channels);
    args.delta = call.delta;
    const int64_t blocks = ceil_div(args.positions, kDeltaThreads / kWarp);
    const int error = launch_blocks(args, blocks, device, 0, launch);
    if (error != 0) return error;
  }
  bool accumulate = false;
  for (int axis = 0; axis < g.axes; ++axis) {
    if (!has_keys(g, axis)) continue;
    BackwardArgs<T> args{};
    args.lines = lines_along(g, axis);
    args.position = strides_along(g, scalar_strides(g), axis);
    args.drop_self = !keeps_self(g.axes, axis);
    args.length = static_cast<int>(g.size[axis]);
    args.qk_channels = call.qk_channels;
    args.channels = call.channels;
    args.query = input_of<T>(call.query, g, axis, call.qk_channels);
    args.key = input_of<T>(call.key, g, axis, call.qk_channels);
    args.value = input_of<T>(call.value, g, axis, call.channels);
    args.grad_out = input_of<T>(call.grad_out, g, axis, call.channels);
    args.grad_query = output_of<T>(call.grad_query, g, axis, call.qk_channels);
    args.grad_key = output_of<T>(call.grad_key, g, axis, call.qk_channels);
    args.grad_value = output_of<T>(call.grad_value, g, axis, call.channels);
    args.lse = call.lse;
    args.delta = call.delta;
    args.line_blocks = static_cast<int>(ceil_div(g.size[axis], Shape::kBlock));
    const int64_t lines = g.lines(axis);
    // A CTA that takes a whole line finds most of it in the cache again; that pays while nearly every multiprocessor
    // has a line. Otherwise the blocks of a line go to different CTAs, one launch for each of their pairings.
    args.whole_lines = args.line_blocks == 1 || (args.line_blocks <= Shape::kWholeLineBlocks &&
                                                 4 * lines >= 3 * int64_t{device.multiprocessors});
    const int launches = args.whole_lines ? 1 : args.line_blocks;
    for (args.shift = 0; args.shift < launches; ++args.shift) {
      args.accumulate = accumulate;
      const int64_t blocks = args.whole_lines ? lines : lines * args.line_blocks;
      const int error = launch_blocks(args, blocks, device, Shape::kSharedBytes, launch);
      if (error != 0) return error;
    }
    accumulate = true;
  }
  return 0;
}

}  // namespace cuda
}  // namespace ccnet
