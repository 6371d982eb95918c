// Forward kernel: one launch attends along one axis, to one range of the keys of every line.
//
// CTA = (line, tile of queries, range of channels). It forms the energies S = Q K^T of its queries against all keys of
// the range, keeps P = exp(S - row maximum) in shared memory, and streams V through P V. The result is merged with
// what the launches before it left (other axes, or other key ranges of a long line): `out` is always the normalised
// attention over all keys so far, and (maximum, sum) its softmax statistics.
#pragma once

#include "lines_io.h"
#include "tile.h"

namespace ccnet {
namespace cuda {

template <typename T>
struct ForwardShape {
  static constexpr int kWarps = sizeof(T) == 2 ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarp;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kBlocksPerSm = 1;  // there is no shared memory for a second, and so registers to spare
#else
  static constexpr int kBlocksPerSm = 2;
#endif
  static constexpr int kQueries = kWarps * 16;               // rows of a CTA
  static constexpr int kKeys = 128;                          // keys of one block
  static constexpr int kChannels = 2 * kPanelWidth<T>;       // channels of one step of P V
  static constexpr int kWarpRows = 32;                       // warp tile of P V
  static constexpr int kWarpColumns = kChannels / 2;
  static_assert(kQueries / kWarpRows * 2 == kWarps, "the warps cover queries x channels");

  // Shared memory: two stages, the row scales, P.
  static constexpr int kStageBytes = 2 * panel_bytes(kKeys);
  static_assert(panel_bytes(kQueries) + panel_bytes(kKeys) <= kStageBytes, "a stage holds a panel of Q and one of K");
  static constexpr int kScalesOffset = 2 * kStageBytes;
  static constexpr int kWeightsOffset = kScalesOffset + 2 * kQueries * static_cast<int>(sizeof(float));
  static constexpr int kWeightsBytes = kQueries * kKeys * static_cast<int>(sizeof(T));  // of one key block
  static constexpr int shared_bytes(int key_blocks) { return kWeightsOffset + key_blocks * kWeightsBytes; }
};

template <typename T>
struct ForwardArgs {
  LineGrid lines;
  LineStrides position;      // of (B, N) statistics
  bool drop_self;
  int length;                // positions of a line
  int first_key, keys;       // the range of keys of this launch
  int qk_channels, channels; // C', C
  Input<T> query, key, value;
  Output<T> out;
  const Stats<float>* stats_in;  // (B, N); null on the first launch: nothing attended yet
  Stats<float>* stats_out;       // (B, N); null on the last
  float* lse;                    // (B, N); null except on the last
  int query_tiles, splits, steps_per_split;
  int64_t first_block, blocks;
};

template <typename T>
CCNET_KERNEL(ForwardShape<T>::kThreads, ForwardShape<T>::kBlocksPerSm)
void forward_kernel(ForwardArgs<T> a) {
  using Shape = ForwardShape<T>;
  using ScoreTile = WarpTile<T, 16, Shape::kKeys, Order::kOuter, Order::kOuter>;
  using OutTile = WarpTile<T, Shape::kWarpRows, Shape::kWarpColumns, Order::kOuter, Order::kDepth>;
  constexpr int kWidth = kPanelWidth<T>;

  const int64_t block = a.first_block + block_index();
  const int warp = thread_index() / kWarp;
  const int64_t tiles = static_cast<int64_t>(a.query_tiles) * a.splits;
  const int64_t line_number = block / tiles;
  const int within = static_cast<int>(block - line_number * tiles);
  const int split = within % a.splits;
  const int query0 = within / a.splits * Shape::kQueries;
  const Line line = find_line(a.lines, line_number);
  const Rows<T> query = rows_of(a.query, line);
  const Rows<T> key = rows_of(a.key, line);
  const Rows<T> value = rows_of(a.value, line);

  T* const out_line = a.out.data + offset_of(line, a.out.strides);

  char* const shared = dynamic_shared();
  char* const scales = shared + Shape::kScalesOffset;  // of P V, then of the old output; one per row
  const auto stage = [&](int s) { return shared + (s & 1) * Shape::kStageBytes; };
  const auto weights = [&](int key_block) {
    return Panels{shared + Shape::kWeightsOffset + key_block * Shape::kWeightsBytes, Shape::kQueries};
  };

  const int key_blocks = static_cast<int>(ceil_div(a.keys, Shape::kKeys));
  const int key_end = a.first_key + a.keys;
  const int qk_steps = static_cast<int>(ceil_div(a.qk_channels, kWidth));
  const int step0 = split * a.steps_per_split;
  const int step_end =
      min_of(step0 + a.steps_per_split, static_cast<int>(ceil_div(a.channels, Shape::kChannels)));

  const auto fetch_scores = [&](int key_block, int qk_step, char* to) {
    load_panel<T, Shape::kQueries, Shape::kThreads>(to, query, query0, a.length, qk_step * kWidth, a.qk_channels);
    load_panel<T, Shape::kKeys, Shape::kThreads>(to + panel_bytes(Shape::kQueries), key,
                                                 a.first_key + key_block * Shape::kKeys, key_end, qk_step * kWidth,
                                                 a.qk_channels);
  };
  const auto fetch_values = [&](int step, int key_block, char* to) {
    CCNET_UNROLL_BY(1)
    for (int p = 0; p < 2; ++p) {
      const int channel = step * Shape::kChannels + p * kWidth;
      if (channel >= a.channels) break;
      load_panel<T, Shape::kKeys, Shape::kThreads>(to + p * panel_bytes(Shape::kKeys), value,
                                                   a.first_key + key_block * Shape::kKeys, key_end, channel,
                                                   a.channels);
    }
  };

  int step = 0;  // counts the stages consumed
  fetch_scores(0, 0, stage(0));

  // Energies and statistics. With one key block its weights are formed at once. With more, a second round recomputes
  // the energies when the maximum of all is known.
  {
    ScoreTile scores;
    Stats<float> stats[ScoreTile::kLaneRows];
    CCNET_UNROLL
    for (int r = 0; r < ScoreTile::kLaneRows; ++r) stats[r] = empty_stats<float>();
    const int row0 = warp * 16;
    const bool in_line = query0 + row0 < a.length;
      const int rounds = key_blocks == 1 ? 1 : 2 * key_blocks;

    CCNET_UNROLL_BY(1)
    for (int round = 0; round < rounds; ++round) {
      const bool first_round = round < key_blocks;
      const int key_block = first_round ? round : round - key_blocks;
      const int key0 = a.first_key + key_block * Shape::kKeys;
      scores.clear();
      CCNET_UNROLL_BY(1)
      for (int qk_step = 0; qk_step < qk_steps; ++qk_step) {
        wait_copies();
        barrier();
        if (qk_step + 1 < qk_steps || round + 1 < rounds) {
          const bool same = qk_step + 1 < qk_steps;
          const int next = round + 1 < key_blocks ? round + 1 : round + 1 - key_blocks;
          fetch_scores(same ? key_block : next, same ? qk_step + 1 : 0, stage(step + 1));
        } else {
          fetch_values(step0, 0, stage(step + 1));
        }
        if (in_line) {
          const int depth = min_of(kWidth, round_up(a.qk_channels - qk_step * kWidth, ScoreTile::kDepthStep));
          scores.multiply(Panels{stage(step), Shape::kQueries}, row0,
                          Panels{stage(step) + panel_bytes(Shape::kQueries), Shape::kKeys}, 0, depth);
        }
        ++step;
      }

      const int thread = recompute(thread_index());
      CCNET_UNROLL
      for (int r = 0; r < ScoreTile::kLaneRows; ++r) {
        const int i = query0 + row0 + ScoreTile::row(thread, r);
        float block_max = -INFINITY;
        CCNET_UNROLL
        for (int c = 0; c < ScoreTile::kLaneColumns; ++c) {
          const int j = key0 + ScoreTile::column(thread, c);
          if (j >= key_end || (a.drop_self && i == j)) scores.at(r, c) = -INFINITY;
          block_max = fmaxf(block_max, scores.at(r, c));
        }
        float reference = stats[r].max;
        if (first_round) reference = fmaxf(reference, ScoreTile::row_max(block_max));
        const float finite_reference = reference == -INFINITY ? 0.f : reference;  // nothing but masked keys so far
        float sum = 0.f;
        CCNET_UNROLL
        for (int c = 0; c < ScoreTile::kLaneColumns; ++c) {
          scores.at(r, c) = exp2f((scores.at(r, c) - finite_reference) * kLog2E);
          sum += scores.at(r, c);
        }
        if (first_round) {
          const float kept = exp2f((stats[r].max - finite_reference) * kLog2E);  // 0 when there was nothing
          stats[r].sum = stats[r].sum * kept + ScoreTile::row_sum(sum);
          stats[r].max = reference;
        }
      }

      if (!first_round || key_blocks == 1) {
        CCNET_UNROLL
        for (int r = 0; r < ScoreTile::kLaneRows; ++r) {
          CCNET_UNROLL
          for (int c = 0; c < ScoreTile::kLaneColumns; c += ScoreTile::kRun) {
            float v[ScoreTile::kRun];
            CCNET_UNROLL
            for (int e = 0; e < ScoreTile::kRun; ++e) v[e] = scores.at(r, c + e);
            ScoreTile::put(weights(key_block), thread, row0, 0, r, c, v);
          }
        }
      }
    }

      const int64_t line_start = offset_of(line, a.position);
    CCNET_UNROLL
    for (int r = 0; r < ScoreTile::kLaneRows; ++r) {
      const int i = query0 + row0 + ScoreTile::row(thread_index(), r);
      if (!ScoreTile::leads_row()) continue;
      float new_scale = 0.f, old_scale = 0.f;
      if (i < a.length) {
        const int64_t position = line_start + i * a.position.step;
        Stats<float> before = empty_stats<float>();
        if (a.stats_in != nullptr) before = load_global(a.stats_in + position);
        const Merge<float> merged = merge(before, stats[r]);
        if (merged.stats.sum > 0.f) {
          new_scale = merged.scale_b / merged.stats.sum;
          old_scale = before.sum * merged.scale_a / merged.stats.sum;
        }
        if (split == 0) {
          if (a.stats_out != nullptr) store_global(a.stats_out + position, merged.stats);
          if (a.lse != nullptr) store_global(a.lse + position, log_sum_exp(merged.stats));
        }
      }
      store_shared(scales + (row0 + ScoreTile::row(thread_index(), r)) * sizeof(float), new_scale);
      store_shared(scales + (Shape::kQueries + row0 + ScoreTile::row(thread_index(), r)) * sizeof(float), old_scale);
    }
  }

  // out = P V * new_scale + out * old_scale
  OutTile sums;
  const int row0 = warp / 2 * Shape::kWarpRows;
  const int column0 = warp % 2 * Shape::kWarpColumns;
  CCNET_UNROLL_BY(1)
  for (int s = step0; s < step_end; ++s) {
    const bool at_work = query0 + row0 < a.length && s * Shape::kChannels + column0 < a.channels;
    sums.clear();
    CCNET_UNROLL_BY(1)
    for (int key_block = 0; key_block < key_blocks; ++key_block) {
      wait_copies();
      barrier();
      const bool more = key_block + 1 < key_blocks;
      if (more || s + 1 < step_end) fetch_values(more ? s : s + 1, more ? key_block + 1 : 0, stage(step + 1));
      if (at_work) {
        const int depth =
            min_of(Shape::kKeys, round_up(a.keys - key_block * Shape::kKeys, OutTile::kDepthStep));
        sums.multiply(weights(key_block), row0, Panels{stage(step), Shape::kKeys}, column0, depth);
      }
      ++step;
    }
    if (!at_work) continue;
    TileWriter<T, OutTile> writer(out_line, a.out, query0 + row0, a.length, s * Shape::kChannels + column0,
                                  a.channels);
    const bool kept = a.stats_in != nullptr;
    const auto row_scales = [&](int row, float& new_scale, float& old_scale) {
      const char* const p = scales + (row0 + row) * static_cast<int>(sizeof(float));
      new_scale = load_shared<float>(p);
      old_scale = load_shared<float>(p + Shape::kQueries * sizeof(float));
    };
    if (kept) {
      writer.add(sums, row_scales);
    } else {
      writer.write(sums, false, row_scales);
    }
  }
}

}  // namespace cuda
}  // namespace ccnet
