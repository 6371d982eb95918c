// Boxes of a tensor as the tensor memory accelerator (TMA) copies them to shared memory: five dimensions, elements in
// order (the first dimension fastest) and without gaps, each row of 128 bytes, zeros where the box leaves the tensor.
// The 128-byte swizzle permutes the 16-byte segments by address: bits 4 to 6 are exclusive-ored with bits 7 to 9.
#pragma once

#include <stdint.h>
#include <string.h>

#include <string>

#include "error.h"

namespace ccnet {
namespace emulation {

constexpr int kBoxRowBytes = 128;
constexpr int kSwizzlePeriod = 1024;

inline int64_t swizzle_128(int64_t address) { return address ^ (address >> 7 & 7) << 4; }

struct BoxMap {
  const char* data;
  int element_bytes;
  int64_t size[5];
  int64_t stride[5];  // bytes
  int box[5];
  uint32_t made;  // kMade

  static constexpr uint32_t kMade = 0x544d4150;

  int rows() const { return box[1] * box[2] * box[3] * box[4]; }
  int bytes() const { return rows() * kBoxRowBytes; }

  // What the driver requires of a map of this kind.
  void check() const {
    const auto require = [](bool condition, const char* what) {
      if (!condition) throw Error(std::string("tensor map: ") + what);
    };
    require(data != nullptr && reinterpret_cast<uintptr_t>(data) % 16 == 0, "the address is no multiple of 16");
    require(stride[0] == element_bytes, "the first stride is not 1");
    require(box[0] * element_bytes == kBoxRowBytes, "the box's rows are not of 128 bytes");
    for (int d = 0; d < 5; ++d) {
      require(size[d] >= 1 && size[d] <= int64_t{1} << 32, "a size is not within 1 and 2^32");
      require(box[d] >= 1 && box[d] <= 256, "a box's size is not within 1 and 256");
      if (d == 0) continue;
      require(stride[d] > 0 && stride[d] < int64_t{1} << 40, "a stride is not positive or not below 2^40 bytes");
      require(stride[d] % 16 == 0, "a stride is no multiple of 16 bytes");
    }
  }
};

// A box on its way.
struct Box {
  BoxMap map;
  int64_t from[5];
  int64_t to;   // offset in shared memory
  int barrier;

  // Calls f(offset of the row in shared memory if it were not swizzled, first byte in global memory or null, bytes before
  // the first element that exists, bytes that exist) for each row.
  template <typename F>
  void for_each_row(const F& f) const {
    const int elements = map.box[0];
    const int64_t first = from[0] < 0 ? -from[0] : 0;
    int64_t end = map.size[0] - from[0];
    if (end > elements) end = elements;
    int row = 0;
    int64_t at[5];
    for (int i4 = 0; i4 < map.box[4]; ++i4) {
      for (int i3 = 0; i3 < map.box[3]; ++i3) {
        for (int i2 = 0; i2 < map.box[2]; ++i2) {
          for (int i1 = 0; i1 < map.box[1]; ++i1, ++row) {
            at[1] = from[1] + i1;
            at[2] = from[2] + i2;
            at[3] = from[3] + i3;
            at[4] = from[4] + i4;
            bool inside = first < end;
            const char* source = map.data + (from[0] + first) * map.element_bytes;
            for (int d = 1; d < 5; ++d) {
              inside = inside && at[d] >= 0 && at[d] < map.size[d];
              source += at[d] * map.stride[d];
            }
            f(to + row * kBoxRowBytes, inside ? source : nullptr, static_cast<int>(first) * map.element_bytes,
              inside ? static_cast<int>(end - first) * map.element_bytes : 0);
          }
        }
      }
    }
  }
};

}  // namespace emulation
}  // namespace ccnet
