// Forward kernel for compute capability 9.0, fp16 and bf16: what forward.h does, with wgmma and TMA.
//
// CTA = (tile of lines, range of channels), two warpgroups of 64 query rows each. S = Q K^T and P = exp(S - row maximum)
// stay in registers, where P is the left operand of P V; V streams through a ring of panels. The result is merged with
// what the launches before it left, as in forward.h. One launch attends to up to Blocks * 128 keys of a line.
#pragma once

#include "hopper_ring.h"

namespace ccnet {
namespace cuda {

template <int Blocks>
struct HopperForwardShape {
  static constexpr int kThreads = 2 * kWarpgroup;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kSlots = 5;
  // Two panels more, in which each warp has 16 rows to rearrange its output: one for the step under way, and one for what
  // the next step adds to.
  static constexpr int kOutPanels = 2;
  using PanelRing = Ring<kSlots, kThreads / kWarp, kOutPanels>;
  static constexpr int kRowsOffset = PanelRing::kBytes;  // where the tile's rows lie in the output, see below
  static constexpr int kSharedBytes = kRowsOffset + kTileRows * static_cast<int>(sizeof(uint32_t));
};

template <typename T>
struct HopperForwardArgs {
  TensorMap query, key, value;
  Tiling tiling;
  LineStrides position;  // of (B, N) statistics
  bool drop_self;
  Divisor within;             // of the CTAs of one group of lines: query tiles x splits
  Divisor by_split;           // of splits
  int first_key;              // position at which the keys of this launch begin
  int qk_channels, channels;  // C', C
  Output<T> out;
  const Stats<float>* stats_in;  // (B, N); null on the first launch: nothing attended yet
  Stats<float>* stats_out;       // (B, N); null on the last
  float* lse;                    // (B, N); null except on the last
  int steps_per_split;           // a range of channels, in panels
  int blocks;
};

// A lane's part of a warp's 16 rows of an output panel, as it is moved between shared and global memory: segment lane % 8
// of the rows lane / 8 + 4 i.
struct OutputRows {
  char* warp_rows;
  char* segments;
  int segment_place;
  const char* places;  // where the rows lie in the output

  CCNET_DEVICE OutputRows(int thread, char* panel, const char* out_rows)
      : warp_rows(panel + thread / kWarp * 16 * kRowBytes),
        segments(warp_rows + thread % kWarp / 8 * kRowBytes),
        segment_place((thread % 8 ^ thread % kWarp / 8) * kSegmentBytes),
        places(out_rows + (thread / kWarp * 16 + thread % kWarp / 8) * sizeof(uint32_t)) {}
  CCNET_DEVICE char* segment(int i) const { return segments + i * 4 * kRowBytes + (segment_place ^ i % 2 * 64); }
  CCNET_DEVICE uint32_t place(int i) const { return load_shared<uint32_t>(places + 4 * i * sizeof(uint32_t)); }
};

template <typename T, int Blocks>
CCNET_KERNEL(HopperForwardShape<Blocks>::kThreads, HopperForwardShape<Blocks>::kBlocksPerSm)
void hopper_forward_kernel(CCNET_CONSTANT_PARAMETER HopperForwardArgs<T> a) {
  using Shape = HopperForwardShape<Blocks>;
  using PanelRing = typename Shape::PanelRing;
  constexpr int kWidth = kPanelWidth<T>;
  constexpr int kDepthSteps = kWidth / 16;             // of one panel of C'
  constexpr int kKeySteps = kTileRows / 16;            // of one block of keys
  constexpr int kDepthStep = 16 * 2 >> 4;              // in a descriptor: 16 elements along a row
  constexpr int kRowStep = 16 * kRowBytes >> 4;        // in a descriptor: 16 rows
  // Energies are computed for so many keys at once. Where that is not all of them, for every unit twice but the last:
  // first for the row maximum, then for P. Registers for all energies at once there are not.
  constexpr int kUnit = Blocks == 1 ? kTileRows : kTileRows / 2;
  constexpr int kUnits = Blocks * kTileRows / kUnit;
  constexpr int kEvaluations = 2 * kUnits - 1;

  const Tiling& tiling = a.tiling;
  const int group_number = static_cast<int>(a.within.quotient(static_cast<uint32_t>(block_index())));
  const int within = static_cast<int>(block_index()) - group_number * static_cast<int>(a.within.divisor);
  const int query_tile = static_cast<int>(a.by_split.quotient(static_cast<uint32_t>(within)));
  const int split = within - query_tile * static_cast<int>(a.by_split.divisor);
  const int query0 = query_tile * kTileRows;

  PanelRing ring(dynamic_shared());
  allow_next_launch();
  ring.start();
  ring.clear_tails(tile_rows(tiling));
  // In segments, which keeps it in 32 bits (the plan sees to that).
  char* const out_rows = dynamic_shared() + Shape::kRowsOffset;
  {
    const Line group = find_group(tiling, group_number);
    ring.keep_place(group);
    if (thread_index() < kTileRows) {
      const TileRow row = tile_row(tiling, thread_index());
      store_shared<uint32_t>(
          out_rows + thread_index() * sizeof(uint32_t),
          row_exists(tiling, group, query0, row)
              ? static_cast<uint32_t>(row_offset(a.out.strides, group, query0, row) / kSegmentLength<T>)
              : kNoRow);
    }
  }
  barrier();

  // The items in order: panels of Q and K, then of V.
  const int qk_panels = static_cast<int>(ceil_div(a.qk_channels, kWidth));
  const bool resident = Blocks > 1 && qk_panels == 1;  // Q and K stay until all energies are there
  const int score_items = resident ? 1 + Blocks : 2 * qk_panels * kEvaluations;
  const int step0 = split * a.steps_per_split;
  const int steps = min_of(a.steps_per_split, static_cast<int>(ceil_div(a.channels, kWidth)) - step0);
  const int items = score_items + steps * Blocks;
  const auto load = [&](int item, char* panel, SharedBarrier* full) {
    const TensorMap* map = &a.value;
    int row = 0, channel = 0;
    if (item >= score_items) {
      const int v = item - score_items;
      channel = (step0 + v / Blocks) * kWidth;
      row = a.first_key + v % Blocks * kTileRows;
    } else if (resident) {
      map = item == 0 ? &a.query : &a.key;
      row = item == 0 ? query0 : a.first_key + (item - 1) * kTileRows;
    } else {
      const int evaluation = qk_panels == 1 ? item / 2 : item / (2 * qk_panels);
      const bool of_query = item % 2 == 0;
      map = of_query ? &a.query : &a.key;
      row = of_query ? query0 : a.first_key + evaluation % kUnits * kUnit / kTileRows * kTileRows;
      channel = (item / 2 - evaluation * qk_panels) * kWidth;
    }
    load_box(panel, map, channel, row, ring.place(0), ring.place(1), ring.place(2), full);
  };
  // Fills the slots of the first `released` items.
  const auto refill = [&](int released) {
    if (thread_index() == 0) {
      ring.fill(min_of(released + Shape::kSlots, items), tile_rows(tiling) * kRowBytes, load);
    }
    converge_warp();
  };
  refill(0);

  // What earlier launches have left in a step's channels, for the step to add to: there after wait_copies().
  const bool kept = a.stats_in != nullptr;
  Segment* const out = reinterpret_cast<Segment*>(a.out.data);
  const auto fetch_old = [&](int step) {
    const int thread = recompute(thread_index());
    const OutputRows rows(thread, ring.panel(Shape::kSlots + step % Shape::kOutPanels), out_rows);
    const int segment = (step0 + step) * kRowSegments + thread % 8;
    const bool exists = segment * kSegmentLength<T> < a.channels;
    CCNET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = rows.place(i);
      const bool there = exists && row != kNoRow;
      copy_async(rows.segment(i), out + (there ? row + segment : 0), there ? kSegmentBytes : 0);
    }
  };

  const auto own_row = [](int thread) { return thread / kWarp * 16 + thread % kWarp / 4; };  // and the one 8 further

  uint32_t weights[Blocks][kKeySteps][4];  // P, as left operands
  float new_scale[2], old_scale[2];
  {
    float scores[kUnit / 2];
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f};
    const char* q = nullptr;
    const char* k[Blocks];
    if (resident) {
      q = ring.take();
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) k[b] = ring.take();
    }
    CCNET_UNROLL
    for (int evaluation = 0; evaluation < kEvaluations; ++evaluation) {
      const int unit = evaluation % kUnits;
      const int key_block = unit * kUnit / kTileRows;
      const int unit_row = unit * kUnit % kTileRows;  // of its block
      CCNET_UNROLL_BY(1)
      for (int p = 0; p < qk_panels; ++p) {
        if (!resident) {
          q = ring.take();
          k[key_block] = ring.take();
        }
        const uint64_t q_matrix = panel_descriptor(q + thread_index() / kWarpgroup * 64 * kRowBytes);
        const uint64_t k_matrix = panel_descriptor(k[key_block] + unit_row * kRowBytes);
        hold(scores);
        begin_products();
        CCNET_UNROLL
        for (int d = 0; d < kDepthSteps; ++d) {
          WarpgroupProduct<T, kUnit>::template multiply<Major::kDepth, Major::kDepth>(
              scores, q_matrix + d * kDepthStep, k_matrix + d * kDepthStep, p > 0 || d > 0);
        }
        commit_products();
        wait_products<0>();
        hold(scores);
        if (!resident) {
          ring.template release<2>();
          refill(2 * (evaluation * qk_panels + p));  // not the two just released: other warps may still read them
        }
      }

      const int thread = recompute(thread_index());
      const int key0 = a.first_key + key_block * kTileRows;
      const Partners partners[2] = {
          partners_of(tiling, tile_row(tiling, own_row(thread)), query0, key0, a.drop_self),
          partners_of(tiling, tile_row(tiling, own_row(thread) + 8), query0, key0, a.drop_self)};
      CCNET_UNROLL
      for (int j = 0; j < kUnit / 8; ++j) {
        // Of a line on its own most eights of keys need no mask: only those beyond its end, and on the diagonal.
        const int first = unit_row + 8 * j;
        const bool at_end = key0 + first + 8 > tiling.length;
        const bool on_diagonal = a.drop_self && (key0 + first) / 16 == query0 / 16 + thread / kWarp;
        if (tiling.group == 1 && !at_end && !on_diagonal) continue;
        CCNET_UNROLL
        for (int e = 0; e < 4; ++e) {
          if (!partners[e / 2].has(first + thread % 4 * 2 + e % 2)) scores[4 * j + e] = -INFINITY;
        }
      }
      CCNET_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (evaluation < kUnits) {
          float m[4] = {row_max[r], -INFINITY, -INFINITY, -INFINITY};
          CCNET_UNROLL
          for (int i = 0; i < kUnit / 4; ++i) m[i % 4] = fmaxf(m[i % 4], scores[4 * (i / 2) + 2 * r + i % 2]);
          m[0] = fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3]));
          m[0] = fmaxf(m[0], shuffle_xor(m[0], 1));
          row_max[r] = fmaxf(m[0], shuffle_xor(m[0], 2));
        }
        if (evaluation >= kUnits - 1) {
          const float reference = row_max[r] == -INFINITY ? 0.f : row_max[r] * -kLog2E;  // 0: nothing but masked keys
          float sum[2] = {0.f, 0.f};
          CCNET_UNROLL
          for (int j = 0; j < kUnit / 8; ++j) {
            const float low = exp2_rounded(fmaf(scores[4 * j + 2 * r], kLog2E, reference));
            const float high = exp2_rounded(fmaf(scores[4 * j + 2 * r + 1], kLog2E, reference));
            sum[0] += low;
            sum[1] += high;
            weights[key_block][unit_row / 16 + j / 2][j % 2 * 2 + r] = pack<T>(low, high);
          }
          row_sum[r] += sum[0] + sum[1];
        }
      }
    }
    if (resident) {
      ring.template release<1 + Blocks>();
    }

    // Merged with the keys of earlier launches.
    if (kept) {
      wait_for_previous_launch();
      fetch_old(0);
    }
    const Line group = ring.group();
    const int thread = recompute(thread_index());
    CCNET_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += shuffle_xor(row_sum[r], 1);
      row_sum[r] += shuffle_xor(row_sum[r], 2);
      new_scale[r] = old_scale[r] = 0.f;
      const TileRow row = tile_row(tiling, own_row(thread) + 8 * r);
      if (!row_exists(tiling, group, query0, row)) continue;
      const int64_t position = row_offset(a.position, group, query0, row);
      Stats<float> before = empty_stats<float>();
      if (kept) before = load_global(a.stats_in + position);
      const float max = fmaxf(before.max, row_max[r]);
      // exp(-inf - -inf) is NaN: an empty set counts for nothing.
      const float old_part = before.sum > 0.f ? before.sum * exp2_rounded((before.max - max) * kLog2E) : 0.f;
      const float new_part = row_sum[r] > 0.f ? exp2_rounded((row_max[r] - max) * kLog2E) : 0.f;
      const Stats<float> merged{max, fmaf(new_part, row_sum[r], old_part)};
      if (merged.sum > 0.f) {
        const float inverse = 1.f / merged.sum;
        new_scale[r] = new_part * inverse;
        old_scale[r] = old_part * inverse;
      }
      if (split == 0 && thread % 4 == 0) {
        if (a.stats_out != nullptr) store_global(a.stats_out + position, merged);
        if (a.lse != nullptr) store_global(a.lse + position, log_sum_exp(merged));
      }
    }
  }

  // out = P V * new_scale + out * old_scale. A warp's 16 rows of a panel go through shared memory, since the fragments
  // of wgmma hold two channels where memory wants eight: a lane reads and writes segment lane % 8 of the rows
  // lane / 8 + 4 i, whole 128-byte lines together.
  refill(score_items);
  CCNET_UNROLL_BY(1)
  for (int step = 0; step < steps; ++step) {
    const int thread = Blocks == 1 ? thread_index() : recompute(thread_index());  // where registers are short
    const OutputRows rows(thread, ring.panel(Shape::kSlots + step % Shape::kOutPanels), out_rows);
    // Of a fragment of 16 rows x 16 channels, as load_matrices() and store_matrices() take them.
    char* const fragments = rows.warp_rows + thread % 16 * kRowBytes;
    const int fragment_place = (thread % kWarp / 16 ^ thread % 8) * kSegmentBytes;
    const auto fragment_at = [&](int i) { return fragments + (fragment_place ^ i * 32); };
    const int segment = (step0 + step) * kRowSegments + thread % 8;
    const bool exists = segment * kSegmentLength<T> < a.channels;

    float sums[kWidth / 2];
    hold(sums);
    const char* v[Blocks];
    CCNET_UNROLL
    for (int b = 0; b < Blocks; ++b) v[b] = ring.take();
    begin_products();
    CCNET_UNROLL
    for (int b = 0; b < Blocks; ++b) {
      const uint64_t v_matrix = panel_descriptor(v[b]);
      CCNET_UNROLL
      for (int s = 0; s < kKeySteps; ++s) {
        WarpgroupProduct<T, kWidth>::template multiply<Major::kOuter>(sums, weights[b][s], v_matrix + s * kRowStep,
                                                                      b > 0 || s > 0);
      }
    }
    commit_products();
    if (kept) {
      wait_copies();
      if (step + 1 < steps) fetch_old(step + 1);
    }
    wait_products<0>();
    hold(sums);
    ring.template release<Blocks>();
    refill(score_items + step * Blocks);  // brings the lanes together, too: the old rows are there
    CCNET_UNROLL
    for (int i = 0; i < 4; ++i) {  // 16 channels
      uint32_t words[4];
      if (kept) load_matrices(words, fragment_at(i));
      CCNET_UNROLL
      for (int w = 0; w < 4; ++w) {
        const int r = w % 2;
        float* const sum = sums + 8 * i + w / 2 * 4 + 2 * r;
        if (kept) {
          words[w] = pack<T>(fmaf(to_float<T>(T{static_cast<uint16_t>(words[w])}), old_scale[r], sum[0] * new_scale[r]),
                             fmaf(to_float<T>(T{static_cast<uint16_t>(words[w] >> 16)}), old_scale[r],
                                  sum[1] * new_scale[r]));
        } else {
          words[w] = pack<T>(sum[0] * new_scale[r], sum[1] * new_scale[r]);
        }
      }
      store_matrices(fragment_at(i), words);
    }
    converge_warp();
    CCNET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = rows.place(i);
      if (exists && row != kNoRow) store_global(out + row + segment, load_shared<Segment>(rows.segment(i)));
    }
    converge_warp();
  }
}

}  // namespace cuda
}  // namespace ccnet
