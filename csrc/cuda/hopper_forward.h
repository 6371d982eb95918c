// Forward kernel for compute capability 9.0, fp16 and bf16: what forward.h does, with wgmma and TMA.
//
// A job is a tile of lines and a range of channels; a CTA takes job after job. Two warpgroups compute, each for 64 query
// rows: S = Q K^T and P = exp(S - row maximum) stay in registers, where P is the left operand of P V. One more warp moves
// panels: Q, K and V in, and for each panel of V one of the output out, which it has filled with what the launches before
// left, to be merged with as in forward.h. One launch attends to up to Blocks * 128 keys of a line.
#pragma once

#include "hopper_products.h"
#include "hopper_ring.h"

namespace ccnet {
namespace cuda {

// `Blocks`: tiles of keys. `Keys`: of a tile that are used, 128 or 104.
template <int Blocks, int Keys = kTileRows>
struct HopperForwardShape {
  static_assert(Keys == kTileRows || (Keys == kFewerRows && Blocks == 1), "a long line uses whole tiles");
  static constexpr int kConsumers = 2 * kWarpgroup;
  // With one tile of keys two CTAs hide each other's waits; with two, energies need the registers of both.
  static constexpr int kBlocksPerSm = Blocks == 1 ? 2 : 1;
  // There, the products for the next panel of the output run while one is written, and of each thread's equal share of the
  // registers, 168, the warpgroup that moves panels gives up most.
  static constexpr bool kAhead = Blocks == 2;
  static constexpr int kThreads = kConsumers + (kAhead ? kWarpgroup : kWarp);
  static constexpr int kConsumerRegisters = 216;
  static constexpr int kMoverRegisters = 72;

  static constexpr int kPanelBytes = panel_bytes(kTileRows);
  static constexpr int kSlots = Blocks == 1 ? 4 : 10;
  static constexpr int kOutPanels = Blocks == 1 ? 3 : 4;
  static constexpr int kOutOffset = kSlots * kPanelBytes;
  static constexpr int kBarriersOffset = kOutOffset + kOutPanels * kPanelBytes;
  static constexpr int kOutBarriersOffset = kBarriersOffset + 2 * kSlots * static_cast<int>(sizeof(SharedBarrier));
  static constexpr int kSharedBytes = kOutBarriersOffset + 2 * kOutPanels * static_cast<int>(sizeof(SharedBarrier));

  using PanelRing = StageRing<kSlots, kPanelBytes, kConsumers / kWarp>;
  using OutRing = StageRing<kOutPanels, kPanelBytes, kConsumers / kWarp>;
};

struct HopperForwardArgs {
  TensorMap query, key, value, out;
  Tiling tiling;
  RowStrides position;  // of (B, N) statistics, in elements
  bool drop_self;
  Divisor within;             // of the jobs of one group of lines: query tiles x splits
  Divisor by_split;           // of splits
  int first_key;              // position at which the keys of this launch begin
  int qk_channels, channels;  // C', C
  bool backwards;             // through the channels: first those that the launch before has left in the L2 cache
  // At the end of each job: so many panels of the output, and of V, that the L2 cache keeps for the next launch.
  int kept_out_steps, kept_value_steps;
  const Stats<float>* stats_in;  // (B, N); null on the first launch: nothing attended yet
  Stats<float>* stats_out;       // (B, N); null on the last
  float* lse;                    // (B, N); null except on the last
  int steps_per_split;           // a range of channels, in panels
  int jobs;                      // CTA i takes jobs i, i + blocks, ...
  int blocks;
};

struct HopperForwardJob {
  Line group;
  int query0;        // position at which the tile of queries begins
  int split;
  int step0, steps;  // panels of channels

  CCNET_DEVICE HopperForwardJob(const HopperForwardArgs& a, int number, int panels) {
    const int group_number = static_cast<int>(a.within.quotient(static_cast<uint32_t>(number)));
    const int within = number - group_number * static_cast<int>(a.within.divisor);
    const int query_tile = static_cast<int>(a.by_split.quotient(static_cast<uint32_t>(within)));
    split = within - query_tile * static_cast<int>(a.by_split.divisor);
    query0 = query_tile * kTileRows;
    group = find_group(a.tiling, group_number);
    step0 = split * a.steps_per_split;
    steps = min_of(a.steps_per_split, panels - step0);
  }
  CCNET_DEVICE int channel(const HopperForwardArgs& a, int step, int width) const {
    return (step0 + (a.backwards ? steps - 1 - step : step)) * width;
  }
};

// What the one thread does that moves panels. It takes everything in order: an item is a panel of Q, K or V.
template <typename T, int Blocks, int Keys>
class HopperForwardMover {
  using Shape = HopperForwardShape<Blocks, Keys>;
  static constexpr int kWidth = kPanelWidth<T>;

 public:
  CCNET_DEVICE HopperForwardMover(const HopperForwardArgs& a, const typename Shape::PanelRing& ring,
                                  const typename Shape::OutRing& out)
      : a_(a),
        ring_(ring),
        out_(out),
        qk_items_(static_cast<int>(ceil_div(a.qk_channels, kWidth)) * (1 + Blocks)),
        panels_(static_cast<int>(ceil_div(a.channels, kWidth))),
        bytes_(panel_bytes(tile_rows(a.tiling))),
        load_number_(static_cast<int>(block_index())),
        load_job_(a, load_number_, panels_) {}

  CCNET_DEVICE void run() {
    const bool merges = a_.stats_in != nullptr;
    // An item can be waited for without fear of a deadlock where its slot was that of an item of Q or K, or of a V whose
    // step is done.
    int done_items = qk_items_;  // up to the current step
    load_until(done_items + Shape::kSlots);
    if (merges) wait_for_previous_launch();
    int number = static_cast<int>(block_index());
    HopperForwardJob job(a_, number, panels_), ready_job = job;
    int ready_number = number, ready_step = 0, step = 0;
    // Hands out the next panel of the output.
    const auto make_ready = [&]() {
      if (ready_number >= a_.jobs) return;
      SharedBarrier* const ready = out_.full + ready_slot_;
      arrive_and_expect(ready, merges ? bytes_ : 0);
      if (merges) {
        load_lines(out_.stage(ready_slot_), &a_.out, ready_job.channel(a_, ready_step, kWidth), ready_job.query0,
                   ready_job.group, ready, CachePolicy::kFirst);
      }
      if (++ready_slot_ == Shape::kOutPanels) ready_slot_ = 0;
      next(ready_number, ready_job, ready_step);
    };
    CCNET_UNROLL_BY(1)
    for (int i = 0; i < Shape::kOutPanels; ++i) make_ready();
    CCNET_UNROLL_BY(1)
    while (number < a_.jobs) {
      const int slot = out_.written();
      store_lines(&a_.out, out_.stage(slot), job.channel(a_, step, kWidth), job.query0, job.group,
                  a_.stats_out == nullptr ? CachePolicy::kNormal : policy(job, step, a_.kept_out_steps));
      commit_stores();
      done_items += Blocks;
      load_until(done_items + Shape::kSlots);
      wait_stores_read();
      make_ready();
      next(number, job, step);
      if (step == 0) {
        done_items += qk_items_;
        load_until(done_items + Shape::kSlots);
      }
    }
  }

 private:
  // What the next launch finds in the L2 cache is what it begins with; the rest only passes through.
  CCNET_DEVICE static CachePolicy policy(const HopperForwardJob& job, int step, int kept_steps) {
    return step >= job.steps - kept_steps ? CachePolicy::kLast : CachePolicy::kFirst;
  }
  CCNET_DEVICE void next(int& number, HopperForwardJob& job, int& step) const {
    if (++step < job.steps) return;
    step = 0;
    number += a_.blocks;
    if (number < a_.jobs) job = HopperForwardJob(a_, number, panels_);
  }
  CCNET_DEVICE void load_until(int end) {
    CCNET_UNROLL_BY(1)
    for (; loaded_ < end && load_number_ < a_.jobs; ++loaded_) {
      const TensorMap* map = &a_.value;
      CachePolicy kept = CachePolicy::kNormal;
      int channel, row;
      if (load_item_ < qk_items_) {
        const int panel = load_item_ / (1 + Blocks), which = load_item_ - panel * (1 + Blocks);
        map = which == 0 ? &a_.query : &a_.key;
        row = which == 0 ? load_job_.query0 : a_.first_key + (which - 1) * kTileRows;
        channel = panel * kWidth;
      } else {
        const int v = load_item_ - qk_items_;
        row = a_.first_key + v % Blocks * kTileRows;
        channel = load_job_.channel(a_, v / Blocks, kWidth);
        // At the end, another tile of the same lines may be about to read it.
        kept = a_.stats_out == nullptr && a_.tiling.line_tiles > 1
                   ? CachePolicy::kUnchanged
                   : policy(load_job_, v / Blocks, a_.kept_value_steps);
      }
      const int slot = ring_.acquire(bytes_);
      load_lines(ring_.stage(slot), map, channel, row, load_job_.group, ring_.full + slot, kept);
      if (++load_item_ == qk_items_ + load_job_.steps * Blocks) {
        load_item_ = 0;
        load_number_ += a_.blocks;
        if (load_number_ < a_.jobs) load_job_ = HopperForwardJob(a_, load_number_, panels_);
      }
    }
  }

  const HopperForwardArgs& a_;
  typename Shape::PanelRing ring_;
  typename Shape::OutRing out_;
  const int qk_items_;  // of a job
  const int panels_, bytes_;
  int loaded_ = 0;
  int load_number_, load_item_ = 0;  // of the job
  HopperForwardJob load_job_;
  int ready_slot_ = 0;
};

// A warp's 16 rows x 64 channels of the output, from products of which a lane holds two channels where memory wants eight.
// out = sums * new_scale, `Merges`: + what the panel holds * old_scale.
template <typename T, bool Merges>
CCNET_DEVICE void write_output(char* row, int segment, const float (&sums)[32], const float (&new_scale)[2],
                               const float (&old_scale)[2]) {
  CCNET_UNROLL
  for (int i = 0; i < 4; ++i) {  // 16 channels, as load_matrices() and store_matrices() take them
    char* const fragment = fragment_place(row, segment, i);
    uint32_t words[4];
    if constexpr (Merges) load_matrices(words, fragment);
    CCNET_UNROLL
    for (int w = 0; w < 4; ++w) {
      const int r = w % 2;
      const float* const sum = sums + fragment_element(i, w);
      float low = sum[0] * new_scale[r], high = sum[1] * new_scale[r];
      if constexpr (Merges) {
        float old_low, old_high;
        unpack_pair<T>(words[w], old_low, old_high);
        low = fmaf(old_low, old_scale[r], low);
        high = fmaf(old_high, old_scale[r], high);
      }
      words[w] = pack<T>(low, high);
    }
    store_matrices(fragment, words);
  }
}

template <typename T, int Blocks, int Keys>
CCNET_KERNEL((HopperForwardShape<Blocks, Keys>::kThreads), (HopperForwardShape<Blocks, Keys>::kBlocksPerSm))
void hopper_forward_kernel(CCNET_CONSTANT_PARAMETER HopperForwardArgs a) {
  using Shape = HopperForwardShape<Blocks, Keys>;
  constexpr int kKeySteps = static_cast<int>(ceil_div(Keys, 16));  // of one tile of keys
  const int thread = thread_index();
  char* const shared = dynamic_shared();
  typename Shape::PanelRing ring(shared, shared + Shape::kBarriersOffset);
  typename Shape::OutRing out(shared + Shape::kOutOffset, shared + Shape::kOutBarriersOffset);
  const bool merges = a.stats_in != nullptr;
  const int box_rows = tile_rows(a.tiling);

  if (thread == Shape::kConsumers) {
    prefetch_map(&a.query);
    prefetch_map(&a.key);
    prefetch_map(&a.value);
    prefetch_map(&a.out);
    ring.init();
    out.init();
  }
  clear_tails(shared, Shape::kSlots + Shape::kOutPanels, box_rows, thread, Shape::kThreads);
  converge_warp();
  // All lanes of a warp meet at the same place, also those of the one that moves panels.
  barrier();

  if (thread >= Shape::kConsumers) {
    if constexpr (Shape::kAhead) release_registers<Shape::kMoverRegisters>();
    if (thread > Shape::kConsumers) return;
    // Inputs of a launch that is not the first were there before the one before began.
    if (!merges) wait_for_previous_launch();
    allow_next_launch();
    HopperForwardMover<T, Blocks, Keys> mover(a, ring, out);
    mover.run();
    wait_stores_read();
    return;
  }
  if constexpr (Shape::kAhead) claim_registers<Shape::kConsumerRegisters>();

  const int warpgroup = uniform(thread / kWarpgroup);
  const bool leads_warp = thread % kWarp == 0;
  const int lane_row = thread / kWarp * 16 + thread % kWarp / 4;  // and the one 8 further
  const int lane_column = thread % 4 * 2;
  const int panels = static_cast<int>(ceil_div(a.channels, kPanelWidth<T>));
  const int qk_steps = static_cast<int>(ceil_div(a.qk_channels, kPanelWidth<T>));
  // In the first panel of the output, for fragment_place().
  char* const row = fragment_row(out.stage(0), thread);
  const int segment = fragment_segment(thread);
  int to_release = 0;  // the slots are released in order
  const auto release_slots = [&](int count) {
    CCNET_UNROLL
    for (int i = 0; i < count; ++i) {
      if (leads_warp) ring.release(to_release);
      if (++to_release == Shape::kSlots) to_release = 0;
    }
  };

  CCNET_UNROLL_BY(1)
  for (int number = static_cast<int>(block_index()); number < a.jobs; number += a.blocks) {
    const HopperForwardJob job(a, number, panels);
    uint32_t places[2];  // of the lane's rows in the statistics
    float scores[Blocks][Keys / 2];
    // Sets scores where a row does not attend to a key to minus infinity; with `others`, all others to 0.
    const auto mask_scores = [&](bool others) {
      CCNET_UNROLL
      for (int r = 0; r < 2; ++r) {
        const TileRow row = tile_row(a.tiling, recompute(lane_row) + 8 * r);
        CCNET_UNROLL
        for (int b = 0; b < Blocks; ++b) {
          const uint32_t columns = lane_columns(
              partners_of(a.tiling, row, job.query0, a.first_key + b * kTileRows, a.drop_self), lane_column);
          CCNET_UNROLL
          for (int i = 0; i < Keys / 4; ++i) {
            float& score = scores[b][4 * (i / 2) + 2 * r + i % 2];
            score = (columns & 1u << i) == 0 ? -INFINITY : others ? 0.f : score;
          }
        }
      }
    };
    // The products add to what the mask leaves, so that it costs no time after them.
    mask_scores(true);
    CCNET_UNROLL
    for (int r = 0; r < 2; ++r) {
      places[r] = row_place(a.position, a.tiling, job.group, job.query0, tile_row(a.tiling, lane_row + 8 * r));
    }
    CCNET_UNROLL
    for (int b = 0; b < Blocks; ++b) hold(scores[b]);

    CCNET_UNROLL_BY(1)
    for (int p = 0; p < qk_steps; ++p) {
      const uint64_t q = advance(panel_descriptor(ring.stage(ring.take())), warpgroup * kHalfAdvance);
      uint64_t k[Blocks];
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) k[b] = panel_descriptor(ring.stage(ring.take()));
      converge_warp();
      begin_products();
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) multiply_rows<T, Keys>(scores[b], q, k[b], true);
      commit_products();
      wait_products<0>();
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) hold(scores[b]);
      release_slots(1 + Blocks);
    }

    // Keys of other lines in the tile may be no numbers.
    if (Blocks == 1 && a.tiling.group > 1) mask_scores(false);

    float row_max[2], row_sum[2];
    uint32_t weights[Blocks][kKeySteps][4];  // P, as left operands
    CCNET_UNROLL
    for (int r = 0; r < 2; ++r) {
      float m[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) {
        CCNET_UNROLL
        for (int i = 0; i < Keys / 4; ++i) m[i % 4] = fmaxf(m[i % 4], scores[b][4 * (i / 2) + 2 * r + i % 2]);
      }
      m[0] = fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3]));
      m[0] = fmaxf(m[0], shuffle_xor(m[0], 1));
      row_max[r] = fmaxf(m[0], shuffle_xor(m[0], 2));
      const float reference = row_max[r] == -INFINITY ? 0.f : row_max[r] * -kLog2E;  // 0: no keys at all
      float sum[2] = {0.f, 0.f};
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) {
        CCNET_UNROLL
        for (int j = 0; j < 2 * kKeySteps; ++j) {
          uint32_t& word = weights[b][j / 2][j % 2 * 2 + r];
          word = 0;
          if (8 * j >= Keys) continue;
          const float low = exp2_rounded(fmaf(scores[b][4 * j + 2 * r], kLog2E, reference));
          const float high = exp2_rounded(fmaf(scores[b][4 * j + 2 * r + 1], kLog2E, reference));
          sum[0] += low;
          sum[1] += high;
          word = pack<T>(low, high);
        }
      }
      row_sum[r] = sum[0] + sum[1];
    }

    // From here on panel by panel of the channels.
    float sums[32], other_sums[32];
    clear(sums);
    const auto begin_values = [&](float (&d)[32]) {
      uint64_t v[Blocks];
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) v[b] = panel_descriptor(ring.stage(ring.take()));
      converge_warp();
      begin_products();
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) {
        CCNET_UNROLL
        for (int s = 0; s < kKeySteps; ++s) {
          WarpgroupProduct<T, 64>::template multiply<Major::kOuter>(d, weights[b][s], advance(v[b], s * kOuterAdvance),
                                                                    b > 0 || s > 0);
        }
      }
      commit_products();
    };
    begin_values(sums);

    // Merged with the keys of earlier launches.
    float new_scale[2], old_scale[2];
    if (merges) wait_for_previous_launch();
    CCNET_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += shuffle_xor(row_sum[r], 1);
      row_sum[r] += shuffle_xor(row_sum[r], 2);
      Stats<float> before = empty_stats<float>();
      if (merges && places[r] != kNoRow) before = load_global(a.stats_in + places[r]);
      const float max = fmaxf(before.max, row_max[r]);
      // exp(-inf - -inf) is NaN: an empty set counts for nothing.
      const float old_part = before.sum > 0.f ? before.sum * exp2_rounded((before.max - max) * kLog2E) : 0.f;
      const float new_part = row_sum[r] > 0.f ? exp2_rounded((row_max[r] - max) * kLog2E) : 0.f;
      const Stats<float> merged{max, fmaf(new_part, row_sum[r], old_part)};
      const float inverse = merged.sum > 0.f ? 1.f / merged.sum : 0.f;
      new_scale[r] = new_part * inverse;
      old_scale[r] = old_part * inverse;
      if (job.split == 0 && thread % 4 == 0 && places[r] != kNoRow) {
        if (a.stats_out != nullptr) store_global(a.stats_out + places[r], merged);
        if (a.lse != nullptr) store_global(a.lse + places[r], log_sum_exp(merged));
      }
    }

    const auto write = [&](const float (&d)[32]) {
      const int slot = out.take();
      converge_warp();
      char* const panel_row = row + slot * Shape::kPanelBytes;
      if (merges) {
        write_output<T, true>(panel_row, segment, d, new_scale, old_scale);
      } else {
        write_output<T, false>(panel_row, segment, d, new_scale, old_scale);
      }
      fence_shared_for_async();
      converge_warp();
      if (leads_warp) out.release(slot);
    };
    // `ahead`: the next panel's products have begun.
    const auto finish = [&](float (&own)[32], bool ahead) {
      if (ahead) {
        wait_products<1>();
      } else {
        wait_products<0>();
      }
      hold(own);
      release_slots(Blocks);
      write(own);
    };
    if constexpr (Shape::kAhead) {
      clear(other_sums);
      const auto step = [&](float (&own)[32], float (&next)[32]) {
        begin_values(next);
        finish(own, true);
      };
      // Written so that the compiler sees which of the two is under way.
      CCNET_UNROLL_BY(1)
      for (int s = 0;; ++s) {
        if (s + 1 == job.steps) {
          finish(sums, false);
          break;
        }
        step(sums, other_sums);
        if (++s + 1 == job.steps) {
          finish(other_sums, false);
          break;
        }
        step(other_sums, sums);
      }
    } else {
      CCNET_UNROLL_BY(1)
      for (int s = 0;;) {
        finish(sums, false);
        if (++s == job.steps) break;
        begin_values(sums);
      }
    }
  }
}

}  // namespace cuda
}  // namespace ccnet
