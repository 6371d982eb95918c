// The backward kernels for compute capability 9.0, fp16 and bf16, lines of at most 256 positions. What is computed is
// what backward.h describes; here the products are wgmma, transposed so that keys are rows, and panels come by TMA.
//
// A CTA takes one group of lines (hopper_lines.h): one tile of 128 rows, or the two tiles of a longer line. Two
// warpgroups compute, each with 64 keys of a tile; one more warp does nothing but load. For each tile of keys:
//   P^T = exp(K Q^T - lse);  dP^T = V dO^T over the channels, while dV = P^T dO is written panel by panel;
//   dS^T = P^T (dP^T - delta);  dK = dS^T Q and dQ (+)= dS K, panel by panel.
// Every output element is written by one thread of one CTA in a fixed order: no atomics, the same bits every time.
#pragma once

#include "hopper_lines.h"
#include "quad.h"

namespace ccnet {
namespace cuda {

// `Blocks`: tiles of a line.
template <typename T, int Blocks>
struct HopperBackwardShape {
  static_assert(sizeof(T) == 2 && (Blocks == 1 || Blocks == 2), "fp16 or bf16, at most 256 positions");
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

  // Shared memory: stages of panels (one of K or V, and for each tile of queries one of Q or dO); panels of P^T or dS^T
  // [key][64 queries]; for each position of the tiles lse, delta and where its rows of dQ, dK and dV are; barriers.
  static constexpr int kPanelBytes = panel_bytes(kTileRows);
  static constexpr int kStages = Blocks == 1 ? 6 : 3;
  static constexpr int kStageBytes = (1 + Blocks) * kPanelBytes;
  static constexpr int kWeightsOffset = kStages * kStageBytes;
  static constexpr int kWeightsPanels = 2 * Blocks;
  static constexpr int kLseOffset = kWeightsOffset + kWeightsPanels * kPanelBytes;
  static constexpr int kTableBytes = Blocks * kTileRows * 4;
  static constexpr int kDeltaOffset = kLseOffset + kTableBytes;
  static constexpr int kQueryRowsOffset = kDeltaOffset + kTableBytes;
  static constexpr int kKeyRowsOffset = kQueryRowsOffset + kTableBytes;
  static constexpr int kValueRowsOffset = kKeyRowsOffset + kTableBytes;
  static constexpr int kBarriersOffset = kValueRowsOffset + kTableBytes;
  static constexpr int kSharedBytes = kBarriersOffset + 2 * kStages * static_cast<int>(sizeof(SharedBarrier));
};

// The plan sees to it that lines have at most Blocks tiles, that 31 bits hold the number of positions, and 32 bits that
// of each output's segments.
template <typename T>
struct HopperBackwardArgs {
  TensorMap query, key, value, grad_out;  // boxes of 64 channels x span x group
  Tiling tiling;
  LineStrides position;  // of (B, N) statistics
  bool drop_self;
  int qk_channels, channels;
  Output<T> grad_query, grad_key, grad_value;  // with vectors
  const float* lse;                            // (B, N)
  const float* delta;                          // (B, N), of an earlier launch
  bool accumulate;                             // an earlier launch has written the gradients
  int groups;                                  // of lines: CTA i takes groups i, i + blocks, ...
  int blocks;
};

// Stages in shared memory, filled by the loading warp and consumed by the others in turn.
template <int Stages, int StageBytes, int Arrivals>
struct StageRing {
  char* stages;
  SharedBarrier* full;  // Stages of them, and as many more, `empty`
  int slot = 0, parity = 0;  // of the next stage
  bool first_round = true;

  CCNET_DEVICE StageRing(char* memory, char* barriers)
      : stages(memory), full(reinterpret_cast<SharedBarrier*>(barriers)) {}

  // By one thread.
  CCNET_DEVICE void init() {
    for (int s = 0; s < Stages; ++s) {
      init_barrier(full + s, 1);
      init_barrier(full + Stages + s, Arrivals);
    }
    fence_barriers();
  }
  CCNET_DEVICE char* stage(int s) const { return stages + s * StageBytes; }

  // The loader's next stage, once everyone has released it: the caller brings `bytes` bytes into it, on full[it].
  CCNET_DEVICE int acquire(int bytes) {
    if (!first_round) wait_phase(full + Stages + slot, parity ^ 1);
    arrive_and_expect(full + slot, bytes);
    return step();
  }
  // A consumer's next stage, filled.
  CCNET_DEVICE int take() {
    wait_phase(full + slot, parity);
    return step();
  }
  // By one lane of each warp, when the warp's products have read the stage.
  CCNET_DEVICE void release(int s) { arrive(full + Stages + s); }

 private:
  CCNET_DEVICE int step() {
    const int s = slot;
    if (++slot == Stages) {
      slot = 0;
      parity ^= 1;
      first_round = false;
    }
    return s;
  }
};

// Where a position's row of an output is, in segments from the beginning.
constexpr uint32_t kNoRow = 0xffffffffu;

template <typename T>
CCNET_DEVICE uint32_t output_row(const Output<T>& out, const Line& group, int first, const TileRow& row) {
  return static_cast<uint32_t>(row_offset(out.strides, group, first, row) / kSegmentLength<T>);
}

// Writes a warpgroup's products of 64 rows x 64 channels, of which a lane holds parts of two rows (WarpgroupProduct).
// The four lanes that share a row exchange their parts, so that each reads and writes whole segments.
template <typename T>
struct LaneRows {
  uint32_t row[2];
  Segment old[2][2];

  // `table`: the entry of the lane's first row in a table of output rows.
  CCNET_DEVICE explicit LaneRows(const char* table)
      : row{load_shared<uint32_t>(table), load_shared<uint32_t>(table + 8 * 4)}, old{} {}

  static CCNET_DEVICE Segment* place(T* out, uint32_t row, int channel) {
    return reinterpret_cast<Segment*>(out) + row + channel / kSegmentLength<T>;
  }
  static CCNET_DEVICE int lane_channel() { return recompute(thread_index()) % 4 * kSegmentLength<T>; }

  // What an earlier launch or an earlier tile of keys has left in channels channel0 .. channel0 + 63.
  CCNET_DEVICE void read(T* out, int channels, int channel0) {
    const int channel = channel0 + lane_channel();
    CCNET_UNROLL
    for (int r = 0; r < 2; ++r) {
      CCNET_UNROLL
      for (int s = 0; s < 2; ++s) {
        old[r][s] = {{0, 0, 0, 0}};
        if (row[r] != kNoRow && channel + 32 * s < channels) {
          old[r][s] = load_global(place(out, row[r], channel + 32 * s));
        }
      }
    }
  }

  // `add`: to what read() has brought. A collective of the warp.
  CCNET_DEVICE void write(const float (&d)[32], bool add, T* out, int channels, int channel0) {
    const int channel = channel0 + lane_channel();
    CCNET_UNROLL
    for (int r = 0; r < 2; ++r) {
      CCNET_UNROLL
      for (int s = 0; s < 2; ++s) {
        float v[8];
        CCNET_UNROLL
        for (int j = 0; j < 4; ++j) {
          v[2 * j] = d[4 * (4 * s + j) + 2 * r];
          v[2 * j + 1] = d[4 * (4 * s + j) + 2 * r + 1];
        }
        if (add) {
          float before[8];
          transpose_words(old[r][s].word);
          unpack<T>(old[r][s], before);
          CCNET_UNROLL
          for (int e = 0; e < 8; ++e) v[e] += before[e];
        }
        Segment sum = pack_segment<T>(v);
        transpose_words(sum.word);
        if (row[r] != kNoRow && channel + 32 * s < channels) {
          store_global(place(out, row[r], channel + 32 * s), sum);
        }
      }
    }
  }
};

// A product that does not add still counts as reading its sums. Set before a loop, they occupy no registers outside it.
template <int Count>
CCNET_DEVICE void clear(float (&d)[Count]) {
  CCNET_UNROLL
  for (int i = 0; i < Count; ++i) d[i] = 0.f;
}

// Two neighbouring floats.
CCNET_DEVICE void load_pair(const char* p, float& a, float& b) {
  const uint64_t v = load_shared<uint64_t>(p);
  a = bits_to_float(static_cast<uint32_t>(v));
  b = bits_to_float(static_cast<uint32_t>(v >> 32));
}
template <typename T>
CCNET_DEVICE void unpack_pair(uint32_t word, float& a, float& b) {
  a = to_float<T>(T{static_cast<uint16_t>(word)});
  b = to_float<T>(T{static_cast<uint16_t>(word >> 16)});
}

// Distances between operands in a descriptor, which counts 16 bytes.
constexpr int kDepthAdvance = 16 * 2 / kSegmentBytes;           // 16 deep in an operand stored kDepth
constexpr int kOuterAdvance = 16 * kRowBytes / kSegmentBytes;   // 16 deep in an operand stored kOuter
constexpr int kHalfAdvance = 64 * kRowBytes / kSegmentBytes;    // from a tile's rows 0-63 to its rows 64-127
constexpr int kPanelAdvance = kTileRows * kRowBytes / kSegmentBytes;  // to the next panel

// P^T, later dS^T, of a warpgroup's 64 keys and of all queries of the line. A lane holds for column group j (eight
// queries) and row r of its two the elements of columns 8 j + lane % 4 * 2 and the next: one word.
template <typename T, int Blocks>
struct KeyWeights {
  using Shape = HopperBackwardShape<T, Blocks>;
  static constexpr int kSteps = kTileRows / 16;

  uint32_t registers[Shape::kWeightsInRegisters ? Blocks : 1][kSteps][4];
  char* lane;           // the lane's first word in the first panel
  int swizzle;          // of its rows
  uint64_t descriptor;  // of the warpgroup's keys in the first panel

  // `row`: of the tile, the lane's first.
  CCNET_DEVICE KeyWeights(char* panels, int row)
      : lane(panels + row * kRowBytes + thread_index() % 4 * 4),
        swizzle(row % kRowSegments * kSegmentBytes),
        descriptor(panel_descriptor(panels) + static_cast<uint64_t>(row / 64 * kHalfAdvance)) {}

  CCNET_DEVICE char* place(int block, int r, int j) const {
    const int panel = 2 * block + j / kRowSegments;
    return lane + panel * Shape::kPanelBytes + r * 8 * kRowBytes + (j % kRowSegments * kSegmentBytes ^ swizzle);
  }
  CCNET_DEVICE uint32_t get(int block, int r, int j) const {
    if constexpr (Shape::kWeightsInRegisters) return registers[block][j / 2][j % 2 * 2 + r];
    return load_shared<uint32_t>(place(block, r, j));
  }
  template <bool InShared>
  CCNET_DEVICE void put(int block, int r, int j, uint32_t word) {
    // Without recompute() the compiler holds the halves of the word and joins them anew for every product.
    if constexpr (Shape::kWeightsInRegisters) {
      registers[block][j / 2][j % 2 * 2 + r] = static_cast<uint32_t>(recompute(static_cast<int>(word)));
    }
    if constexpr (InShared || !Shape::kWeightsInRegisters) store_shared<uint32_t>(place(block, r, j), word);
  }

  // d (+)= these weights for queries of `block` times a panel [query][channel].
  CCNET_DEVICE void multiply(float (&d)[32], int block, uint64_t panel, bool add_to) const {
    CCNET_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      const uint64_t b = panel + static_cast<uint64_t>(k * kOuterAdvance);
      if constexpr (Shape::kWeightsInRegisters) {
        WarpgroupProduct<T, 64>::template multiply<Major::kOuter>(d, registers[block][k], b, add_to || k > 0);
      } else {
        const int advance = (2 * block + k / 4) * kPanelAdvance + k % 4 * kDepthAdvance;
        WarpgroupProduct<T, 64>::template multiply<Major::kDepth, Major::kOuter>(
            d, descriptor + static_cast<uint64_t>(advance), b, add_to || k > 0);
      }
    }
  }
};

// d (+)= 64 rows of one panel times the 128 rows of another, transposed: both [row][64 channels].
template <typename T>
CCNET_DEVICE void multiply_rows(float (&d)[64], uint64_t a, uint64_t b, bool add_to) {
  CCNET_UNROLL
  for (int k = 0; k < kPanelWidth<T> / 16; ++k) {
    WarpgroupProduct<T, 128>::template multiply<Major::kDepth, Major::kDepth>(
        d, a + static_cast<uint64_t>(k * kDepthAdvance), b + static_cast<uint64_t>(k * kDepthAdvance),
        add_to || k > 0);
  }
}

template <typename T, int Blocks>
CCNET_KERNEL((HopperBackwardShape<T, Blocks>::kThreads), 1)
void hopper_backward_kernel(CCNET_CONSTANT_PARAMETER HopperBackwardArgs<T> a) {
  using Shape = HopperBackwardShape<T, Blocks>;
  constexpr int kWidth = kPanelWidth<T>;
  constexpr int kConsumerWarps = Shape::kConsumers / kWarp;
  constexpr int kConsumerBarrier = 1;   // numbers of named barriers
  constexpr int kWarpgroupBarrier = 2;  // and the next

  char* const shared = dynamic_shared();
  char* const lse = shared + Shape::kLseOffset;
  char* const delta = shared + Shape::kDeltaOffset;
  StageRing<Shape::kStages, Shape::kStageBytes, kConsumerWarps> ring(shared, shared + Shape::kBarriersOffset);
  const int thread = thread_index();
  if (thread == Shape::kConsumers) {
    prefetch_map(&a.key);
    prefetch_map(&a.query);
    ring.init();
    prefetch_map(&a.value);
    prefetch_map(&a.grad_out);
  }
  barrier();
  allow_next_launch();

  const int qk_steps = static_cast<int>(ceil_div(a.qk_channels, kWidth));
  const int value_steps = static_cast<int>(ceil_div(a.channels, kWidth));
  const int box_rows = tile_rows(a.tiling);

  if (thread >= Shape::kConsumers) {
    release_registers<Shape::kLoaderRegisters>();
    if (thread > Shape::kConsumers) return;
    for (int number = static_cast<int>(block_index()); number < a.groups; number += a.blocks) {
      const Line group = find_group(a.tiling, number);
      const int other0 = static_cast<int>(group.at[1]), other1 = static_cast<int>(group.at[0]);
      const int batch = static_cast<int>(group.batch);
      const auto load = [&](const TensorMap* key_side, const TensorMap* query_side, int key_block, int panel) {
        const int slot = ring.acquire((1 + Blocks) * panel_bytes(box_rows));
        char* const stage = ring.stage(slot);
        SharedBarrier* const full = ring.full + slot;
        load_box(stage, key_side, panel * kWidth, key_block * kTileRows, other0, other1, batch, full);
        CCNET_UNROLL
        for (int b = 0; b < Blocks; ++b) {
          load_box(stage + (1 + b) * Shape::kPanelBytes, query_side, panel * kWidth, b * kTileRows, other0, other1,
                   batch, full);
        }
      };
      for (int key_block = 0; key_block < Blocks; ++key_block) {
        for (int p = 0; p < qk_steps; ++p) load(&a.key, &a.query, key_block, p);
        for (int p = 0; p < value_steps; ++p) load(&a.value, &a.grad_out, key_block, p);
        for (int p = 0; p < qk_steps; ++p) load(&a.key, &a.query, key_block, p);
      }
    }
    return;
  }
  claim_registers<Shape::kConsumerRegisters>();

  // Rows that no box brings must be zero: they are multiplied with zero weights.
  for (int row = box_rows + thread / kRowSegments; row < kTileRows; row += Shape::kConsumers / kRowSegments) {
    CCNET_UNROLL_BY(1)
    for (int panel = 0; panel < Shape::kStages * (1 + Blocks); ++panel) {
      char* const panel_row = shared + panel * Shape::kPanelBytes + row * kRowBytes;
      store_shared<Segment>(panel_row + thread % kRowSegments * kSegmentBytes, {{0, 0, 0, 0}});
    }
  }
  fence_shared_for_async();
  const int warpgroup = thread / kWarpgroup;
  const bool leads_warp = thread % kWarp == 0;
  const int lane_row = thread / kWarp * 16 + thread % kWarp / 4;
  const int lane_column = thread % 4 * 2;
  const char* const lane_tables = shared + lane_row * 4;
  const uint64_t own_half = static_cast<uint64_t>(warpgroup * kHalfAdvance);
  KeyWeights<T, Blocks> weights(shared + Shape::kWeightsOffset, lane_row);

  // The panel of K or V in a stage, and that of Q or dO for a tile of queries.
  const auto key_side = [&](int slot) { return panel_descriptor(ring.stage(slot)); };
  const auto query_side = [&](int slot, int b) {
    return key_side(slot) + static_cast<uint64_t>((1 + b) * kPanelAdvance);
  };
  // d (+)= this warpgroup's keys times the queries, one panel deep.
  const auto multiply_pairs = [&](float (&d)[Blocks][64], int slot, bool add_to) {
    CCNET_UNROLL
    for (int b = 0; b < Blocks; ++b) {
      multiply_rows<T>(d[b], key_side(slot) + own_half, query_side(slot, b), add_to);
    }
  };

  CCNET_UNROLL_BY(1)
  for (int number = static_cast<int>(block_index()); number < a.groups; number += a.blocks) {
    const Line group = find_group(a.tiling, number);
    if (number >= a.blocks) named_barrier(kConsumerBarrier, Shape::kConsumers);  // nobody needs the last group's tables
    // The statistics of query number `thread`.
    const int own_first = thread / kTileRows * kTileRows;
    const TileRow own = tile_row(a.tiling, thread % kTileRows);
    const bool own_exists = thread < Blocks * kTileRows && row_exists(a.tiling, group, own_first, own);
    const uint32_t own_position =
        own_exists ? static_cast<uint32_t>(row_offset(a.position, group, own_first, own)) : kNoRow;
    if (thread < Blocks * kTileRows) {
      char* const entry = shared + thread * 4;
      store_shared<float>(entry + Shape::kLseOffset, own_exists ? load_global(a.lse + own_position) : INFINITY);
      store_shared<uint32_t>(entry + Shape::kQueryRowsOffset,
                             own_exists ? output_row(a.grad_query, group, own_first, own) : kNoRow);
      store_shared<uint32_t>(entry + Shape::kKeyRowsOffset,
                             own_exists ? output_row(a.grad_key, group, own_first, own) : kNoRow);
      store_shared<uint32_t>(entry + Shape::kValueRowsOffset,
                             own_exists ? output_row(a.grad_value, group, own_first, own) : kNoRow);
    }
    named_barrier(kConsumerBarrier, Shape::kConsumers);

    CCNET_UNROLL_BY(1)
    for (int key_block = 0; key_block < Blocks; ++key_block) {
      const int key0 = key_block * kTileRows;
      float pair[Blocks][64];            // dP^T
      float separate_scores[Blocks][64];  // S^T, where there are registers for it
      float(&scores)[Blocks][64] = Shape::kSeparateScores ? separate_scores : pair;
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
      if (key_block > 0) named_barrier(kConsumerBarrier, Shape::kConsumers);  // dS^T is read no more
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) {
        Partners partners[2];
        CCNET_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int row = recompute(lane_row) + 8 * r;
          partners[r] = partners_of(a.tiling, tile_row(a.tiling, row), key0, b * kTileRows, a.drop_self);
          if (load_shared<uint32_t>(shared + Shape::kKeyRowsOffset + (key0 + row) * 4) == kNoRow) partners[r].count = 0;
        }
        CCNET_UNROLL
        for (int j = 0; j < kTileRows / 8; ++j) {
          float lse0, lse1;
          load_pair(lse + (b * kTileRows + 8 * j + lane_column) * 4, lse0, lse1);
          CCNET_UNROLL
          for (int r = 0; r < 2; ++r) {
            const float p0 = exp2_rounded((scores[b][4 * j + 2 * r] - lse0) * kLog2E);
            const float p1 = exp2_rounded((scores[b][4 * j + 2 * r + 1] - lse1) * kLog2E);
            const int column = 8 * j + lane_column;
            weights.template put<false>(b, r, j, pack<T>(partners[r].has(column) ? p0 : 0.f,
                                                         partners[r].has(column + 1) ? p1 : 0.f));
          }
        }
      }
      if constexpr (!Shape::kWeightsInRegisters) {
        fence_shared_for_async();
        named_barrier(kWarpgroupBarrier + warpgroup, kWarpgroup);
      }
      if constexpr (!Shape::kSeparateScores) begin_pairs();

      float own_delta = 0.f;
      LaneRows<T> value_rows(lane_tables + Shape::kValueRowsOffset + key0 * 4);
      float grad[32];
      clear(grad);
      CCNET_UNROLL_BY(1)
      for (int p = 0; p < value_steps; ++p) {
        const bool last = p + 1 == value_steps;
        converge_warp();
        begin_products();
        CCNET_UNROLL
        for (int b = 0; b < Blocks; ++b) weights.multiply(grad, b, query_side(slot, b), b > 0);
        commit_products();
        const int released = slot;
        if (!last) {
          slot = ring.take();
          converge_warp();
          begin_products();
          multiply_pairs(pair, slot, true);
        }
        begin_products();
        commit_products();
        // What earlier launches have left is needed here at last.
        if (key_block == 0 && (a.accumulate ? p == 0 : last)) wait_for_previous_launch();
        if (key_block == 0 && last && own_position != kNoRow) own_delta = load_global(a.delta + own_position);
        if (a.accumulate && p == 0) value_rows.read(a.grad_value.data, a.channels, 0);
        wait_products<1>();
        hold(grad);
        if (leads_warp) ring.release(released);
        value_rows.write(grad, a.accumulate, a.grad_value.data, a.channels, p * kWidth);
        if (a.accumulate && !last) value_rows.read(a.grad_value.data, a.channels, (p + 1) * kWidth);
      }
      wait_products<0>();
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) hold(pair[b]);
      if (key_block == 0 && thread < Blocks * kTileRows) store_shared<float>(delta + thread * 4, own_delta);
      named_barrier(kConsumerBarrier, Shape::kConsumers);  // delta is there, and P^T is read no more

      LaneRows<T> key_rows(lane_tables + Shape::kKeyRowsOffset + key0 * 4);
      if (a.accumulate) key_rows.read(a.grad_key.data, a.qk_channels, 0);
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) {
        CCNET_UNROLL
        for (int j = 0; j < kTileRows / 8; ++j) {
          float delta0, delta1;
          load_pair(delta + (b * kTileRows + 8 * j + lane_column) * 4, delta0, delta1);
          CCNET_UNROLL
          for (int r = 0; r < 2; ++r) {
            float p0, p1;
            unpack_pair<T>(weights.get(b, r, j), p0, p1);
            weights.template put<true>(b, r, j, pack<T>(p0 * (pair[b][4 * j + 2 * r] - delta0),
                                                        p1 * (pair[b][4 * j + 2 * r + 1] - delta1)));
          }
        }
      }
      fence_shared_for_async();
      named_barrier(kConsumerBarrier, Shape::kConsumers);

      const bool add_query = a.accumulate || key_block > 0;
      const uint64_t queries = panel_descriptor(shared + Shape::kWeightsOffset + warpgroup * Shape::kPanelBytes);
      float key_grad[32], query_grad[Blocks][32];
      clear(key_grad);
      CCNET_UNROLL
      for (int b = 0; b < Blocks; ++b) clear(query_grad[b]);
      CCNET_UNROLL_BY(1)
      for (int p = 0; p < qk_steps; ++p) {
        const int slot = ring.take();
        converge_warp();
        begin_products();
        CCNET_UNROLL
        for (int b = 0; b < Blocks; ++b) weights.multiply(key_grad, b, query_side(slot, b), b > 0);
        commit_products();
        CCNET_UNROLL
        for (int b = 0; b < Blocks; ++b) {
          CCNET_UNROLL
          for (int k = 0; k < kTileRows / 16; ++k) {
            WarpgroupProduct<T, 64>::template multiply<Major::kOuter, Major::kOuter>(
                query_grad[b], queries + static_cast<uint64_t>(2 * b * kPanelAdvance + k * kOuterAdvance),
                key_side(slot) + static_cast<uint64_t>(k * kOuterAdvance), k > 0);
          }
        }
        commit_products();
        wait_products<1>();
        hold(key_grad);
        key_rows.write(key_grad, a.accumulate, a.grad_key.data, a.qk_channels, p * kWidth);
        if (a.accumulate && p + 1 < qk_steps) key_rows.read(a.grad_key.data, a.qk_channels, (p + 1) * kWidth);
        wait_products<0>();
        if (leads_warp) ring.release(slot);
        CCNET_UNROLL
        for (int b = 0; b < Blocks; ++b) {
          hold(query_grad[b]);
          LaneRows<T> query_rows(lane_tables + Shape::kQueryRowsOffset + b * kTileRows * 4);
          if (add_query) query_rows.read(a.grad_query.data, a.qk_channels, p * kWidth);
          query_rows.write(query_grad[b], add_query, a.grad_query.data, a.qk_channels, p * kWidth);
        }
      }
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
  int64_t positions;                // B * N
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
  const int64_t warp = block_index() * (kDenseDeltaThreads / kWarp) + thread_index() / kWarp;
  const int64_t warps = int64_t{a.blocks} * (kDenseDeltaThreads / kWarp);
  CCNET_UNROLL_BY(1)
  for (int64_t first = warp * kPositions; first < a.positions; first += warps * kPositions) {
    const T* const grad_out = a.grad_out + first * a.grad_out_step + lane * kLength;
    const T* const out = a.out + first * a.out_step + lane * kLength;
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
          if (first + i < a.positions && channel + lane * kLength < a.channels) {
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
    CCNET_UNROLL
    for (int bit = 1; bit < kWarp; bit *= 2) {
      CCNET_UNROLL
      for (int i = 0; i < kPositions; ++i) sum[i] += shuffle_xor(sum[i], bit);
    }
    const float own = lane == 0 ? sum[0] : sum[1];
    if (lane < kPositions && first + lane < a.positions) store_global(a.delta + first + lane, own);
  }
}

}  // namespace cuda
}  // namespace ccnet
