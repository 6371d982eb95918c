// Forward and backward of criss-cross attention in fp32 on matrix units that multiply bf16 (tiles.h), line by line.
//
// Included in kernel_amx_split.cpp, inside its anonymous namespace, after storage.h, vector_avx512.h, work.h and
// line_kernels.h.
//
// An fp32 number has 24 significant bits, a bf16 number 8: the upper halves of x, of what remains of x and of what then
// remains are three bf16 numbers that add up to x exactly. Of the nine products of two such sums the six largest are
// computed, in fp32 sums; the others are below 2^-21 of the product, and 2^-24 of it on average, like the rounding of a
// single fp32 multiplication. Six products of the matrix units take less than half as long as one of the vector units.
// What remains of Inf is NaN: a result that would be Inf is Inf or NaN.
//
// The same walk over lines as line_kernels.h, whose forward_axis and backward_axis do what does not pay here. Energies
// are [i, j] in the forward pass, whose softmax runs along rows, and [j, i] in the backward pass: so the weights are
// left operands as they come. Lines of 16 n + 1 positions are the rule in segmentation (97 = 6 * 16 + 1): their last
// position, an edge of which a tile would be mostly padding, is left to the vector units, which read the rows anyway.

#include "tiles.h"
#include "split_operands.h"
#include "background.h"
#include "split_products.h"

// The last position of a line, where it is one more than whole tiles.
inline int64_t edge_of(int64_t n) { return n > kTile && n % kTile == 1 ? 1 : 0; }

#include "split_forward.h"
#include "split_backward.h"

// Whether the matrix units are worth the splitting. For smaller maps the vector units are as fast or faster, and for
// longer lines, of which few queries at a time are handled and the values split again for each few.
inline bool pays(const AttentionArgs& args, int axis) {
  const int64_t length = args.grid.size[axis];
  return length >= 64 && length <= 1024 && args.channels >= 192;
}

template <class S>
void split_forward_typed(const ForwardArgs& args) {
  for_axes(args.grid, [&](int axis, bool first, bool last) {
    (pays(args, axis) ? split_forward_axis<S> : forward_axis<V, S>)(args, axis, first, last);
  });
}

template <class S>
void split_backward_typed(const BackwardArgs& args) {
  if (args.delta_first) sum_delta<V, S>(args);
  for_axes(args.grid, [&](int axis, bool first, bool) {
    (pays(args, axis) ? split_backward_axis<S> : backward_axis<V, S>)(args, axis, first);
  });
}
