// Products of panels as both kernels for compute capability 9.0 form them, and which of their elements a lane holds.
#pragma once

#include "hopper_lines.h"

namespace ccnet {
namespace cuda {

// Rows of a tile that short lines may leave unused: the products then take fewer.
constexpr int kFewerRows = 104;

// A product that does not add still counts as reading its sums. Set before a loop, they occupy no registers outside it.
template <int Count>
CCNET_DEVICE void clear(float (&d)[Count]) {
  CCNET_UNROLL
  for (int i = 0; i < Count; ++i) d[i] = 0.f;
}

// Distances between operands in a descriptor, which counts 16 bytes.
constexpr int kDepthAdvance = 16 * 2 / kSegmentBytes;           // 16 deep in an operand stored kDepth
constexpr int kOuterAdvance = 16 * kRowBytes / kSegmentBytes;   // 16 deep in an operand stored kOuter
constexpr int kHalfAdvance = 64 * kRowBytes / kSegmentBytes;    // from a tile's rows 0-63 to its rows 64-127
constexpr int kPanelAdvance = kTileRows * kRowBytes / kSegmentBytes;  // to the next panel

// In 32 bits: the upper half of a descriptor says how the panel is laid out.
CCNET_DEVICE uint64_t advance(uint64_t descriptor, int distance) {
  const uint32_t lower = static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(distance);
  return (descriptor & 0xffffffff00000000u) | lower;
}

// d (+)= 64 rows of one panel times the first rows of another, transposed: both [row][64 channels].
template <typename T, int Rows>
CCNET_DEVICE void multiply_rows(float (&d)[Rows / 2], uint64_t a, uint64_t b, bool add_to) {
  CCNET_UNROLL
  for (int k = 0; k < kPanelWidth<T> / 16; ++k) {
    WarpgroupProduct<T, Rows>::template multiply<Major::kDepth, Major::kDepth>(
        d, advance(a, k * kDepthAdvance), advance(b, k * kDepthAdvance), add_to || k > 0);
  }
}

// A warp's 16 rows of a panel pass between registers and shared memory 16 columns at a time, a fragment, by
// load_matrices() and store_matrices(). Which element of a product's sums, 64 columns wide, is the first of word w of
// fragment i:
constexpr CCNET_HD int fragment_element(int i, int w) { return 8 * i + w / 2 * 4 + w % 2 * 2; }
// Where fragment i of a thread's warp is, as far as its lane has to tell: a segment of the lane's row of the panel.
CCNET_DEVICE char* fragment_row(char* panel, int thread) {
  return panel + (thread / kWarp * 16 + thread % 16) * kRowBytes;
}
CCNET_DEVICE int fragment_segment(int thread) { return (thread % kWarp / 16 ^ thread % 8) * kSegmentBytes; }
CCNET_DEVICE char* fragment_place(char* row, int segment, int i) { return row + (segment ^ i * 2 * kSegmentBytes); }

// The columns of a tile that a lane holds, 8 j + lane_column and the next, as bits 2 j and 2 j + 1: those that a row of
// its pairs with.
CCNET_DEVICE uint32_t lane_columns(const Partners& p, int lane_column) {
  const auto below = [&](int column) {
    const int rest = column % 8 - lane_column;
    const int count = column / 8 * 2 + (rest < 0 ? 0 : min_of(rest, 2));
    return static_cast<uint32_t>((uint64_t{1} << count) - 1);
  };
  uint32_t columns = below(p.begin + p.count) & ~below(p.begin);
  const bool holds_self = static_cast<unsigned>(p.self) < kTileRows && (p.self & 6) == lane_column;
  if (holds_self) columns &= ~(1u << (p.self / 8 * 2 + p.self % 2));
  return columns;
}

}  // namespace cuda
}  // namespace ccnet
