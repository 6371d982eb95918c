// Forward kernel for compute capability 9.0, fp16 and bf16: what forward.h does, with wgmma and TMA.
//
// CTA = (tile of lines, range of channels), two warpgroups of 64 query rows each. S = Q K^T and P = exp(S - row maximum)
// stay in registers, where P is the left operand of P V; V streams through a ring of panels. The result is merged with
// what the launches before it left, as in forward.h. One launch attends to up to Blocks * 128 keys of a line.
#pragma once

#include "hopper_ring.h"
#include "quad.h"

namespace ccnet {
namespace cuda {

template <int Blocks>
struct HopperForwardShape {
  static constexpr int kThreads = 2 * kWarpgroup;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kSlots = 7;
  using PanelRing = Ring<kSlots, kThreads / kWarp>;
  static constexpr int kSharedBytes = PanelRing::kBytes;
};

template <typename T>
struct HopperForwardArgs {
  TensorMap query, key, value;
  Tiling tiling;
  LineStrides position;  // of (B, N) statistics
  bool drop_self;
  int first_key;              // position at which the keys of this launch begin
  int qk_channels, channels;  // C', C
  Output<T> out;
  const Stats<float>* stats_in;  // (B, N); null on the first launch: nothing attended yet
  Stats<float>* stats_out;       // (B, N); null on the last
  float* lse;                    // (B, N); null except on the last
  int splits, steps_per_split;   // ranges of channels, in panels
  int64_t first_block, blocks;
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
  const int64_t block = a.first_block + block_index();
  const int within = static_cast<int>(block % (tiling.line_tiles * a.splits));
  const int split = within % a.splits;
  const int query0 = within / a.splits * kTileRows;

  PanelRing ring(dynamic_shared());
  allow_next_launch();
  ring.start();
  ring.keep_place(find_group(tiling, block / (tiling.line_tiles * a.splits)));
  const int box_rows = tiling.group > 1 ? tiling.group * tiling.span : kTileRows;
  ring.clear_tails(box_rows);
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
      const int evaluation = item / (2 * qk_panels);
      const bool of_query = item % 2 == 0;
      map = of_query ? &a.query : &a.key;
      row = of_query ? query0 : a.first_key + evaluation % kUnits * kUnit / kTileRows * kTileRows;
      channel = item / 2 % qk_panels * kWidth;
    }
    load_box(panel, map, channel, row, ring.place(0), ring.place(1), ring.place(2), full);
  };
  const auto refill = [&](int end) {
    if (thread_index() == 0) ring.fill(min_of(end, items), box_rows * kRowBytes, load);
    converge_warp();
  };
  const auto done_with = [&](int count) {
    ring.release(count);
    refill(ring.released - count + Shape::kSlots);  // not yet the slots released just now
  };
  refill(Shape::kSlots);

  const auto own_row = [](int thread) { return thread / kWarp * 16 + thread % kWarp / 4; };  // and the one 8 further

  uint32_t weights[Blocks][kKeySteps][4];  // P, as left operands
  float new_scale[2], old_scale[2];
  // Of the row, in segments, which keeps it in 32 bits (the plan sees to that).
  constexpr uint32_t kNoRow = 0xffffffffu;
  uint32_t out_row[2];
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
        if (!resident) done_with(2);
      }
      const int thread = recompute(thread_index());
      const int column = thread % 4 * 2;
      CCNET_UNROLL
      for (int r = 0; r < 2; ++r) {
        const Partners partners = partners_of(tiling, tile_row(tiling, own_row(thread) + 8 * r), query0,
                                              a.first_key + key_block * kTileRows, a.drop_self);
        if (partners.begin > 0 || partners.count < kTileRows || partners.self >= 0) {
          CCNET_UNROLL
          for (int i = 0; i < kUnit / 4; ++i) {
            float& s = scores[4 * (i / 2) + 2 * r + i % 2];
            if (!partners.has(unit_row + 8 * (i / 2) + column + i % 2)) s = -INFINITY;
          }
        }
        if (evaluation < kUnits) {
          float m = row_max[r];
          CCNET_UNROLL
          for (int i = 0; i < kUnit / 4; ++i) m = fmaxf(m, scores[4 * (i / 2) + 2 * r + i % 2]);
          m = fmaxf(m, shuffle_xor(m, 1));
          row_max[r] = fmaxf(m, shuffle_xor(m, 2));
        }
        if (evaluation >= kUnits - 1) {
          const float reference = row_max[r] == -INFINITY ? 0.f : row_max[r];  // nothing but masked keys
          CCNET_UNROLL
          for (int j = 0; j < kUnit / 8; ++j) {
            const float low = exp2_rounded((scores[4 * j + 2 * r] - reference) * kLog2E);
            const float high = exp2_rounded((scores[4 * j + 2 * r + 1] - reference) * kLog2E);
            row_sum[r] += low + high;
            weights[key_block][unit_row / 16 + j / 2][j % 2 * 2 + r] = pack<T>(low, high);
          }
        }
      }
    }
    if (resident) done_with(1 + Blocks);

    if (a.stats_in != nullptr) wait_for_previous_launch();
    const Line group = ring.group();
    const int thread = recompute(thread_index());
    CCNET_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += shuffle_xor(row_sum[r], 1);
      row_sum[r] += shuffle_xor(row_sum[r], 2);
      const TileRow row = tile_row(tiling, own_row(thread) + 8 * r);
      out_row[r] = kNoRow;
      new_scale[r] = old_scale[r] = 0.f;
      if (!row_exists(tiling, group, query0, row)) continue;
      out_row[r] = static_cast<uint32_t>(row_offset(a.out.strides, group, query0, row) / kSegmentLength<T>);
      const int64_t position = row_offset(a.position, group, query0, row);
      Stats<float> before = empty_stats<float>();
      if (a.stats_in != nullptr) before = load_global(a.stats_in + position);
      const Merge<float> merged = merge(before, Stats<float>{row_max[r], row_sum[r]});
      if (merged.stats.sum > 0.f) {
        new_scale[r] = merged.scale_b / merged.stats.sum;
        old_scale[r] = before.sum * merged.scale_a / merged.stats.sum;
      }
      if (split == 0 && thread % 4 == 0) {
        if (a.stats_out != nullptr) store_global(a.stats_out + position, merged.stats);
        if (a.lse != nullptr) store_global(a.lse + position, log_sum_exp(merged.stats));
      }
    }
  }

  // out = P V * new_scale + out * old_scale. A lane's 16 channels of a panel are those of its turn among the four lanes
  // that hold a row: two segments.
  const bool kept = a.stats_in != nullptr;
  Segment* const out = reinterpret_cast<Segment*>(a.out.data);
  CCNET_UNROLL_BY(1)
  for (int step = 0; step < steps; ++step) {
    const int channel = (step0 + step) * kWidth + recompute(thread_index()) % 4 * kSegmentLength<T>;
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
    Segment old[2][2];
    const auto read_old = [&](int r) {
      CCNET_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int c = channel + h * 4 * kSegmentLength<T>;
        old[r][h] = Segment{{0, 0, 0, 0}};
        if (kept && out_row[r] != kNoRow && c < a.channels) {
          old[r][h] = load_global(out + out_row[r] + c / kSegmentLength<T>);
        }
      }
    };
    if (Blocks == 1) {  // with two there are no registers to spare, and more of other warps' work to hide behind
      read_old(0);
      read_old(1);
    }
    wait_products<0>();
    hold(sums);
    done_with(Blocks);
    CCNET_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (Blocks > 1) read_old(r);
      CCNET_UNROLL
      for (int h = 0; h < 2; ++h) {
        uint32_t words[4];
        if (kept) {
          transpose_words(old[r][h].word);
          CCNET_UNROLL
          for (int j = 0; j < 4; ++j) {
            const uint32_t before = old[r][h].word[j];
            float* const sum = sums + 16 * h + 4 * j + 2 * r;
            words[j] = pack<T>(
                fmaf(to_float<T>(T{static_cast<uint16_t>(before)}), old_scale[r], sum[0] * new_scale[r]),
                fmaf(to_float<T>(T{static_cast<uint16_t>(before >> 16)}), old_scale[r], sum[1] * new_scale[r]));
          }
        } else {
          CCNET_UNROLL
          for (int j = 0; j < 4; ++j) {
            float* const sum = sums + 16 * h + 4 * j + 2 * r;
            words[j] = pack<T>(sum[0] * new_scale[r], sum[1] * new_scale[r]);
          }
        }
        transpose_words(words);
        const int c = channel + h * 4 * kSegmentLength<T>;
        if (out_row[r] != kNoRow && c < a.channels) {
          store_global(out + out_row[r] + c / kSegmentLength<T>,
                       Segment{{words[0], words[1], words[2], words[3]}});
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace ccnet
