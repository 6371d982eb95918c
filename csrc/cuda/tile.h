// Products of shared-memory tiles, one warp's share of the result in registers.
//
// WarpTile<T, Rows, Columns, A, B> accumulates A B in fp32: A is Rows x depth, B depth x Columns. An operand's Order
// says how it lies in shared memory. Each lane holds kLaneRows x kLaneColumns elements; row(r) and column(c) tell which.
//   fp16, bf16: tensor cores, mma.m16n8k16; operands by ldmatrix.
//   fp32: tensor cores, each product as three of parts (tile_float.h).
#pragma once

#include "panel.h"

namespace ccnet {
namespace cuda {

enum class Order {
  kOuter,  // [row of A or column of B][depth]
  kDepth,  // [depth][row of A or column of B]
};

// Where ldmatrix gets its rows for a fragment of 16 (outer) x 16 (depth) elements: lane l passes row `row`, segment
// `segment`, both counted from the fragment's corner. The four 8x8 matrices come out as registers 0-3.
struct FragmentRow {
  int row;
  int segment;
};
// A (16x16): registers are (rows 0-7, depth 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
template <Order order>
CCNET_HD FragmentRow fragment_row_a(int lane) {
  if (order == Order::kOuter) return {lane & 15, lane >> 4};
  return {(lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1};
}
// B (16 deep, 16 columns, two products wide): (depth 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
template <Order order>
CCNET_HD FragmentRow fragment_row_b(int lane) {
  if (order == Order::kOuter) return {(lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1};
  return {lane & 15, lane >> 4};
}

// What a lane holds of a tile, whatever the dtype: its products come in 16 rows x 8 columns, of which lane / 4 is the row
// and eight further, and the four lanes of a row share the columns.
template <int Rows, int Columns>
struct WarpSums {
  static_assert(Rows % 16 == 0 && Columns % 32 == 0, "a warp's tile is a multiple of 16 x 32");
  static constexpr int kLaneRows = Rows / 8;
  static constexpr int kLaneColumns = Columns / 4;

  float sum[Rows / 16][Columns / 8][4];

  CCNET_DEVICE void clear() {
    CCNET_UNROLL
    for (int m = 0; m < Rows / 16; ++m) {
      CCNET_UNROLL
      for (int n = 0; n < Columns / 8; ++n) {
        CCNET_UNROLL
        for (int e = 0; e < 4; ++e) sum[m][n][e] = 0.f;
      }
    }
  }

  // The place in the tile of row r of a thread's lane: that of row 0 and an offset.
  static CCNET_HD constexpr int row_offset(int r) { return (r >> 1) * 16 + (r & 1) * 8; }
  static CCNET_HD constexpr int row(int thread, int r) { return (thread % kWarp >> 2) + row_offset(r); }

  // Reductions over the lanes that hold one row; every one of them gets the result.
  static CCNET_DEVICE float row_max(float v) {
    v = fmaxf(v, shuffle_xor(v, 1));
    return fmaxf(v, shuffle_xor(v, 2));
  }
  static CCNET_DEVICE float row_sum(float v) {
    v += shuffle_xor(v, 1);
    return v + shuffle_xor(v, 2);
  }
  static CCNET_DEVICE bool leads_row() { return (thread_index() & 3) == 0; }
};

template <typename T, int Rows, int Columns, Order A, Order B>
struct WarpTile : WarpSums<Rows, Columns> {
  static constexpr int kDepthStep = 16;
  static constexpr int kRun = 2;  // neighbouring columns
  static constexpr int kSegments = Columns / 32;
  static constexpr int kSegmentStep = 32;  // columns from one to the next
  using WarpSums<Rows, Columns>::sum;
  using WarpSums<Rows, Columns>::row;

  // The place in the tile of column c of a thread's lane, as WarpSums has that of a row.
  static CCNET_HD constexpr int column_offset(int c) { return (c >> 1) * 8 + (c & 1); }
  static CCNET_HD constexpr int column(int thread, int c) { return (thread & 3) * 2 + column_offset(c); }
  CCNET_DEVICE float& at(int r, int c) { return sum[r >> 1][c >> 1][(r & 1) * 2 + (c & 1)]; }

  // Row `a0` of A and column `b0` of B are the tile's corner; the depth runs from 0.
  CCNET_DEVICE void multiply(const Panels& a, int a0, const Panels& b, int b0, int depth) {
    const int lane = recompute(thread_index()) % kWarp;
    const FragmentRow ra = fragment_row_a<A>(lane);
    const FragmentRow rb = fragment_row_b<B>(lane);
    CCNET_UNROLL_BY(2)
    for (int k = 0; k < depth; k += 16) {
      uint32_t fa[Rows / 16][4];
      CCNET_UNROLL
      for (int m = 0; m < Rows / 16; ++m) {
        if (A == Order::kOuter) {
          load_matrices(fa[m], a.segment(a0 + 16 * m + ra.row, k / 8 + ra.segment));
        } else {
          load_matrices_transposed(fa[m], a.segment(k + ra.row, (a0 + 16 * m) / 8 + ra.segment));
        }
      }
      CCNET_UNROLL
      for (int n = 0; n < Columns / 16; ++n) {
        uint32_t fb[4];
        if (B == Order::kOuter) {
          load_matrices(fb, b.segment(b0 + 16 * n + rb.row, k / 8 + rb.segment));
        } else {
          load_matrices_transposed(fb, b.segment(k + rb.row, (b0 + 16 * n) / 8 + rb.segment));
        }
        CCNET_UNROLL
        for (int m = 0; m < Rows / 16; ++m) {
          multiply_accumulate<T>(sum[m][2 * n], fa[m], fb[0], fb[1]);
          multiply_accumulate<T>(sum[m][2 * n + 1], fa[m], fb[2], fb[3]);
        }
      }
    }
  }

  // Elements (r, c) .. (r, c + kRun - 1) of this lane, at the same place of a matrix in shared memory whose corner is
  // (row0, column0).
  static CCNET_DEVICE void fetch(const Panels& p, int thread, int row0, int column0, int r, int c, float (&v)[kRun]) {
    const uint32_t word = load_shared<uint32_t>(p.element<T>(row0 + row(thread, r), column0 + column(thread, c)));
    v[0] = to_float<T>(T{static_cast<uint16_t>(word)});
    v[1] = to_float<T>(T{static_cast<uint16_t>(word >> 16)});
  }
  static CCNET_DEVICE void put(const Panels& p, int thread, int row0, int column0, int r, int c,
                               const float (&v)[kRun]) {
    store_shared<uint32_t>(p.element<T>(row0 + row(thread, r), column0 + column(thread, c)), pack<T>(v[0], v[1]));
  }

  // One 16-byte segment's worth of neighbouring columns of row(r), beginning at segment_column(s). A collective of the
  // warp: the four lanes of a row exchange their pairs, so that each ends up with one of four neighbouring 8-column
  // groups.
  static CCNET_HD constexpr int segment_column(int thread, int s) { return s * kSegmentStep + (thread & 3) * 8; }
  CCNET_DEVICE void segment(int r, int s, float (&v)[8]) {
    CCNET_UNROLL
    for (int j = 0; j < 4; ++j) {
      v[2 * j] = at(r, 8 * s + 2 * j);
      v[2 * j + 1] = at(r, 8 * s + 2 * j + 1);
    }
    CCNET_UNROLL
    for (int bit = 1; bit < 4; bit *= 2) {
      const bool high = (thread_index() & bit) != 0;
      CCNET_UNROLL
      for (int j = 0; j < 4; ++j) {
        if ((j & bit) != 0) continue;
        CCNET_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& low_value = v[2 * j + e];
          float& high_value = v[2 * (j + bit) + e];
          const float received = shuffle_xor(high ? low_value : high_value, bit);
          if (high) {
            low_value = received;
          } else {
            high_value = received;
          }
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace ccnet

#include "tile_float.h"
