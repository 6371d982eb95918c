// The asynchronous products of a warpgroup (wgmma.m64nNk16, 16-bit operands, 128-byte swizzle) as the PTX manual lays
// them out: descriptors of matrices in shared memory, fragments in registers, groups that are committed and waited for.
#pragma once

#include <stdint.h>
#include <string.h>

#include <list>
#include <string>
#include <vector>

#include "boxes.h"
#include "error.h"

namespace ccnet {
namespace emulation {

constexpr int kProductThreads = 128;
constexpr int kProductRows = 64;
constexpr int kProductDepth = 16;

// A matrix descriptor's fields.
struct MatrixDescriptor {
  int64_t start, leading, stride;  // bytes

  explicit MatrixDescriptor(uint64_t bits) {
    start = static_cast<int64_t>(bits & 0x3fff) << 4;
    leading = static_cast<int64_t>(bits >> 16 & 0x3fff) << 4;
    stride = static_cast<int64_t>(bits >> 32 & 0x3fff) << 4;
    if (bits >> 62 != 1) throw Error("matrix descriptor: only the 128-byte swizzle is known here");
    if ((bits & 0x3ff1c000c000c000u) != 0) throw Error("matrix descriptor: bits without a meaning are set");
    if ((bits >> 49 & 7) != 0 || (start >> 7 & 7) != 0) {
      throw Error("matrix descriptor: does not start where the swizzle's pattern does (a base offset is not known here)");
    }
  }

  // Where element (outer: row of A or column of B; depth) lies. Swizzled layouts, elements of 2 bytes:
  //   depth contiguous: rows of 128 bytes, one for each outer; eight of them, and the next eight `stride` further;
  //   outer contiguous: rows of 128 bytes, one for each depth, of 64 outer elements; eight of them, and the next eight
  //   `stride` further; the next 64 outer elements `leading` further.
  int64_t address(bool outer_contiguous, int outer, int depth) const {
    if (outer_contiguous) {
      if ((start >> 4 & 7) != 0) throw Error("matrix descriptor: an outer-contiguous matrix starts within a row");
      return swizzle_128(start + outer / 64 * leading + depth / 8 * stride + depth % 8 * 128 + outer % 64 * 2);
    }
    return swizzle_128(start + outer / 8 * stride + outer % 8 * 128 + depth * 2);
  }
};

// Row and column of d[i] in the registers of a thread of the warpgroup: eight rows of four lanes to each warp's 16,
// pairs of neighbouring columns, then the row eight further, then the next eight columns.
inline int product_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i / 2 % 2) * 8; }
inline int product_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }
// Row and depth of element i, 0 to 7, of A in four registers of two: like d's of two times eight columns.
inline int operand_row(int thread, int i) { return product_row(thread, i); }
inline int operand_depth(int thread, int i) { return product_column(thread, i); }

// What a thread passes.
struct ProductCall {
  float* d;
  const uint32_t* a_registers;  // null: A is in shared memory
  uint64_t a, b;
  bool add;
};

// The registers d of a warpgroup while products under way use them.
struct Accumulator {
  float* d[kProductThreads];
  int columns;
  std::vector<float> value;  // 64 x columns
  uint32_t last_group = 0;   // of those that use it
  int returned = 0;
  bool returned_to[kProductThreads] = {};

  float& at(int thread, int i) {
    return value[static_cast<size_t>(product_row(thread, i) * columns + product_column(thread, i))];
  }
  // What a thread holds.
  std::vector<float> part(int thread) {
    std::vector<float> d(static_cast<size_t>(columns / 2));
    for (int i = 0; i < columns / 2; ++i) d[static_cast<size_t>(i)] = at(thread, i);
    return d;
  }
};

struct Product {
  ProductCall call[kProductThreads];
  uint32_t a_registers[kProductThreads][4];  // as they were at the call
  bool a_outer, b_outer;                     // contiguous
  int columns;
  float (*value_of)(uint16_t);  // of an element
  uint32_t group;
  Accumulator* d;
  bool done = false;
};

// The 16-byte segments of shared memory that a product reads.
template <typename F>
void for_each_segment(const Product& p, const F& f) {
  const auto operand = [&](uint64_t bits, bool outer_contiguous, int outers) {
    const MatrixDescriptor matrix(bits);
    const int outer_step = outer_contiguous ? 8 : 1, depth_step = outer_contiguous ? 1 : 8;
    for (int o = 0; o < outers; o += outer_step) {
      for (int k = 0; k < kProductDepth; k += depth_step) {
        f(matrix.address(outer_contiguous, o, k) / 16 * 16);
      }
    }
  };
  if (p.call[0].a_registers == nullptr) operand(p.call[0].a, p.a_outer, kProductRows);
  operand(p.call[0].b, p.b_outer, p.columns);
}

// Computes the product. `swapped`: with words 1 and 2 of A in registers exchanged.
inline void compute_product(Product& p, const char* shared, bool swapped) {
  p.done = true;
  float a[kProductRows][kProductDepth];
  std::vector<float> b(static_cast<size_t>(kProductDepth * p.columns));
  const auto load = [&](const MatrixDescriptor& matrix, bool outer_contiguous, int outer, int depth) {
    uint16_t bits;
    memcpy(&bits, shared + matrix.address(outer_contiguous, outer, depth), 2);
    return p.value_of(bits);
  };
  if (p.call[0].a_registers == nullptr) {
    const MatrixDescriptor matrix(p.call[0].a);
    for (int row = 0; row < kProductRows; ++row) {
      for (int k = 0; k < kProductDepth; ++k) a[row][k] = load(matrix, p.a_outer, row, k);
    }
  } else {
    for (int t = 0; t < kProductThreads; ++t) {
      for (int i = 0; i < 8; ++i) {
        const int word = swapped && (i / 2 == 1 || i / 2 == 2) ? 3 - i / 2 : i / 2;
        const uint32_t pair = p.a_registers[t][word];
        a[operand_row(t, i)][operand_depth(t, i)] = p.value_of(static_cast<uint16_t>(i % 2 == 0 ? pair : pair >> 16));
      }
    }
  }
  const MatrixDescriptor matrix(p.call[0].b);
  for (int k = 0; k < kProductDepth; ++k) {
    for (int c = 0; c < p.columns; ++c) b[static_cast<size_t>(k * p.columns + c)] = load(matrix, p.b_outer, c, k);
  }
  // Products of two 16-bit numbers are exact in fp32.
  for (int row = 0; row < kProductRows; ++row) {
    float* const d = p.d->value.data() + row * p.columns;
    if (!p.call[0].add) std::fill(d, d + p.columns, 0.f);
    for (int k = 0; k < kProductDepth; ++k) {
      const float factor = a[row][k];
      const float* const other = b.data() + k * p.columns;
      for (int c = 0; c < p.columns; ++c) d[c] += factor * other[c];
    }
  }
}

struct Warpgroup {
  std::list<Product> products;
  std::list<Accumulator> accumulators;
  uint32_t committed[kProductThreads] = {};  // groups, by thread
  bool begun[kProductThreads] = {};          // begin_products() since the last wait
};

}  // namespace emulation
}  // namespace ccnet
