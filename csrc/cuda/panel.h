// Shared-memory tiles. A panel is a matrix of `rows` rows of 128 bytes (64 half or 32 float elements); a wider matrix
// is several panels, one after the other. The eight 16-byte segments of a row are permuted by exclusive-or with the
// row's number, so that the same segment of eight consecutive rows lies in eight different groups of banks: ldmatrix
// and 16-byte accesses down a column are free of bank conflicts.
#pragma once

#include "device.h"

namespace ccnet {
namespace cuda {

constexpr int kRowBytes = 128;
constexpr int kSegmentBytes = 16;
constexpr int kRowSegments = kRowBytes / kSegmentBytes;

template <typename T>
constexpr int kSegmentLength = kSegmentBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kPanelWidth = kRowBytes / static_cast<int>(sizeof(T));

CCNET_HD constexpr int panel_bytes(int rows) { return rows * kRowBytes; }

// Byte offset of a segment in a sequence of panels of `rows` rows; segments are numbered across panels.
CCNET_HD int segment_offset(int row, int segment, int rows) {
  const int panel = segment / kRowSegments;
  return (panel * rows + row) * kRowBytes + ((segment ^ row) % kRowSegments) * kSegmentBytes;
}

// Byte offset of an element.
template <typename T>
CCNET_HD int element_offset(int row, int column, int rows) {
  return segment_offset(row, column / kSegmentLength<T>, rows) +
         (column % kSegmentLength<T>)*static_cast<int>(sizeof(T));
}

// A matrix in shared memory.
struct Panels {
  char* base;
  int rows;

  CCNET_HD char* segment(int row, int number) const { return base + segment_offset(row, number, rows); }
  template <typename T>
  CCNET_HD char* element(int row, int column) const {
    return base + element_offset<T>(row, column, rows);
  }
};

CCNET_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CCNET_HD constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }
// Both of one type: the positions of a map, made an int, may come out negative.
template <typename V>
CCNET_HD constexpr V min_of(V a, V b) {
  return a < b ? a : b;
}

}  // namespace cuda
}  // namespace ccnet
