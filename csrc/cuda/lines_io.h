// Lines of tensors: where they lie, and how they are brought into shared memory and written back.
#pragma once

#include "panel.h"

namespace ccnet {
namespace cuda {

// The lines of one axis and the strides along and across them: what lines.h says of a grid, seen from one axis. The
// other axes keep their order and stand last in `other`, with sizes of 1 and strides of 0 before them where there are
// fewer than two: no array is ever indexed by a run-time axis, which on a GPU would put it into local memory.
struct LineGrid {
  int64_t other[kMaxAxes - 1];
};
struct LineStrides {
  int64_t batch;
  int64_t other[kMaxAxes - 1];
  int64_t step;  // from a position of the line to the next
  int64_t channel;
};

CCNET_HD LineGrid lines_along(const Grid& g, int axis) {
  LineGrid lines{{1, 1}};
  for (int a = g.axes - 1, slot = kMaxAxes - 2; a >= 0; --a) {
    if (a != axis) lines.other[slot--] = g.size[a];
  }
  return lines;
}
CCNET_HD LineStrides strides_along(const Grid& g, const Strides& s, int axis) {
  LineStrides strides{s.batch, {0, 0}, s.axis[axis], s.channel};
  for (int a = g.axes - 1, slot = kMaxAxes - 2; a >= 0; --a) {
    if (a != axis) strides.other[slot--] = s.axis[a];
  }
  return strides;
}

// A line's place: its image and its coordinates on the other axes.
struct Line {
  int64_t batch;
  int64_t at[kMaxAxes - 1];
};

// Lines are numbered as in lines.h.
CCNET_HD Line find_line(const LineGrid& lines, int64_t number) {
  Line line;
  CCNET_UNROLL
  for (int slot = kMaxAxes - 2; slot >= 0; --slot) {
    const int64_t size = lines.other[slot];
    if ((number | size) >> 32 == 0) {  // a 32-bit division is several times faster
      const uint32_t n = static_cast<uint32_t>(number), d = static_cast<uint32_t>(size);
      line.at[slot] = n % d;
      number = n / d;
    } else {
      line.at[slot] = number % size;
      number /= size;
    }
  }
  line.batch = number;
  return line;
}

// Element offset of the line's first position, channel 0.
CCNET_HD int64_t offset_of(const Line& line, const LineStrides& s) {
  return line.batch * s.batch + line.at[0] * s.other[0] + line.at[1] * s.other[1];
}

// An input (B, C, *S), seen along one axis. `vectors`: the channel stride is 1, and the address and every other stride
// are multiples of 16 bytes, so that segments can be copied whole.
template <typename T>
struct Input {
  const T* data;
  LineStrides strides;
  bool vectors;
};

// An output (B, C, *S), channel stride 1. `vectors` as for an input, and the channels are whole segments.
template <typename T>
struct Output {
  T* data;
  LineStrides strides;
  bool vectors;
};

// The rows of one line: row i begins at data + i * stride.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t channel_stride;
  bool vectors;
};

template <typename T>
CCNET_DEVICE Rows<T> rows_of(const Input<T>& input, const Line& line) {
  return {input.data + offset_of(line, input.strides), input.strides.step, input.strides.channel, input.vectors};
}

// Field by field: a choice between whole structures would put them into local memory.
template <typename T>
CCNET_DEVICE Rows<T> choose(bool first, const Rows<T>& a, const Rows<T>& b) {
  return {first ? a.data : b.data, first ? a.stride : b.stride, first ? a.channel_stride : b.channel_stride,
          first ? a.vectors : b.vectors};
}

CCNET_DEVICE uint32_t element_bits(float v) { return float_to_bits(v); }
CCNET_DEVICE uint32_t element_bits(Half v) { return v.bits; }
CCNET_DEVICE uint32_t element_bits(BFloat16 v) { return v.bits; }

// Brings rows [row0, row0 + PanelRows) x channels [channel0, channel0 + kPanelWidth) into a panel. What lies outside
// `rows` rows or `channels` channels becomes zero. Wait for copies and for the other threads before reading it.
template <typename T, int PanelRows, int Threads>
CCNET_DEVICE void load_panel(char* panel, const Rows<T>& from, int row0, int rows, int channel0, int channels) {
  constexpr int kLength = kSegmentLength<T>;
  static_assert(PanelRows * kRowSegments % Threads == 0 && Threads % kPanelWidth<T> == 0, "every thread copies alike");
  constexpr int kRowStep = Threads / kRowSegments;
  const int thread = recompute(thread_index());
  const int segment = thread % kRowSegments;
  const int channel = channel0 + segment * kLength;
  const int width = channels - channel < 0 ? 0 : min_of(channels - channel, kLength);
  if (from.vectors) {
    const T* source = from.data + (row0 + thread / kRowSegments) * from.stride + channel;
    CCNET_UNROLL
    for (int i = 0; i < PanelRows / kRowStep; ++i, source += kRowStep * from.stride) {
      const int row = thread / kRowSegments + i * kRowStep;
      const bool inside = row0 + row < rows && width > 0;
      copy_async(panel + segment_offset(row, segment, PanelRows), inside ? source : from.data,
                 inside ? width * static_cast<int>(sizeof(T)) : 0);
    }
  } else {
    // Element by element, so that any stride and any number of channels will do.
    constexpr int kWidth = kPanelWidth<T>;
    const int column = thread % kWidth;
    const bool inside = channel0 + column < channels;
    CCNET_UNROLL_BY(2)
    for (int row = thread / kWidth; row < PanelRows; row += Threads / kWidth) {
      T v{};
      if (inside && row0 + row < rows) {
        v = load_global(from.data + (row0 + row) * from.stride + (channel0 + column) * from.channel_stride);
      }
      store_shared(panel + element_offset<T>(row, column, PanelRows), v);
    }
  }
}

// The two elements of a word, the inverse of pack().
template <typename T>
CCNET_DEVICE void unpack_pair(uint32_t word, float& a, float& b) {
  a = to_float<T>(T{static_cast<uint16_t>(word)});
  b = to_float<T>(T{static_cast<uint16_t>(word >> 16)});
}
// The same, but the compiler would shift the upper half down and up again.
template <>
CCNET_DEVICE void unpack_pair<BFloat16>(uint32_t word, float& a, float& b) {
  a = bits_to_float(word << 16);
  b = bits_to_float(word & 0xffff0000u);
}

template <typename T>
CCNET_DEVICE void unpack(const Segment& s, float (&v)[kSegmentLength<T>]) {
  CCNET_UNROLL
  for (int w = 0; w < 4; ++w) unpack_pair<T>(s.word[w], v[2 * w], v[2 * w + 1]);
}
template <>
CCNET_DEVICE void unpack<float>(const Segment& s, float (&v)[4]) {
  CCNET_UNROLL
  for (int e = 0; e < 4; ++e) v[e] = bits_to_float(s.word[e]);
}

template <typename T>
CCNET_DEVICE Segment pack_segment(const float (&v)[kSegmentLength<T>]) {
  Segment s;
  CCNET_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      s.word[w] = float_to_bits(v[w]);
    } else {
      s.word[w] = pack<T>(v[2 * w], v[2 * w + 1]);
    }
  }
  return s;
}

// A lane's share of an output tile, written: out = tile * tile_scale + out * old_scale, or without the second term, and
// then without reading the output, where `kept` is false. Rows and channels outside the line or the tensor are left
// alone. Outputs with vectors are read and written as 16-byte segments, others element by element.
template <typename T, typename Tile>
struct TileWriter {
  static constexpr int kLength = kSegmentLength<T>;

  T* corner;  // of the tile
  int64_t stride;
  int rows, channels;  // that exist, counted from the corner
  bool vectors;
  Segment old[Tile::kLaneRows][Tile::kSegments];

  // `line` is the line's first position in memory.
  CCNET_DEVICE TileWriter(T* line, const Output<T>& out, int row0, int row_count, int channel0, int channel_count)
      : corner(line + row0 * out.strides.step + channel0),
        stride(out.strides.step),
        rows(row_count - row0),
        channels(channel_count - channel0),
        vectors(out.vectors) {}

  // What lane rows First .. First + Count - 1 of an output with vectors hold, all loads in flight together.
  template <int First = 0, int Count = Tile::kLaneRows>
  CCNET_DEVICE void read() {
    if (!vectors) return;
    const int thread = recompute(thread_index());
    const T* const lane = corner + Tile::row(thread, 0) * stride + Tile::segment_column(thread, 0);
    CCNET_UNROLL
    for (int r = First; r < First + Count; ++r) {
      CCNET_UNROLL
      for (int s = 0; s < Tile::kSegments; ++s) {
        old[r][s] = {{0, 0, 0, 0}};
        if (Tile::row(thread, r) < rows && Tile::segment_column(thread, s) < channels) {
          old[r][s] = load_global(reinterpret_cast<const Segment*>(lane + Tile::row_offset(r) * stride + Tile::kSegmentStep * s));
        }
      }
    }
  }

  // read() and write() of one lane row after the other, for kernels that have no registers for all at once.
  template <int First = 0, typename Scales>
  CCNET_DEVICE void add(Tile& tile, Scales scales) {
    read<First, 1>();
    write<First, 1>(tile, true, scales);
    if constexpr (First + 1 < Tile::kLaneRows) add<First + 1>(tile, scales);
  }

  // scales(row, tile_scale, old_scale) gives the factors of a row of the tile. A collective of the warp.
  template <int First = 0, int Count = Tile::kLaneRows, typename Scales>
  CCNET_DEVICE void write(Tile& tile, bool kept, Scales scales) {
    const int thread = recompute(thread_index());
    if (vectors) {
      T* const lane = corner + Tile::row(thread, 0) * stride + Tile::segment_column(thread, 0);
      CCNET_UNROLL
      for (int r = First; r < First + Count; ++r) {
        float tile_scale, old_scale;
        scales(Tile::row(thread, r), tile_scale, old_scale);
        CCNET_UNROLL
        for (int s = 0; s < Tile::kSegments; ++s) {
          float v[kLength];
          tile.segment(r, s, v);
          CCNET_UNROLL
          for (int e = 0; e < kLength; ++e) v[e] *= tile_scale;
          if (kept) {
            float before[kLength];
            unpack<T>(old[r][s], before);
            CCNET_UNROLL
            for (int e = 0; e < kLength; ++e) v[e] = fmaf(before[e], old_scale, v[e]);
          }
          if (Tile::row(thread, r) < rows && Tile::segment_column(thread, s) < channels) {
            store_global(reinterpret_cast<Segment*>(lane + Tile::row_offset(r) * stride + Tile::kSegmentStep * s),
                         pack_segment<T>(v));
          }
        }
      }
    } else {
      T* const lane = corner + Tile::row(thread, 0) * stride + Tile::column(thread, 0);
      CCNET_UNROLL
      for (int r = First; r < First + Count; ++r) {
        float tile_scale, old_scale;
        scales(Tile::row(thread, r), tile_scale, old_scale);
        CCNET_UNROLL
        for (int c = 0; c < Tile::kLaneColumns; ++c) {
          if (Tile::row(thread, r) >= rows || Tile::column(thread, c) >= channels) continue;
          T* const p = lane + Tile::row_offset(r) * stride + Tile::column_offset(c);
          float v = tile.at(r, c) * tile_scale;
          if (kept) v = fmaf(to_float<T>(load_global(p)), old_scale, v);
          store_global(p, from_float<T>(v));
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace ccnet
