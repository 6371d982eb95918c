// The backward kernels for compute capability 9.0, fp16 and bf16, lines of at most 256 positions. What is computed is
// what backward.h describes; here the products are wgmma, transposed so that keys are rows, and panels come by TMA.
//
// A CTA takes one tile of keys (hopper_lines.h), 128 rows, of a group of lines after the other. A longer line has two,
// of which each CTA of a cluster takes one: both need all of dO, at the same time. Two warpgroups compute, each with 64
// keys; one more warp does nothing but load. For each tile of keys:
//   P^T = exp(K Q^T - lse);  dP^T = V dO^T over the channels, while dV = P^T dO is written panel by panel;
//   dS^T = P^T (dP^T - delta);  dK = dS^T Q and dQ (+)= dS K, panel by panel. Of a cluster's two tiles of queries a CTA
// writes that with its own number first, then adds to the one that the other CTA has written.
// delta, the sum over the channels of dO * O, comes from a launch of its own (dense_delta_kernel), or is found by the
// first axis's launch on the way, as the diagonal of dO O^T.
// Every output element is written in a fixed order, by one thread or in turn by one of either CTA: no atomics, the same
// bits every time.
#pragma once

#include "hopper_products.h"
#include "hopper_ring.h"

namespace ccnet {
namespace cuda {

// `Blocks`: tiles of a line. `FindsDelta`: for the first axis, whose lines have one tile. `Rows`: of a tile that are used,
// 128 or 104.
template <typename T, int Blocks, bool FindsDelta = false, int Rows = kTileRows>
struct HopperBackwardShape {
  static_assert(Rows == kTileRows || (Rows == kFewerRows && Blocks == 1), "a long line uses whole tiles");
  static_assert(sizeof(T) == 2 && (Blocks == 1 || Blocks == 2), "fp16 or bf16, at most 256 positions");
  static_assert(!FindsDelta || Blocks == 1, "with two tiles there is no room for panels of O");
  static constexpr int kClusterBlocks = Blocks;
  static constexpr int kConsumers = 2 * kWarpgroup;
  static constexpr int kThreads = kConsumers + kWarpgroup;
  // Of each thread's equal share, 168, the warpgroup that loads gives up most.
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kLoaderRegisters = 24;
  // P^T, then dS^T, of one tile of keys is an operand. With one tile of queries it stays in registers, and only dS^T
  // goes to shared memory, for dQ; with two there are not registers enough.
  static constexpr bool kWeightsInRegisters = Blocks == 1;
  // S^T and dP^T at the same time: the first products for dP run while P is formed.
  static constexpr bool kSeparateScores = Blocks == 1;
  // Two panels of dV at the same time: the products for the next run while one is written.
  static constexpr bool kValuesAhead = Blocks == 1;

  // Shared memory: stages of panels (one of K or V, and for each tile of queries one of Q or dO); panels of P^T or dS^T
  // [key][64 queries]; panels through which outputs go; for each position of the tiles its exponent's offset
  // (from lse) and delta; barriers. Panels of O pass through those of dS^T, which are empty until delta is known, and
  // through two more.
  static constexpr int kPanelBytes = panel_bytes(kTileRows);
  static constexpr int kStages = Blocks == 2 ? 3 : FindsDelta ? 4 : 5;
  static constexpr int kStageBytes = (1 + Blocks) * kPanelBytes;
  static constexpr int kWeightsOffset = kStages * kStageBytes;
  static constexpr int kWeightsPanels = 2 * Blocks;
  static constexpr int kOutStages = 4;  // panels of dS^T and the next
  static constexpr int kStagingOffset =
      kWeightsOffset + (FindsDelta ? kOutStages : kWeightsPanels) * kPanelBytes;
  static constexpr int kStagingPanels = Blocks == 1 ? 2 : 1;
  static constexpr int kOffsetsOffset = kStagingOffset + kStagingPanels * kPanelBytes;
  static constexpr int kTableBytes = Blocks * kTileRows * 4;
  static constexpr int kDeltaOffset = kOffsetsOffset + kTableBytes;
  static constexpr int kBarriersOffset = kDeltaOffset + kTableBytes;
  static constexpr int kOutBarriersOffset = kBarriersOffset + 2 * kStages * static_cast<int>(sizeof(SharedBarrier));
  static constexpr int kOutBarriers = FindsDelta ? 2 * kOutStages + 1 : 0;
  // One for each warp of the other CTA, for every other time that it has written dQ.
  static constexpr int kQueryBarriers = Blocks == 2 ? 2 * kConsumers / kWarp : 0;
  static constexpr int kQueryBarriersOffset =
      kOutBarriersOffset + kOutBarriers * static_cast<int>(sizeof(SharedBarrier));
  static constexpr int kSharedBytes =
      kQueryBarriersOffset + kQueryBarriers * static_cast<int>(sizeof(SharedBarrier));
  // The loader asks for so many stages of V and dO before the first panel of O, for which it has to wait until the CTA's
  // last group is done.
  static constexpr int kOutLag = 2;
  static_assert(kOutLag < kStages, "the stage that O is wanted with must have been loaded");
};

// An output whose rows are written in whole segments.
template <typename T>
struct SegmentOutput {
  T* data;
  RowStrides strides;  // in segments
  int segments;        // of a row
};
template <typename T>
SegmentOutput<T> segment_output(const Output<T>& out, int channels) {
  return {out.data, row_strides(out.strides, kSegmentLength<T>), channels / kSegmentLength<T>};
}

// The plan sees to it that lines have at most Blocks tiles, that 31 bits hold the number of positions, and 32 bits that
// of each output's segments.
template <typename T>
struct HopperBackwardArgs {
  TensorMap query, key, value, grad_out;  // boxes of 64 channels x span x group
  TensorMap out;                          // where delta is to be found
  Tiling tiling;
  RowStrides position;  // of (B, N) statistics, in elements
  bool drop_self;
  int qk_channels, channels;
  SegmentOutput<T> grad_query, grad_key, grad_value;
  const float* lse;                            // (B, N)
  float* delta;                                // (B, N), of an earlier launch or to be found
  bool overlaps;                               // may begin before the launch before has ended
  bool accumulate;                             // an earlier launch has written the gradients
  int backwards;                               // 1: through the channels, starting with the last
  // The steps from which on the L2 cache keeps panels of dV, and of V and dO, for the next launch. The others only pass
  // through it.
  int keeps_grads_from, keeps_values_from;
  int groups;                                  // of lines: cluster i takes groups i, i + clusters, ...
  int blocks;                                  // CTAs, in whole clusters
};

// A warp's 16 rows of an output, written from products of which a lane holds two channels where memory wants eight
// (WarpgroupProduct): they go through the warp's own 16 rows of a panel in shared memory. Between that and global memory
// a lane moves segment lane % 8 of the rows lane / 8 + 4 i: whole 128-byte lines together.
template <typename T>
struct WarpOutput {
  static constexpr int kRows = 4;
  uint32_t row[kRows];  // where they are, in segments

  // `first`: the position at which the tile begins.
  CCNET_DEVICE WarpOutput(int thread, const SegmentOutput<T>& out, const Tiling& tiling, const Line& group,
                          int first) {
    CCNET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int own = thread / kWarp * 16 + thread % kWarp / 8 + 4 * i;
      row[i] = row_place(out.strides, tiling, group, first, tile_row(tiling, own));
    }
  }

  // Has the rows computed now and kept: the compiler would compute them anew for every panel.
  CCNET_DEVICE void keep() {
    CCNET_UNROLL
    for (int i = 0; i < kRows; ++i) row[i] = static_cast<uint32_t>(recompute(static_cast<int>(row[i])));
  }

  // Asks for what an earlier launch or an earlier tile of keys has left in 64 channels of the rows. No registers wait for
  // it: it is there for write() after wait_copies() and converge_warp().
  CCNET_DEVICE void fetch(int thread, char* panel, const SegmentOutput<T>& out, int step) const {
    const uint32_t segment = static_cast<uint32_t>(step * kRowSegments + thread % kRowSegments);
    const bool exists = segment < static_cast<uint32_t>(out.segments);
    CCNET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const bool there = exists && row[i] != kNoRow;
      copy_async(lane_place(thread, panel, i), reinterpret_cast<const Segment*>(out.data) + (there ? row[i] + segment : 0),
                 there ? kSegmentBytes : 0);
    }
  }

  // `add`: to what fetch() has brought. `keeps`: the L2 cache, which treats it as `otherwise` says if not. A collective of
  // the warp, which may use the panel anew afterwards.
  CCNET_DEVICE void write(int thread, float (&d)[32], bool add, char* panel, const SegmentOutput<T>& out,
                          int step, bool keeps = false, CachePolicy otherwise = CachePolicy::kNormal) const {
    if (add) {
      CCNET_UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t words[4];
        load_matrices(words, fragment_place(fragment_row(panel, thread), fragment_segment(thread), i));
        CCNET_UNROLL
        for (int w = 0; w < 4; ++w) {
          float before[2];
          unpack_pair<T>(words[w], before[0], before[1]);
          d[fragment_element(i, w)] += before[0];
          d[fragment_element(i, w) + 1] += before[1];
        }
      }
    }
    CCNET_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t words[4];
      CCNET_UNROLL
      for (int w = 0; w < 4; ++w) words[w] = pack<T>(d[fragment_element(i, w)], d[fragment_element(i, w) + 1]);
      store_matrices(fragment_place(fragment_row(panel, thread), fragment_segment(thread), i), words);
    }
    converge_warp();
    const uint32_t segment = static_cast<uint32_t>(step * kRowSegments + thread % kRowSegments);
    const bool exists = segment < static_cast<uint32_t>(out.segments);
    Segment segments[kRows];
    CCNET_UNROLL
    for (int i = 0; i < kRows; ++i) segments[i] = load_shared<Segment>(lane_place(thread, panel, i));
    converge_warp();
    CCNET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      Segment* const to = reinterpret_cast<Segment*>(out.data) + (row[i] + segment);
      if (!exists || row[i] == kNoRow) continue;
      // A choice between two known policies: a policy that is chosen takes registers that are not there.
      if (keeps) {
        store_global(to, segments[i], CachePolicy::kLast);
      } else {
        store_global(to, segments[i], otherwise);
      }
    }
  }

 private:
  // Where in the panel the lane's segment of its row i is.
  static CCNET_DEVICE char* lane_place(int thread, char* panel, int i) {
    const int row = thread % kWarp / kRowSegments;
    const int segment = (thread % kRowSegments ^ row) * kSegmentBytes;
    return panel + (thread / kWarp * 16 + row + i * 4) * kRowBytes + (segment ^ i % 2 * 4 * kSegmentBytes);
  }
};

// Two neighbouring floats.
CCNET_DEVICE void load_pair(const char* p, float& a, float& b) {
  const uint64_t v = load_shared<uint64_t>(p);
  a = bits_to_float(static_cast<uint32_t>(v));
  b = bits_to_float(static_cast<uint32_t>(v >> 32));
}

// With one tile, descriptors are computed in uniform registers, where the products want them; with two there are not
// enough.
template <int Blocks>
CCNET_DEVICE int warpgroup_of(int thread) {
  const int warpgroup = thread / kWarpgroup;
  return Blocks == 1 ? uniform(warpgroup) : warpgroup;
}

// P^T, later dS^T, of a warpgroup's 64 keys and of all queries of the line. A lane holds of each 16 queries, a step, four
// words: word 2 h + r is row r of its two (8 apart), columns 8 h + lane % 4 * 2 and the next.
template <typename T, int Blocks, int Rows>
struct KeyWeights {
  using Shape = HopperBackwardShape<T, Blocks, false, Rows>;
  static constexpr int kSteps = static_cast<int>(ceil_div(Rows, 16));

  uint32_t registers[Shape::kWeightsInRegisters ? Blocks : 1][kSteps][4];
  char* row;            // of the lane in the first panel, and its segment, for fragment_place()
  int segment;
  uint64_t descriptor;  // of the warpgroup's keys in the first panel

  CCNET_DEVICE KeyWeights(char* panels, int thread)
      : row(fragment_row(panels, thread)),
        segment(fragment_segment(thread)),
        descriptor(advance(panel_descriptor(panels), warpgroup_of<Blocks>(thread) * kHalfAdvance)) {}

  CCNET_DEVICE char* place(int block, int step) const {
    return fragment_place(row, segment, step % 4) + (2 * block + step / 4) * Shape::kPanelBytes;
  }
  CCNET_DEVICE void get(int block, int step, uint32_t (&words)[4]) const {
    if constexpr (Shape::kWeightsInRegisters) {
      CCNET_UNROLL
      for (int w = 0; w < 4; ++w) words[w] = registers[block][step][w];
    } else {
      load_matrices(words, place(block, step));
    }
  }
  template <bool InShared>
  CCNET_DEVICE void put(int block, int step, const uint32_t (&words)[4]) {
    // Without recompute() the compiler holds the halves of the words and joins them anew for every product.
    if constexpr (Shape::kWeightsInRegisters) {
      CCNET_UNROLL
      for (int w = 0; w < 4; ++w) {
        registers[block][step][w] = static_cast<uint32_t>(recompute(static_cast<int>(words[w])));
      }
    }
    if constexpr (InShared || !Shape::kWeightsInRegisters) store_matrices(place(block, step), words);
  }

  // d (+)= these weights for queries of `block` times a panel [query][channel].
  CCNET_DEVICE void multiply(float (&d)[32], int block, uint64_t panel, bool add_to) const {
    CCNET_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      const uint64_t b = advance(panel, k * kOuterAdvance);
      if constexpr (Shape::kWeightsInRegisters) {
        WarpgroupProduct<T, 64>::template multiply<Major::kOuter>(d, registers[block][k], b, add_to || k > 0);
      } else {
        const int distance = (2 * block + k / 4) * kPanelAdvance + k % 4 * kDepthAdvance;
        WarpgroupProduct<T, 64>::template multiply<Major::kDepth, Major::kOuter>(
            d, advance(descriptor, distance), b, add_to || k > 0);
      }
    }
  }
};

// The panel of channels that a step takes: every other launch goes backwards through them, so that it meets first what
// the L2 cache has seen last.
CCNET_DEVICE int value_panel(int step, int backwards, int steps) { return backwards == 0 ? step : steps - 1 - step; }

// The diagonal of a warpgroup's products of 64 x 64, of which a lane holds at most one element for each row of its two.
// Writes element i, where the lane has it, to table[i].
CCNET_DEVICE void store_diagonal(const float (&d)[32], int thread, char* table) {
  const int lane = thread % kWarp, warp = thread / kWarp % (kWarpgroup / kWarp);
  const bool odd = lane / 4 % 2 != 0;
  const bool holds = lane % 4 == lane / 8;
  CCNET_UNROLL
  for (int r = 0; r < 2; ++r) {
    float element = 0.f;
    CCNET_UNROLL
    for (int w = 0; w < kWarpgroup / kWarp; ++w) {
      const int i = 4 * (2 * w + r) + 2 * r;
      if (warp == w) element = odd ? d[i + 1] : d[i];
    }
    if (holds) store_shared<float>(table + (warp * 16 + r * 8 + lane / 4) * 4, element);
  }
}

template <typename T, int Blocks, bool FindsDelta, int Rows>
CCNET_KERNEL((HopperBackwardShape<T, Blocks, FindsDelta, Rows>::kThreads), 1)
void hopper_backward_kernel(CCNET_CONSTANT_PARAMETER HopperBackwardArgs<T> a) {
  using Shape = HopperBackwardShape<T, Blocks, FindsDelta, Rows>;
  using Weights = KeyWeights<T, Blocks, Rows>;
  constexpr int kWidth = kPanelWidth<T>;
  constexpr int kConsumerWarps = Shape::kConsumers / kWarp;
  constexpr int kConsumerBarrier = 1;   // numbers of named barriers
  constexpr int kWarpgroupBarrier = 2;  // and the next

  char* const shared = dynamic_shared();
  char* const offsets = shared + Shape::kOffsetsOffset;
  char* const delta = shared + Shape::kDeltaOffset;
  StageRing<Shape::kStages, Shape::kStageBytes, kConsumerWarps> ring(shared, shared + Shape::kBarriersOffset);
  StageRing<Shape::kOutStages, Shape::kPanelBytes, kConsumerWarps> out_ring(shared + Shape::kWeightsOffset,
                                                                            shared + Shape::kOutBarriersOffset);
  // A group is done, and dS^T is read no more.
  SharedBarrier* const group_done = out_ring.full + 2 * Shape::kOutStages;
  // Where each warp of the other CTA says that it has written dQ.
  SharedBarrier* const query_written = reinterpret_cast<SharedBarrier*>(shared + Shape::kQueryBarriersOffset);
  const bool accumulate = !FindsDelta && a.accumulate;
  const int thread = thread_index();
  // The tile of keys. Tiles of queries are counted from the one of the same number on: tile b is the line's
  // key_block ^ b.
  const int key_block = Blocks == 1 ? 0 : cluster_rank();
  const auto query0 = [&](int b) { return (key_block ^ b) * kTileRows; };
  const int first_group = static_cast<int>(block_index()) / Shape::kClusterBlocks;
  const int clusters = a.blocks / Shape::kClusterBlocks;
  if (thread == Shape::kConsumers) {
    prefetch_map(&a.key);
    prefetch_map(&a.query);
    if constexpr (FindsDelta) {
      out_ring.init();
      init_barrier(group_done, kConsumerWarps);
    }
    for (int i = 0; i < Shape::kQueryBarriers; ++i) init_barrier(query_written + i, 1);
    ring.init();
    prefetch_map(&a.value);
    prefetch_map(&a.grad_out);
    if constexpr (FindsDelta) prefetch_map(&a.out);
  }
  converge_warp();
  if constexpr (Shape::kClusterBlocks == 1) {
    barrier();
  } else {
    cluster_barrier();
  }
  // The inputs were there before the launch before began.
  allow_next_launch();

  const int qk_steps = static_cast<int>(ceil_div(a.qk_channels, kWidth));
  const int value_steps = static_cast<int>(ceil_div(a.channels, kWidth));
  const int box_rows = tile_rows(a.tiling);

  if (thread >= Shape::kConsumers) {
    release_registers<Shape::kLoaderRegisters>();
    if (thread > Shape::kConsumers) return;
    int group_parity = 0;
    for (int number = first_group; number < a.groups; number += clusters) {
      const Line group = find_group(a.tiling, number);
      const auto load = [&](const TensorMap* key_side, const TensorMap* query_side, int panel, CachePolicy policy) {
        const int slot = ring.acquire((1 + Blocks) * panel_bytes(box_rows));
        char* const stage = ring.stage(slot);
        SharedBarrier* const full = ring.full + slot;
        load_lines(stage, key_side, panel * kWidth, key_block * kTileRows, group, full, policy);
        CCNET_UNROLL
        for (int b = 0; b < Blocks; ++b) {
          load_lines(stage + (1 + b) * Shape::kPanelBytes, query_side, panel * kWidth, query0(b), group, full, policy);
        }
      };
      const auto load_scores = [&]() {
        for (int p = 0; p < qk_steps; ++p) load(&a.key, &a.query, p, CachePolicy::kNormal);
      };
      load_scores();
      constexpr int kLag = FindsDelta ? Shape::kOutLag : 0;
      for (int p = 0; p < value_steps + kLag; ++p) {
        if (p < value_steps) {
          load(&a.value, &a.grad_out, value_panel(p, a.backwards, value_steps),
               p >= a.keeps_values_from ? CachePolicy::kLast : CachePolicy::kFirst);
        }
        if constexpr (FindsDelta) {
          if (p < kLag) continue;
          if (p == kLag && number >= clusters) {
            wait_phase(group_done, group_parity);
            group_parity ^= 1;
          }
          const int slot = out_ring.acquire(panel_bytes(box_rows));
          const int panel = value_panel(p - kLag, a.backwards, value_steps);
          load_lines(out_ring.stage(slot), &a.out, panel * kWidth, 0, group, out_ring.full + slot, CachePolicy::kFirst);
        }
      }
      load_scores();
    }
    return;
  }
  claim_registers<Shape::kConsumerRegisters>();

  clear_tails(shared, Shape::kStages * (1 + Blocks) + (FindsDelta ? Shape::kOutStages : 0), box_rows, thread,
              Shape::kConsumers);
  const int warpgroup = warpgroup_of<Blocks>(thread);
  const bool leads_warp = thread % kWarp == 0;
  const int lane_row = thread / kWarp * 16 + thread % kWarp / 4;
  const int lane_column = thread % 4 * 2;
  // What follows from the thread's number is kept in registers where there are enough.
  const auto own_thread = [] { return Blocks == 1 ? thread_index() : recompute(thread_index()); };
  char* const staging = shared + Shape::kStagingOffset;
  char* const other_staging = staging + (Shape::kStagingPanels - 1) * Shape::kPanelBytes;
  const int own_half = warpgroup * kHalfAdvance;
  Weights weights(shared + Shape::kWeightsOffset, thread);

  // The panel of K or V in a stage, and that of Q or dO for a tile of queries.
  const auto key_side = [&](int slot) { return panel_descriptor(ring.stage(slot)); };
  const auto query_side = [&](int slot, int b) {
    return advance(key_side(slot), (1 + b) * kPanelAdvance);
  };
  // d (+)= this warpgroup's keys times the queries, one panel deep.
  const auto multiply_pairs = [&](float (&d)[Blocks][Rows / 2], int slot, bool add_to) {
    CCNET_UNROLL
    for (int b = 0; b < Blocks; ++b) {
      multiply_rows<T, Rows>(d[b], advance(key_side(slot), own_half), query_side(slot, b), add_to);
    }
  };

  int queries_written = 0;  // so many times
  CCNET_UNROLL_BY(1)
  for (int number = first_group; number < a.groups; number += clusters) {
    const Line group = find_group(a.tiling, number);
    // Nobody needs the last group's tables and dS^T.
    if (number >= clusters) named_barrier(kConsumerBarrier, Shape::kConsumers);
    // The statistics of query number `thread`.
    const int own_first = query0(thread / kTileRows);
    const TileRow own = tile_row(a.tiling, thread % kTileRows);
    const uint32_t own_position =
        thread < Blocks * kTileRows ? row_place(a.position, a.tiling, group, own_first, own) : kNoRow;
    if (thread < Blocks * kTileRows) {
      // As P = 2^(log2(e) S + offset); a query that does not exist weighs nothing.
      store_shared<float>(offsets + thread * 4,
                          own_position != kNoRow ? load_global(a.lse + own_position) * -kLog2E : -INFINITY);
    }
    named_barrier(kConsumerBarrier, Shape::kConsumers);

    const int key0 = key_block * kTileRows;
    float pair[Blocks][Rows / 2];             // dP^T
    float separate_scores[Blocks][Rows / 2];  // S^T, where there are registers for it
    float(&scores)[Blocks][Rows / 2] = Shape::kSeparateScores ? separate_scores : pair;
    CCNET_UNROLL
    for (int b = 0; b < Blocks; ++b) {
      clear(pair[b]);
      clear(scores[b]);
    }
    CCNET_UNROLL_BY(1)
    for (int p = 0; p < qk_steps; ++p) {
      const int slot = ring.take();
      converge_warp();
      begin_products();
      multiply_pairs(scores, slot, p > 0);
      commit_products();
      wait_products<0>();
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) hold(scores[b]);
      if (leads_warp) ring.release(slot);
    }
    // From here on the products for dP are one stage ahead of those for dV.
    int slot = 0;
    const auto begin_pairs = [&]() {
      slot = ring.take();
      converge_warp();
      begin_products();
      multiply_pairs(pair, slot, false);
      commit_products();
    };
    if constexpr (Shape::kSeparateScores) begin_pairs();
    CCNET_UNROLL
    for (int b = 0; b < Blocks; ++b) {
      uint32_t columns[2];
      CCNET_UNROLL
      for (int r = 0; r < 2; ++r) {
        const TileRow key = tile_row(a.tiling, recompute(lane_row) + 8 * r);
        Partners partners = partners_of(a.tiling, key, key0, query0(b), a.drop_self);
        if (!row_exists(a.tiling, group, key0, key)) partners.count = 0;
        columns[r] = lane_columns(partners, lane_column);
      }
      CCNET_UNROLL
      for (int k = 0; k < Weights::kSteps; ++k) {
        uint32_t words[4];
        CCNET_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int j = 2 * k + h;
          if (8 * j >= Rows) {
            words[2 * h] = words[2 * h + 1] = 0;
            continue;
          }
          float offset0, offset1;
          load_pair(offsets + (b * kTileRows + 8 * j + lane_column) * 4, offset0, offset1);
          CCNET_UNROLL
          for (int r = 0; r < 2; ++r) {
            const float p0 = exp2_rounded(fmaf(scores[b][4 * j + 2 * r], kLog2E, offset0));
            const float p1 = exp2_rounded(fmaf(scores[b][4 * j + 2 * r + 1], kLog2E, offset1));
            words[2 * h + r] = pack<T>((columns[r] & 1u << 2 * j) != 0 ? p0 : 0.f,
                                       (columns[r] & 2u << 2 * j) != 0 ? p1 : 0.f);
          }
        }
        weights.template put<false>(b, k, words);
      }
    }
    if constexpr (!Shape::kWeightsInRegisters) {
      fence_shared_for_async();
      named_barrier(kWarpgroupBarrier + warpgroup, kWarpgroup);
    }
    if constexpr (!Shape::kSeparateScores) begin_pairs();

    float own_delta = 0.f;
    float diagonal[32];  // of dO O^T
    if constexpr (FindsDelta) clear(diagonal);
    WarpOutput<T> value_rows(own_thread(), a.grad_value, a.tiling, group, key0);
    if constexpr (Blocks == 1) value_rows.keep();
    float grad[32], other_grad[32];
    clear(grad);
    int out_slot = 0;
    // The products for dV, and for delta, of step p, whose panels are in the present stage.
    const auto multiply_values = [&](float (&d)[32], int p) {
      if constexpr (FindsDelta) out_slot = out_ring.take();
      converge_warp();
      begin_products();
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) weights.multiply(d, b, query_side(slot, b), b > 0);
      if constexpr (FindsDelta) {
        const uint64_t own_grads = advance(query_side(slot, 0), own_half);
        const uint64_t own_outs = advance(panel_descriptor(out_ring.stage(out_slot)), own_half);
        CCNET_UNROLL
        for (int k = 0; k < kWidth / 16; ++k) {
          WarpgroupProduct<T, 64>::template multiply<Major::kDepth, Major::kDepth>(
              diagonal, advance(own_grads, k * kDepthAdvance), advance(own_outs, k * kDepthAdvance), p > 0 || k > 0);
        }
      }
    };
    // Writes step p's dV; `last`: of the steps.
    const auto write_values = [&](int p, float (&d)[32], bool last) {
      const int channels = value_panel(p, a.backwards, value_steps);
      const int next_channels = value_panel(p + 1, a.backwards, value_steps);
      char* const panel = p % 2 == 0 ? staging : other_staging;
      char* const next_panel = p % 2 == 0 ? other_staging : staging;
      if (accumulate) {
        wait_copies();
        converge_warp();
        if (Shape::kStagingPanels > 1 && !last) value_rows.fetch(own_thread(), next_panel, a.grad_value, next_channels);
      }
      value_rows.write(own_thread(), d, accumulate, panel, a.grad_value, channels, p >= a.keeps_grads_from,
                       CachePolicy::kFirst);
      if (Shape::kStagingPanels == 1 && accumulate && !last) {
        value_rows.fetch(own_thread(), panel, a.grad_value, next_channels);
      }
    };
    const auto release_values = [&](int stage, int out_stage) {
      if (!leads_warp) return;
      ring.release(stage);
      if constexpr (FindsDelta) out_ring.release(out_stage);
    };
    // A step but the last: the next step's products begin, this step's `own` are waited for and written.
    const auto value_step = [&](int p, float (&own)[32], float (&next)[32]) {
      const int released = slot, released_out = out_slot;
      slot = ring.take();
      converge_warp();
      begin_products();
      multiply_pairs(pair, slot, true);
      if constexpr (Shape::kValuesAhead) multiply_values(next, p + 1);
      commit_products();
      wait_products<1>();
      hold(own);
      release_values(released, released_out);
      write_values(p, own, false);
    };
    // What earlier launches have left is needed at last: here what is added to, delta after the loop.
    if (accumulate) {
      wait_for_previous_launch();
      value_rows.fetch(own_thread(), staging, a.grad_value, value_panel(0, a.backwards, value_steps));
    }
    // The last step.
    const auto finish_values = [&](int p, float (&own)[32]) {
      if constexpr (!FindsDelta) {
        if (!accumulate) wait_for_previous_launch();
        if (own_position != kNoRow) own_delta = load_global(a.delta + own_position);
      }
      wait_products<0>();
      hold(own);
      release_values(slot, out_slot);
      write_values(p, own, true);
    };
    int step = 0;
    if constexpr (Shape::kValuesAhead) {
      clear(other_grad);
      multiply_values(grad, 0);
      commit_products();
      // Written so that the compiler sees which of the two is under way.
      CCNET_UNROLL_BY(1)
      for (;; ++step) {
        if (step + 1 == value_steps) {
          finish_values(step, grad);
          break;
        }
        value_step(step, grad, other_grad);
        if (++step + 1 == value_steps) {
          finish_values(step, other_grad);
          break;
        }
        value_step(step, other_grad, grad);
      }
    } else {
      CCNET_UNROLL_BY(1)
      for (; step + 1 < value_steps; ++step) {
        multiply_values(grad, step);
        commit_products();
        value_step(step, grad, grad);
      }
      multiply_values(grad, step);
      commit_products();
      finish_values(step, grad);
    }
    CCNET_UNROLL
    for (int b = 0; b < Blocks; ++b) hold(pair[b]);
    if constexpr (FindsDelta) {
      hold(diagonal);
      store_diagonal(diagonal, thread, delta + warpgroup * 64 * 4);
    } else if (thread < Blocks * kTileRows) {
      store_shared<float>(delta + thread * 4, own_delta);
    }
    named_barrier(kConsumerBarrier, Shape::kConsumers);  // delta is there, and P^T is read no more
    if constexpr (FindsDelta) {
      if (own_position != kNoRow) store_global(a.delta + own_position, load_shared<float>(delta + thread * 4));
    }

    const WarpOutput<T> key_rows(own_thread(), a.grad_key, a.tiling, group, key0);
    const auto query_rows = [&](int b) {
      return WarpOutput<T>(own_thread(), a.grad_query, a.tiling, group, query0(b));
    };
    // What is to be added to, as far as there is room for it.
    const auto fetch_old = [&](int p) {
      if (!accumulate) return;
      if constexpr (Blocks == 1) key_rows.fetch(own_thread(), staging, a.grad_key, p);
      query_rows(0).fetch(own_thread(), other_staging, a.grad_query, p);
    };
    fetch_old(0);
    CCNET_UNROLL
    for (int b = 0; b < Blocks; ++b) {
      CCNET_UNROLL
      for (int k = 0; k < Weights::kSteps; ++k) {
        uint32_t words[4];
        weights.get(b, k, words);
        CCNET_UNROLL
        for (int h = 0; h < 2; ++h) {
          const int j = 2 * k + h;
          if (8 * j >= Rows) continue;  // still 0
          float delta0, delta1;
          load_pair(delta + (b * kTileRows + 8 * j + lane_column) * 4, delta0, delta1);
          CCNET_UNROLL
          for (int r = 0; r < 2; ++r) {
            float p0, p1;
            unpack_pair<T>(words[2 * h + r], p0, p1);
            words[2 * h + r] = pack<T>(p0 * (pair[b][4 * j + 2 * r] - delta0),
                                       p1 * (pair[b][4 * j + 2 * r + 1] - delta1));
          }
        }
        weights.template put<true>(b, k, words);
      }
      // dQ takes whole halves of a tile, whose last rows nobody wants: but they must hold something.
      CCNET_UNROLL
      for (int k = Weights::kSteps; k < kTileRows / 16; ++k) store_matrices(weights.place(b, k), {0, 0, 0, 0});
    }
    fence_shared_for_async();
    named_barrier(kConsumerBarrier, Shape::kConsumers);

    const uint64_t queries = panel_descriptor(shared + Shape::kWeightsOffset + warpgroup * Shape::kPanelBytes);
    float key_grad[32], query_grad[Blocks][32];
    clear(key_grad);
    CCNET_UNROLL
    for (int b = 0; b < Blocks; ++b) clear(query_grad[b]);
    const auto multiply_keys = [&](int slot) {
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) weights.multiply(key_grad, b, query_side(slot, b), b > 0);
      commit_products();
    };
    const auto multiply_queries = [&](int slot) {
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) {
        CCNET_UNROLL
        for (int k = 0; k < Weights::kSteps; ++k) {
          WarpgroupProduct<T, 64>::template multiply<Major::kOuter, Major::kOuter>(
              query_grad[b], advance(queries, 2 * b * kPanelAdvance + k * kOuterAdvance),
              advance(key_side(slot), k * kOuterAdvance), k > 0);
        }
      }
      commit_products();
    };
    const auto await_old = [&]() {
      wait_copies();
      converge_warp();
    };
    CCNET_UNROLL_BY(1)
    for (int p = 0; p < qk_steps; ++p) {
      const int slot = ring.take();
      converge_warp();
      begin_products();
      if constexpr (Blocks == 1) {
        multiply_keys(slot);
        multiply_queries(slot);
        wait_products<1>();
        hold(key_grad);
        if (accumulate) await_old();
        key_rows.write(own_thread(), key_grad, accumulate, staging, a.grad_key, p);
        wait_products<0>();
        if (leads_warp) ring.release(slot);
        hold(query_grad[0]);
        query_rows(0).write(own_thread(), query_grad[0], accumulate, other_staging, a.grad_query, p);
      } else {
        multiply_queries(slot);
        multiply_keys(slot);
        wait_products<1>();
        CCNET_UNROLL
        for (int b = 0; b < Blocks; ++b) hold(query_grad[b]);
        if (accumulate) await_old();
        query_rows(0).write(own_thread(), query_grad[0], accumulate, staging, a.grad_query, p);
        // Warp by warp each CTA tells the other, and goes on to the other's tile. A barrier serves every other time,
        // since one CTA may be a time ahead.
        SharedBarrier* const written = query_written + queries_written % 2 * kConsumerWarps + own_thread() / kWarp;
        converge_warp();
        if (leads_warp) arrive_in_cluster(written, key_block ^ 1);
        if (accumulate) key_rows.fetch(own_thread(), staging, a.grad_key, p);
        wait_products<0>();
        if (leads_warp) ring.release(slot);
        hold(key_grad);
        if (accumulate) await_old();
        key_rows.write(own_thread(), key_grad, accumulate, staging, a.grad_key, p);
        wait_phase_in_cluster(written, queries_written / 2 % 2);
        ++queries_written;
        query_rows(1).fetch(own_thread(), staging, a.grad_query, p);
        await_old();
        query_rows(1).write(own_thread(), query_grad[1], true, staging, a.grad_query, p);
      }
      if (p + 1 < qk_steps) fetch_old(p + 1);
    }
    if constexpr (FindsDelta) {
      if (leads_warp) arrive(group_done);
    }
  }
}

// delta = sum over channels of dO * O, fp32, where positions are equally far apart in memory: a warp takes two at a
// time, with all loads of up to 512 channels in flight. CTAs are as large as can be, so that a grid smaller than the
// machine leaves whole multiprocessors to the launch that follows, which needs delta late.
constexpr int kDenseDeltaThreads = 1024;

template <typename T>
struct DenseDeltaArgs {
  const T* grad_out;
  const T* out;
  int64_t grad_out_step, out_step;  // from a position to the next; multiples of a segment, as are the addresses
  int64_t positions;                // B * N, below 2^31
  int channels;                     // a multiple of a segment
  float* delta;                     // (B, N)
  int blocks;
};

template <typename T>
CCNET_KERNEL(kDenseDeltaThreads, 1)
void dense_delta_kernel(DenseDeltaArgs<T> a) {
  constexpr int kLength = kSegmentLength<T>;
  constexpr int kPositions = 2, kChunks = 2;
  allow_next_launch();
  const int lane = thread_index() % kWarp;
  const uint32_t warps = static_cast<uint32_t>(a.blocks) * (kDenseDeltaThreads / kWarp);
  const uint32_t positions = static_cast<uint32_t>(a.positions);
  uint32_t first = (static_cast<uint32_t>(block_index()) * (kDenseDeltaThreads / kWarp) +
                    static_cast<uint32_t>(thread_index() / kWarp)) * kPositions;
  const T* grad_out = a.grad_out + first * a.grad_out_step + lane * kLength;
  const T* out = a.out + first * a.out_step + lane * kLength;
  const int64_t grad_out_stride = warps * kPositions * a.grad_out_step;
  const int64_t out_stride = warps * kPositions * a.out_step;
  CCNET_UNROLL_BY(1)
  for (; first < positions; first += warps * kPositions, grad_out += grad_out_stride, out += out_stride) {
    float sum[kPositions] = {0.f, 0.f};
    CCNET_UNROLL_BY(1)
    for (int c = 0; c < a.channels; c += kChunks * kWarp * kLength) {
      Segment g[kPositions][kChunks], o[kPositions][kChunks];
      CCNET_UNROLL
      for (int i = 0; i < kPositions; ++i) {
        CCNET_UNROLL
        for (int k = 0; k < kChunks; ++k) {
          const int channel = c + k * kWarp * kLength;
          g[i][k] = o[i][k] = {{0, 0, 0, 0}};
          if (first + i < positions && channel + lane * kLength < a.channels) {
            g[i][k] = load_global(reinterpret_cast<const Segment*>(grad_out + i * a.grad_out_step + channel));
            o[i][k] = load_global(reinterpret_cast<const Segment*>(out + i * a.out_step + channel));
          }
        }
      }
      CCNET_UNROLL
      for (int i = 0; i < kPositions; ++i) {
        CCNET_UNROLL
        for (int k = 0; k < kChunks; ++k) {
          float x[kLength], y[kLength];
          unpack<T>(g[i][k], x);
          unpack<T>(o[i][k], y);
          CCNET_UNROLL
          for (int e = 0; e < kLength; ++e) sum[i] = fmaf(x[e], y[e], sum[i]);
        }
      }
    }
    // Even lanes go on with the first position's sum, odd lanes with the second's.
    const bool odd = lane % 2 != 0;
    float own = odd ? sum[1] : sum[0];
    own += shuffle_xor(odd ? sum[0] : sum[1], 1);
    CCNET_UNROLL
    for (int bit = 2; bit < kWarp; bit *= 2) own += shuffle_xor(own, bit);
    if (lane < kPositions && first + lane < positions) store_global(a.delta + first + lane, own);
  }
}

}  // namespace cuda
}  // namespace ccnet
