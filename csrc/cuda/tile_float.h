// WarpTile of fp32 tiles on tensor cores (see tile.h, which includes this).
//
// Tensor cores multiply TF32 numbers, of 11 significant bits. Every operand is split into a high part and the rest,
// both TF32, and a product is high x high + high x rest + rest x high in fp32: what is left out, and what the rest lacks,
// is 2^-22 of the product, about as much as fp32 rounds off in the sum. An Inf becomes NaN.
#pragma once

#include "tile.h"

namespace ccnet {
namespace cuda {

// Lanes of eight rows of four: lane / 4 is a row of A or a column of B, lane % 4 the depth. Of a B stored kDepth a lane
// reads whole segments, its columns in four products at once; numbered so that eight lanes, two columns and four depths,
// find eight different groups of banks.
template <int Rows, int Columns, Order A, Order B>
struct WarpTile<float, Rows, Columns, A, B> : WarpSums<Rows, Columns> {
  static constexpr int kDepthStep = 8;
  static constexpr int kRun = B == Order::kOuter ? 2 : 4;  // neighbouring columns
  static constexpr int kSegments = Columns / 16;
  static constexpr int kSegmentStep = 16;  // columns from one to the next
  using WarpSums<Rows, Columns>::sum;
  using WarpSums<Rows, Columns>::row;

  static CCNET_HD constexpr int column_offset(int c) {
    return B == Order::kOuter ? (c >> 1) * 8 + (c & 1) : (c >> 2) * 16 + (c & 3);
  }
  static CCNET_HD constexpr int column(int thread, int c) { return (thread & 3) * kRun + column_offset(c); }
  CCNET_DEVICE float& at(int r, int c) {
    if (B == Order::kOuter) return sum[r >> 1][c >> 1][(r & 1) * 2 + (c & 1)];
    return sum[r >> 1][(c >> 3) * 4 + (c & 3)][(r & 1) * 2 + (c >> 2 & 1)];
  }

  // Row `a0` of A and column `b0` of B are the tile's corner; the depth runs from 0.
  CCNET_DEVICE void multiply(const Panels& a, int a0, const Panels& b, int b0, int depth) {
    const int lane = recompute(thread_index()) % kWarp;
    // What comes next is read while the products of what came before are under way.
    uint32_t a_read[Rows / 16][4], b_read[4][2];
    load_a(a_read, a, a0, 0, lane);
    load_b(b_read, b, b0, 0, lane);
    CCNET_UNROLL_BY(1)
    for (int k = 0; k < depth; k += kDepthStep) {
      const int next = k + kDepthStep < depth ? k + kDepthStep : k;
      uint32_t a_high[Rows / 16][4], a_rest[Rows / 16][4];
      CCNET_UNROLL
      for (int m = 0; m < Rows / 16; ++m) {
        CCNET_UNROLL
        for (int e = 0; e < 4; ++e) split(a_read[m][e], a_high[m][e], a_rest[m][e]);
      }
      load_a(a_read, a, a0, next, lane);
      CCNET_UNROLL
      for (int n = 0; n < Columns / 8; n += 4) {
        uint32_t b_high[4][2], b_rest[4][2];
        CCNET_UNROLL
        for (int i = 0; i < 4; ++i) {
          split(b_read[i][0], b_high[i][0], b_rest[i][0]);
          split(b_read[i][1], b_high[i][1], b_rest[i][1]);
        }
        if (n + 4 < Columns / 8) {
          load_b(b_read, b, b0 + 8 * (n + 4), k, lane);
        } else {
          load_b(b_read, b, b0, next, lane);
        }
        // The small ones first; apart from the sum, to which tensor cores do not add as exactly as ordinary arithmetic.
        float part[Rows / 16][4][4];
        for_products([&](int m, int i) {
          multiply_tf32(part[m][i], a_rest[m], b_high[i][0], b_high[i][1]);
        });
        for_products([&](int m, int i) {
          multiply_accumulate_tf32(part[m][i], a_high[m], b_rest[i][0], b_rest[i][1]);
        });
        for_products([&](int m, int i) {
          multiply_accumulate_tf32(part[m][i], a_high[m], b_high[i][0], b_high[i][1]);
        });
        for_products([&](int m, int i) {
          CCNET_UNROLL
          for (int e = 0; e < 4; ++e) sum[m][n + i][e] += part[m][i][e];
        });
      }
    }
  }

  // Elements (r, c) .. (r, c + kRun - 1) of this lane, at the same place of a matrix in shared memory whose corner is
  // (row0, column0).
  static CCNET_DEVICE void fetch(const Panels& p, int thread, int row0, int column0, int r, int c, float (&v)[kRun]) {
    static_assert(kRun == 2, "a pair is read at once");
    const uint64_t pair = load_shared<uint64_t>(p.element<float>(row0 + row(thread, r), column0 + column(thread, c)));
    v[0] = bits_to_float(static_cast<uint32_t>(pair));
    v[1] = bits_to_float(static_cast<uint32_t>(pair >> 32));
  }
  static CCNET_DEVICE void put(const Panels& p, int thread, int row0, int column0, int r, int c,
                               const float (&v)[kRun]) {
    static_assert(kRun == 2, "a pair is written at once");
    store_shared<uint64_t>(p.element<float>(row0 + row(thread, r), column0 + column(thread, c)),
                           float_to_bits(v[0]) | static_cast<uint64_t>(float_to_bits(v[1])) << 32);
  }

  // One 16-byte segment's worth of neighbouring columns of row(r), beginning at segment_column(s).
  static CCNET_HD constexpr int segment_column(int thread, int s) { return s * kSegmentStep + (thread & 3) * 4; }
  CCNET_DEVICE void segment(int r, int s, float (&v)[4]) {
    static_assert(B == Order::kDepth, "only then are a lane's columns neighbours");
    CCNET_UNROLL
    for (int e = 0; e < 4; ++e) v[e] = at(r, 4 * s + e);
  }

 private:
  // x becomes its part of 11 significant bits, and what is left of it. The products read no more bits than that of
  // either.
  static CCNET_DEVICE void split(uint32_t x, uint32_t& high, uint32_t& rest) {
    constexpr uint32_t kHalf = 0x1000, kRead = 0xffffe000;
    high = (x + kHalf) & kRead;
    rest = float_to_bits(bits_to_float(x) - bits_to_float(high)) + kHalf;
  }

  // Of each 16 rows those of lane / 4 and 8 further at depth lane % 4, then at depth lane % 4 + 4.
  static CCNET_DEVICE void load_a(uint32_t (&v)[Rows / 16][4], const Panels& a, int a0, int k, int lane) {
    CCNET_UNROLL
    for (int m = 0; m < Rows / 16; ++m) {
      const int row = a0 + 16 * m;
      if (A == Order::kOuter) {
        const FragmentRow from = fragment_row_a<A>(lane);
        load_matrices(v[m], a.segment(row + from.row, k / 4 + from.segment));
      } else {
        CCNET_UNROLL
        for (int e = 0; e < 4; ++e) {
          v[m][e] = load_shared<uint32_t>(
              a.element<float>(k + (lane & 3) + (e >> 1) * 4, row + (lane >> 2) + (e & 1) * 8));
        }
      }
    }
  }

  // Four times eight columns, at depths lane % 4 and lane % 4 + 4.
  static CCNET_DEVICE void load_b(uint32_t (&v)[4][2], const Panels& b, int column, int k, int lane) {
    if (B == Order::kOuter) {
      const FragmentRow from = fragment_row_b<B>(lane);
      CCNET_UNROLL
      for (int i = 0; i < 4; i += 2) {
        uint32_t two[4];
        load_matrices(two, b.segment(column + 8 * i + from.row, k / 4 + from.segment));
        v[i][0] = two[0];
        v[i][1] = two[1];
        v[i + 1][0] = two[2];
        v[i + 1][1] = two[3];
      }
    } else {
      const int segment = column / 4 + (lane >> 3) + (lane >> 2 & 1) * 4;
      CCNET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Segment s = load_shared<Segment>(b.segment(k + (lane & 3) + 4 * half, segment));
        CCNET_UNROLL
        for (int i = 0; i < 4; ++i) v[i][half] = s.word[i];
      }
    }
  }

  // Runs body(m, i) for the products of 16 rows and eight columns, those of one result far from one another.
  template <typename Body>
  static CCNET_DEVICE void for_products(const Body& body) {
    CCNET_UNROLL
    for (int i = 0; i < 4; ++i) {
      CCNET_UNROLL
      for (int m = 0; m < Rows / 16; ++m) body(m, i);
    }
  }
};

}  // namespace cuda
}  // namespace ccnet
