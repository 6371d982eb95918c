// Tiles of lines for the kernels of compute capability 9.0: a tile is the 128 rows that one TMA box brings, either 128
// positions of one line, or as many whole short lines as fit.
#pragma once

#include "hopper_device.h"
#include "interface.h"
#include "lines_io.h"

namespace ccnet {
namespace cuda {

constexpr int kTileRows = 128;

// Division of numbers below 2^31 by one that is known before the launch: a product and a shift.
struct Divisor {
  uint32_t divisor, factor;
  int shift;

  CCNET_HD uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * factor >> shift);
  }
};
inline Divisor divisor_of(int64_t d) {
  int bits = 0;
  while (int64_t{1} << bits < d) ++bits;
  return {static_cast<uint32_t>(d), static_cast<uint32_t>(((int64_t{1} << (31 + bits)) + d - 1) / d), 31 + bits};
}

// How the lines of an axis are cut into tiles. Lines are counted in 32 bits: the plan sees to that.
struct Tiling {
  int length;         // L, positions of a line
  int span;           // positions of a line in a tile: 128, or L where several lines share a tile
  int group;          // lines in a tile: neighbours along the last other axis
  int line_tiles;     // tiles along a line: ceil(L / span)
  int neighbours;     // lines along the last other axis
  Divisor spans;      // of span
  Divisor groups;     // of the groups along the last other axis
  Divisor others;     // of the size of the other axis
};

CCNET_HD int tile_rows(const Tiling& t) { return t.group > 1 ? t.group * t.span : kTileRows; }

inline Tiling tiling_along(const Grid& g, int axis) {
  const LineGrid lines = lines_along(g, axis);
  Tiling t{};
  t.length = static_cast<int>(g.size[axis]);
  t.neighbours = static_cast<int>(lines.other[kMaxAxes - 2]);
  const int fitting = t.length <= kTileRows / 2 && t.neighbours > 1 ? kTileRows / t.length : 1;
  t.group = min_of(fitting, t.neighbours);
  t.span = t.group > 1 ? t.length : kTileRows;
  t.line_tiles = t.group > 1 ? 1 : static_cast<int>(ceil_div(t.length, kTileRows));
  t.spans = divisor_of(t.span);
  t.groups = divisor_of(ceil_div(t.neighbours, t.group));
  t.others = divisor_of(lines.other[0]);
  return t;
}
// Groups of lines over the whole batch.
inline int64_t line_groups(const Tiling& t, int64_t batch) {
  return batch * t.others.divisor * int64_t{t.groups.divisor};
}

// Where the rows of a group of lines lie; `line` is the first of them.
CCNET_HD Line find_group(const Tiling& t, int number) {
  const uint32_t n = static_cast<uint32_t>(number);
  const uint32_t beyond = t.groups.quotient(n);
  const uint32_t batch = t.others.quotient(beyond);
  return {batch, {beyond - batch * t.others.divisor, (n - beyond * t.groups.divisor) * t.group}};
}

// A row of a tile: which line of the group (where that has one only, 0) and which position of it.
struct TileRow {
  int line;
  int position;  // on the line, counted from the tile's first
};
CCNET_HD TileRow tile_row(const Tiling& t, int row) {
  const int line = static_cast<int>(t.spans.quotient(static_cast<uint32_t>(row)));
  return {line, row - line * t.span};
}
// Whether a row is a position of the tensor, for a tile whose rows begin at `first` of its lines.
CCNET_HD bool row_exists(const Tiling& t, const Line& group, int first, const TileRow& row) {
  return row.line < min_of(t.group, t.neighbours - static_cast<int>(group.at[kMaxAxes - 2])) &&
         first + row.position < t.length;
}
// Element offset of that position, channel 0.
CCNET_HD int64_t row_offset(const LineStrides& s, const Line& group, int first, const TileRow& row) {
  return offset_of(group, s) + row.line * s.other[kMaxAxes - 2] + (first + row.position) * s.step;
}

// The same in 32 bits: strides of a tensor whose places are counted in units of so many elements. The plan sees to it that
// the last place fits; that a product of a size-1 axis' stride wraps does not matter.
struct RowStrides {
  uint32_t batch, other[kMaxAxes - 1], step;
};
inline RowStrides row_strides(const LineStrides& s, int unit) {
  const auto places = [&](int64_t elements) { return static_cast<uint32_t>(elements / unit); };
  return {places(s.batch), {places(s.other[0]), places(s.other[1])}, places(s.step)};
}
constexpr uint32_t kNoRow = 0xffffffffu;
// Where the row is, or kNoRow if it is no position of the tensor.
CCNET_HD uint32_t row_place(const RowStrides& s, const Tiling& t, const Line& group, int first, const TileRow& row) {
  if (!row_exists(t, group, first, row)) return kNoRow;
  return static_cast<uint32_t>(group.batch) * s.batch + static_cast<uint32_t>(group.at[0]) * s.other[0] +
         (static_cast<uint32_t>(group.at[1]) + static_cast<uint32_t>(row.line)) * s.other[1] +
         static_cast<uint32_t>(first + row.position) * s.step;
}

// The rows of another tile of the same group that a row attends to (and, the relation being symmetric, that attend to
// it): those from `begin` on, `count` of them, without `self`.
struct Partners {
  int begin, count;
  int self;  // -1: none is left out
  CCNET_HD bool has(int row) const {
    return static_cast<unsigned>(row - begin) < static_cast<unsigned>(count) && row != self;
  }
};
// `first` and `other_first`: the positions at which the row's tile and the other tile begin.
CCNET_HD Partners partners_of(const Tiling& t, const TileRow& row, int first, int other_first, bool drop_self) {
  Partners p;
  p.begin = t.group == 1 ? 0 : row.line * t.span;
  p.count = row.line < t.group ? min_of(t.span, t.length - other_first) : 0;
  p.self = drop_self ? p.begin + first + row.position - other_first : -1;
  return p;
}

// The box of a group of lines that begins at a channel and at a position of them.
CCNET_DEVICE void load_lines(char* panel, const TensorMap* map, int channel, int position, const Line& group,
                             SharedBarrier* b, CachePolicy policy) {
  load_box(panel, map, channel, position, static_cast<int>(group.at[1]), static_cast<int>(group.at[0]),
           static_cast<int>(group.batch), b, policy);
}
CCNET_DEVICE void store_lines(const TensorMap* map, const char* panel, int channel, int position, const Line& group,
                              CachePolicy policy) {
  store_box(map, panel, channel, position, static_cast<int>(group.at[1]), static_cast<int>(group.at[0]),
            static_cast<int>(group.batch), policy);
}

// What a TMA box is cut from: dimensions from the fastest on: channels, positions of the line, the axis along which
// lines are grouped, the other one, batch. Strides in elements.
struct BoxSource {
  const void* data;
  int element_bytes;
  int64_t size[5];
  int64_t stride[5];  // the first is 1
  int box[5];
};
template <typename T>
BoxSource box_source(const TensorRef& t, const Grid& g, int axis, int channels, const Tiling& tiling) {
  const LineStrides s = strides_along(g, t.strides, axis);
  BoxSource b{};
  b.data = t.data;
  b.element_bytes = static_cast<int>(sizeof(T));
  const LineGrid lines = lines_along(g, axis);
  const int64_t size[5] = {channels, tiling.length, lines.other[1], lines.other[0], g.batch};
  const int64_t stride[5] = {1, s.step, s.other[1], s.other[0], s.batch};
  const int box[5] = {kPanelWidth<T>, tiling.span, tiling.group, 1, 1};
  int64_t dense = round_up(channels, kSegmentLength<T>);  // for dimensions of size 1, whose stride is never used
  for (int d = 0; d < 5; ++d) {
    b.size[d] = size[d];
    b.box[d] = box[d];
    b.stride[d] = d > 0 && size[d] == 1 ? dense : stride[d];
    if (d > 0 && size[d] > 1) dense = stride[d] * size[d] > dense ? stride[d] * size[d] : dense;
  }
  return b;
}
// The TMA's conditions: a 16-byte grid, positive strides below 2^40 bytes, and sizes within 32 bits.
template <typename T>
bool boxes_fit(const TensorRef& t, const Grid& g, int channels) {
  bool fit = (t.strides.channel == 1 || channels == 1) && reinterpret_cast<uintptr_t>(t.data) % kSegmentBytes == 0;
  const auto stride_fits = [](int64_t elements) {
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
    return bytes > 0 && bytes % kSegmentBytes == 0 && bytes < int64_t{1} << 40;
  };
  constexpr int64_t kMostPositions = int64_t{1} << 31;
  fit = fit && g.batch * g.positions() < kMostPositions && (g.batch == 1 || stride_fits(t.strides.batch));
  for (int a = 0; a < g.axes; ++a) fit = fit && (g.size[a] == 1 || stride_fits(t.strides.axis[a]));
  return fit;
}

}  // namespace cuda
}  // namespace ccnet
