// Forward and backward of criss-cross attention in bf16, line by line, for processors that multiply pairs of bf16
// numbers into fp32 sums: matrix units (kernel_amx.cpp) or vectors (kernel_avx512bf16.cpp).
//
// Included once per instruction set, inside that translation unit's anonymous namespace, after storage.h,
// vector_avx512.h and work.h.
//
// The same walk over lines as line_kernels.h. The left operand of a product is row-major; the right one has pairs of
// rows interleaved, so that a 32-bit unit holds two successive k of one column. Two packings produce it:
//   pack_pairs        B[k, n] = src[k, n]   rows 2k and 2k+1 interleaved. The unpack instructions work within 128-bit
//                                           lanes, which permutes the columns in each 32; store_words undoes it.
//   pack_transposed   B[k, n] = src[n, k]   a transpose of 32-bit units, columns in order.
// Everything is padded with zeros to what the products take. Weights and their gradients are rounded to bf16 between
// products, as in plain PyTorch; energies, softmax, sums and accumulators are fp32.
//
// An Engine multiplies:
//   kRows, kDepth     products take rows of A in multiples of kRows and successive k in multiples of kDepth
//   kColumns          queries whose energies are computed at once, a multiple of 32: so few that they stay in the
//                     first-level cache until softmax, or its backward, is done with them
//   kEdgeColumns      up to so many queries beyond the last 16 are better served by dot products than by a vector of
//                     which most is padding; images of 8n + 1 pixels are the rule in segmentation (97 = 6 * 16 + 1)
//   kEdgeDepth        up to so many k beyond whole kDepth are left to product_to's vectors, for the same reason
//   Session           lives as long as the thread multiplies
//   product           C[M, N] = A B, N a multiple of 16
//   product_to        the same, N a multiple of 32, each result handed to finish(row, column, lo, hi): the numbers of
//                     32 columns as pack_pairs ordered them; only rows below `rows` are handed out
//   steps(M, N, k)    how often such a product asks for memory ahead

using V = Avx512;
using reg = __m512;

constexpr int64_t kPanel = 64;  // output columns per pass

#include "ahead.h"
#include "merge_rows.h"

// Row strides of an odd number of cache lines (see `leading`): of bf16 rows, in numbers.
int64_t words_leading(int64_t n) { return 2 * leading<V>(n / 2); }

#include "bf16_packing.h"
#include "bf16_storing.h"
#include "delta.h"
#include "bf16_forward.h"
#include "bf16_backward.h"
