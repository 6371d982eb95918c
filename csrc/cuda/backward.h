// Backward kernels: the delta of every position, then one launch or more for each axis.
//
// A line is cut into blocks of kBlock positions. For a pair (query block, key block) a CTA recomputes
// P = exp(S - lse), accumulates dP = dO V^T over the channels while it writes dV += P^T dO, forms
// dS = P (dP - delta), and writes dQ += dS K and dK += dS^T Q. No two CTAs of a launch share a block, and the pairs of
// one block are taken in a fixed order: no atomics, bitwise the same result every time.
#pragma once

#include "lines_io.h"
#include "tile.h"

namespace ccnet {
namespace cuda {

template <typename T>
struct BackwardShape {
  static constexpr int kWarps = sizeof(T) == 2 ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBlocksPerSm = sizeof(T) == 2 ? 1 : 2;
  static constexpr int kBlock = sizeof(T) == 2 ? 128 : 64;  // positions
  // A CTA takes the pairs of a whole line where that has at most so many blocks. It saves traffic at the price of fewer
  // CTAs: fp32 is bound by arithmetic and needs the CTAs.
  static constexpr int kWholeLineBlocks = sizeof(T) == 2 ? 4 : 1;
  // Warp tiles of S and dP (queries x keys), and of dV, dK, dQ (positions x one panel of channels).
  static constexpr int kPairRows = 32;
  static constexpr int kPairColumns = kBlock / 2;
  static constexpr int kGradRows = sizeof(T) == 2 ? 32 : 16;
  static constexpr int kGradColumns = 32;
  static constexpr int kGradWarpsAcross = kPanelWidth<T> / kGradColumns;
  static_assert(kBlock / kPairRows * 2 == kWarps, "the warps cover queries x keys");
  static_assert(kBlock / kGradRows * kGradWarpsAcross == kWarps, "the warps cover positions x channels");

  // Shared memory: two stages of two panels, then P (later dS).
  static constexpr int kStageBytes = 2 * panel_bytes(kBlock);
  static constexpr int kWeightsOffset = 2 * kStageBytes;
  static constexpr int kSharedBytes = kWeightsOffset + kBlock * kBlock * static_cast<int>(sizeof(T));
};

template <typename T>
struct BackwardArgs {
  LineGrid lines;
  LineStrides position;  // of (B, N) statistics
  bool drop_self;
  int length;
  int qk_channels, channels;
  Input<T> query, key, value, grad_out;
  Output<T> grad_query, grad_key, grad_value;
  const float* lse;    // (B, N)
  const float* delta;  // (B, N)
  bool accumulate;     // an earlier launch has written the gradients
  int line_blocks;     // ceil(length / kBlock)
  bool whole_lines;    // a CTA takes all pairs of a line, one after the other; otherwise
  int shift;           // CTA i of a line takes the pair (i, (i + shift) mod line_blocks)
  int64_t first_block, blocks;
};

// The pair that a CTA takes at its turn `turn`, and whether its blocks hold earlier results to add to.
struct Pair {
  int query_block, key_block;
  bool add_query, add_key;
};
// With whole lines the key blocks are walked to and fro, so that consecutive pairs share a block while it is in cache.
CCNET_HD Pair pair_of_line(int turn, int line_blocks, bool accumulate) {
  const int i = turn / line_blocks, j = turn % line_blocks;
  return {i, i % 2 == 0 ? j : line_blocks - 1 - j, accumulate || j > 0, accumulate || i > 0};
}
CCNET_HD Pair pair_of_launch(int i, int shift, int line_blocks, bool accumulate) {
  return {i, (i + shift) % line_blocks, accumulate || shift > 0, accumulate || shift > 0};
}

template <typename T>
CCNET_KERNEL(BackwardShape<T>::kThreads, BackwardShape<T>::kBlocksPerSm)
void backward_kernel(BackwardArgs<T> a) {
  using Shape = BackwardShape<T>;
  using PairTile = WarpTile<T, Shape::kPairRows, Shape::kPairColumns, Order::kOuter, Order::kOuter>;
  using KeyGradTile = WarpTile<T, Shape::kGradRows, Shape::kGradColumns, Order::kDepth, Order::kDepth>;
  using QueryGradTile = WarpTile<T, Shape::kGradRows, Shape::kGradColumns, Order::kOuter, Order::kDepth>;
  constexpr int kWidth = kPanelWidth<T>;
  constexpr int kBlock = Shape::kBlock;

  const int64_t block = a.first_block + block_index();
  const int64_t line_number = a.whole_lines ? block : block / a.line_blocks;
  const int own_block = static_cast<int>(block - line_number * (a.whole_lines ? 1 : a.line_blocks));
  const int turns = a.whole_lines ? a.line_blocks * a.line_blocks : 1;
  const auto pair_at = [&](int turn) {
    return a.whole_lines ? pair_of_line(turn, a.line_blocks, a.accumulate)
                         : pair_of_launch(own_block, a.shift, a.line_blocks, a.accumulate);
  };
  const Line line = find_line(a.lines, line_number);
  const Rows<T> query = rows_of(a.query, line);
  const Rows<T> key = rows_of(a.key, line);
  const Rows<T> value = rows_of(a.value, line);
  const Rows<T> grad_out = rows_of(a.grad_out, line);
  T* const grad_query = a.grad_query.data + offset_of(line, a.grad_query.strides);
  T* const grad_key = a.grad_key.data + offset_of(line, a.grad_key.strides);
  T* const grad_value = a.grad_value.data + offset_of(line, a.grad_value.strides);
  const int64_t line_start = offset_of(line, a.position);

  char* const shared = dynamic_shared();
  const auto stage = [&](int s) { return shared + (s & 1) * Shape::kStageBytes; };
  const auto query_side = [&](int s) { return Panels{stage(s), kBlock}; };
  const auto key_side = [&](int s) { return Panels{stage(s) + panel_bytes(kBlock), kBlock}; };
  const Panels weights{shared + Shape::kWeightsOffset, kBlock};

  // Each turn consumes stages of (Q, K) panels, then of (dO, V), then of (Q, K) again.
  const int qk_steps = static_cast<int>(ceil_div(a.qk_channels, kWidth));
  const int value_steps = static_cast<int>(ceil_div(a.channels, kWidth));
  const int turn_steps = 2 * qk_steps + value_steps;
  int fetch_turn = 0, fetch_step = 0;
  const auto fetch = [&](char* to) {
    if (fetch_turn == turns) return;
    const Pair pair = pair_at(fetch_turn);
    const bool of_values = fetch_step >= qk_steps && fetch_step < qk_steps + value_steps;
    const int panel = fetch_step < qk_steps ? fetch_step
                      : of_values           ? fetch_step - qk_steps
                                            : fetch_step - qk_steps - value_steps;
    const int channels = of_values ? a.channels : a.qk_channels;
    load_panel<T, kBlock, Shape::kThreads>(to, choose(of_values, grad_out, query), pair.query_block * kBlock, a.length,
                                           panel * kWidth, channels);
    load_panel<T, kBlock, Shape::kThreads>(to + panel_bytes(kBlock), choose(of_values, value, key),
                                           pair.key_block * kBlock, a.length, panel * kWidth, channels);
    if (++fetch_step == turn_steps) {
      fetch_step = 0;
      ++fetch_turn;
    }
  };

  const int warp = thread_index() / kWarp;
  const int pair_row0 = warp / 2 * Shape::kPairRows;
  const int pair_column0 = warp % 2 * Shape::kPairColumns;
  const int grad_row0 = warp / Shape::kGradWarpsAcross * Shape::kGradRows;
  const int grad_column0 = warp % Shape::kGradWarpsAcross * Shape::kGradColumns;
  const auto unscaled = [](int, float& new_scale, float& old_scale) { new_scale = old_scale = 1.f; };

  int step = 0;  // counts the stages consumed
  const auto next_stage = [&]() {
    wait_copies();
    barrier();
    fetch(stage(step + 1));
    return step++;
  };
  fetch(stage(0));

  CCNET_UNROLL_BY(1)
  for (int turn = 0; turn < turns; ++turn) {
    const Pair pair = pair_at(turn);
    const int query0 = pair.query_block * kBlock, key0 = pair.key_block * kBlock;
    const int query_depth = min_of(kBlock, round_up(a.length - query0, PairTile::kDepthStep));
    const int key_depth = min_of(kBlock, round_up(a.length - key0, PairTile::kDepthStep));
    const bool pair_at_work = query0 + pair_row0 < a.length && key0 + pair_column0 < a.length;

    int thread;
    PairTile tile;  // S, then dP
    tile.clear();
    CCNET_UNROLL_BY(1)
    for (int p = 0; p < qk_steps; ++p) {
      const int s = next_stage();
      const int depth = min_of(kWidth, round_up(a.qk_channels - p * kWidth, PairTile::kDepthStep));
      if (pair_at_work) tile.multiply(query_side(s), pair_row0, key_side(s), pair_column0, depth);
    }
    thread = recompute(thread_index());
    CCNET_UNROLL
    for (int r = 0; r < PairTile::kLaneRows; ++r) {
      const int i = query0 + pair_row0 + PairTile::row(thread, r);
      const float lse = i < a.length ? load_global(a.lse + line_start + i * a.position.step) : INFINITY;
      CCNET_UNROLL
      for (int c = 0; c < PairTile::kLaneColumns; c += PairTile::kRun) {
        float v[PairTile::kRun];
        CCNET_UNROLL
        for (int e = 0; e < PairTile::kRun; ++e) {
          const int j = key0 + pair_column0 + PairTile::column(thread, c + e);
          const bool masked = j >= a.length || (a.drop_self && i == j);
          v[e] = masked ? 0.f : exp2f((tile.at(r, c + e) - lse) * kLog2E);
        }
        PairTile::put(weights, thread, pair_row0, pair_column0, r, c, v);
      }
    }

    tile.clear();
    const bool key_at_work = key0 + grad_row0 < a.length;
    CCNET_UNROLL_BY(1)
    for (int p = 0; p < value_steps; ++p) {
      const int s = next_stage();
      const int depth = min_of(kWidth, round_up(a.channels - p * kWidth, PairTile::kDepthStep));
      if (pair_at_work) tile.multiply(query_side(s), pair_row0, key_side(s), pair_column0, depth);
      if (key_at_work && p * kWidth + grad_column0 < a.channels) {
        TileWriter<T, KeyGradTile> writer(grad_value, a.grad_value, key0 + grad_row0, a.length,
                                          p * kWidth + grad_column0, a.channels);
        if (pair.add_key) writer.read();
        KeyGradTile grad;
        grad.clear();
        grad.multiply(weights, grad_row0, query_side(s), grad_column0, query_depth);
        writer.write(grad, pair.add_key, unscaled);
      }
    }

    barrier();  // P is read no more
    thread = recompute(thread_index());
    CCNET_UNROLL
    for (int r = 0; r < PairTile::kLaneRows; ++r) {
      const int i = query0 + pair_row0 + PairTile::row(thread, r);
      const float delta = i < a.length ? load_global(a.delta + line_start + i * a.position.step) : 0.f;
      CCNET_UNROLL
      for (int c = 0; c < PairTile::kLaneColumns; c += PairTile::kRun) {
        float v[PairTile::kRun];
        PairTile::fetch(weights, thread, pair_row0, pair_column0, r, c, v);
        CCNET_UNROLL
        for (int e = 0; e < PairTile::kRun; ++e) v[e] *= tile.at(r, c + e) - delta;
        PairTile::put(weights, thread, pair_row0, pair_column0, r, c, v);
      }
    }

    const bool query_at_work = query0 + grad_row0 < a.length;
    CCNET_UNROLL_BY(1)
    for (int p = 0; p < qk_steps; ++p) {
      const int s = next_stage();
      const int channel = p * kWidth + grad_column0;
      if (channel >= a.qk_channels) continue;
      if (query_at_work) {
        TileWriter<T, QueryGradTile> writer(grad_query, a.grad_query, query0 + grad_row0, a.length, channel,
                                            a.qk_channels);
        if (pair.add_query) writer.read();
        QueryGradTile grad;
        grad.clear();
        grad.multiply(weights, grad_row0, key_side(s), grad_column0, key_depth);
        writer.write(grad, pair.add_query, unscaled);
      }
      if (key_at_work) {
        TileWriter<T, KeyGradTile> writer(grad_key, a.grad_key, key0 + grad_row0, a.length, channel,
                                          a.qk_channels);
        if (pair.add_key) writer.read();
        KeyGradTile grad;
        grad.clear();
        grad.multiply(weights, grad_row0, query_side(s), grad_column0, query_depth);
        writer.write(grad, pair.add_key, unscaled);
      }
    }
  }
}

// delta = sum over channels of dO * O, fp32: one warp for each position.
constexpr int kDeltaThreads = 256;

template <typename T>
struct DeltaArgs {
  LineGrid lines;
  int length;
  int64_t positions;  // B * N
  int channels;
  Input<T> grad_out, out;
  float* delta;  // (B, N)
  int64_t first_block, blocks;
};

template <typename T>
CCNET_KERNEL(kDeltaThreads, 4)
void delta_kernel(DeltaArgs<T> a) {
  constexpr int kLength = kSegmentLength<T>;
  const int lane = thread_index() % kWarp;
  const int64_t position = (a.first_block + block_index()) * (kDeltaThreads / kWarp) + thread_index() / kWarp;
  if (position >= a.positions) return;
  const int64_t line_number = position / a.length, i = position - line_number * a.length;
  const Line line = find_line(a.lines, line_number);
  const T* const grad_out = a.grad_out.data + offset_of(line, a.grad_out.strides) + i * a.grad_out.strides.step;
  const T* const out = a.out.data + offset_of(line, a.out.strides) + i * a.out.strides.step;
  float sum = 0.f;
  if (a.grad_out.vectors && a.out.vectors && a.channels % kLength == 0) {
    CCNET_UNROLL_BY(2)
    for (int c = lane * kLength; c < a.channels; c += kWarp * kLength) {
      float g[kLength], o[kLength];
      unpack<T>(load_global(reinterpret_cast<const Segment*>(grad_out + c)), g);
      unpack<T>(load_global(reinterpret_cast<const Segment*>(out + c)), o);
      CCNET_UNROLL
      for (int e = 0; e < kLength; ++e) sum = fmaf(g[e], o[e], sum);
    }
  } else {
    for (int c = lane; c < a.channels; c += kWarp) {
      const float g = to_float<T>(load_global(grad_out + c * a.grad_out.strides.channel));
      sum = fmaf(g, to_float<T>(load_global(out + c * a.out.strides.channel)), sum);
    }
  }
  CCNET_UNROLL
  for (int bit = 1; bit < kWarp; bit *= 2) sum += shuffle_xor(sum, bit);
  if (lane == 0) store_global(a.delta + position, sum);
}

}  // namespace cuda
}  // namespace ccnet
