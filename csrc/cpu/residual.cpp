// The layer's last step, x + gamma * attended, and its backward, between memory layouts: the attention works on
// channels-last memory while most networks are NCHW. One pass instead of a transposing copy and two products.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ccnet {
namespace cpu {
namespace {

#include "storage.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline double to_float(double x) { return x; }
inline void from_float(double f, double* out) { *out = f; }

// A (B, C, N) view, N the positions: either channels or positions lie side by side.
struct Layout {
  int64_t batch, channel, position;
};

// Tiles of `rows` channels and `cols` positions.
template <int64_t rows, int64_t cols>
struct TileShape {
  static constexpr int64_t kChannels = rows, kPositions = cols;
};
using ForwardTile = TileShape<16, 256>;  // long rows where x mostly is NCHW, and the result
using BackwardTile = TileShape<64, 64>;

// The extent of a (B, C, N) view.
struct Extent {
  int64_t batch, channels, positions;
};

Extent extent(const Tensor& x) {
  const int64_t channels = x.size(1);
  return {x.size(0), channels, channels ? x.numel() / x.size(0) / channels : 0};
}

// Where all operands are channels-last, channels and positions change places: they are then read and written in long
// rows too.
void along_memory(Layout (&l)[3], Extent* all) {
  for (const Layout& layout : l) {
    if (layout.channel != 1) return;
  }
  for (Layout& layout : l) std::swap(layout.channel, layout.position);
  std::swap(all->channels, all->positions);
}

// Strides of t as (B, C, N); false where its positions are not evenly spaced or neither axis is dense.
bool flat_layout(const Tensor& t, Layout* layout) {
  const int64_t dims = t.dim();
  int64_t step = 0, count = 1;
  for (int64_t d = dims - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (count == 1) step = t.stride(d);
    else if (t.stride(d) != step * count) return false;
    count *= t.size(d);
  }
  *layout = {t.stride(0), t.stride(1), count == 1 ? 1 : step};
  return layout->channel == 1 || layout->position == 1;
}

// Squares of 4 x 4 numbers are transposed in registers where every processor of the build has them: one by one, the
// numbers would cost more than the memory they come from.
template <class S, class T>
constexpr bool kInSquares = false;

#if defined(__SSE2__)
template <>
constexpr bool kInSquares<float, float> = true;
template <>
constexpr bool kInSquares<BFloat16, float> = true;

inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
inline void store4(float* p, __m128 x) { _mm_storeu_ps(p, x); }

inline __m128 load4(const BFloat16* p) {
  const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), words));
}

// As from_float: to nearest, ties to even, NaN stays NaN.
inline void store4(BFloat16* p, __m128 x) {
  const __m128i bits = _mm_castps_si128(x), odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  __m128i high = _mm_srai_epi32(_mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff))), 16);
  const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(x, x));
  high = _mm_or_si128(_mm_andnot_si128(nan, high), _mm_and_si128(nan, _mm_set1_epi32(0x7fc0)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(high, high));
}

// to[j * to_row + i] = from[i * from_row + j] for i, j < 4
template <class From, class To>
inline void transpose_square(const From* from, int64_t from_row, To* to, int64_t to_row) {
  __m128 r0 = load4(from), r1 = load4(from + from_row), r2 = load4(from + 2 * from_row), r3 = load4(from + 3 * from_row);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  store4(to, r0);
  store4(to + to_row, r1);
  store4(to + 2 * to_row, r2);
  store4(to + 3 * to_row, r3);
}
#endif

// to[c * to_row + n] = from[n * from_row + c] for n < rows, c < cols
template <class From, class To>
void transpose(const From* from, int64_t from_row, int64_t rows, int64_t cols, To* to, int64_t to_row) {
  int64_t n = 0;
#if defined(__SSE2__)
  if constexpr (kInSquares<From, To> || kInSquares<To, From>) {
    for (; n + 4 <= rows; n += 4) {
      int64_t c = 0;
      for (; c + 4 <= cols; c += 4) transpose_square(from + n * from_row + c, from_row, to + c * to_row + n, to_row);
      for (; c < cols; ++c) {
        for (int64_t i = n; i < n + 4; ++i) from_float(to_float(from[i * from_row + c]), to + c * to_row + i);
      }
    }
  }
#endif
  for (; n < rows; ++n) {
    for (int64_t c = 0; c < cols; ++c) from_float(to_float(from[n * from_row + c]), to + c * to_row + n);
  }
}

// buffer[c][n] = src[c0 + c, n0 + n]
template <class S, class T, size_t P>
void read_tile(const S* src, const Layout& l, int64_t channels, int64_t positions, T (*buffer)[P]) {
  if (l.position == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      const S* p = src + c * l.channel;
      for (int64_t n = 0; n < positions; ++n) buffer[c][n] = to_float(p[n]);
    }
    return;
  }
  transpose(src, l.position, positions, channels, &buffer[0][0], P);
}

template <class S, class T, size_t P>
void write_tile(S* dst, const Layout& l, int64_t channels, int64_t positions, const T (*buffer)[P]) {
  if (l.position == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      S* p = dst + c * l.channel;
      for (int64_t n = 0; n < positions; ++n) from_float(buffer[c][n], p + n);
    }
    return;
  }
  transpose(&buffer[0][0], static_cast<int64_t>(P), channels, positions, dst, l.position);
}

// Runs body(tile, batch, first channel, channels, first position, positions) over all tiles.
template <class Shape, class F>
void for_tiles(const Extent& all, const F& body) {
  const int64_t batch = all.batch, channels = all.channels, positions = all.positions;
  constexpr int64_t kPositions = Shape::kPositions, kChannels = Shape::kChannels;
  const int64_t across = (channels + kChannels - 1) / kChannels, along = (positions + kPositions - 1) / kPositions;
  torch::stable::parallel_for(0, batch * across * along, 16, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      // Channels fastest: the channels-last side is read and written in whole rows.
      const int64_t c0 = tile % across * kChannels, n0 = tile / across % along * kPositions;
      body(tile, tile / across / along, c0, std::min(kChannels, channels - c0), n0,
           std::min(kPositions, positions - n0));
    }
  });
}

template <class Shape>
int64_t tile_count(const Extent& all) {
  return all.batch * ((all.channels + Shape::kChannels - 1) / Shape::kChannels) *
         ((all.positions + Shape::kPositions - 1) / Shape::kPositions);
}

template <class A, class X>
void forward_typed(const Tensor& attended, const Tensor& gamma, const Tensor& x, Tensor& out, Layout (&l)[3]) {
  using T = typename std::conditional<std::is_same<X, double>::value, double, float>::type;
  const T g = static_cast<const T*>(gamma.data_ptr())[0];
  Extent all = extent(x);
  along_memory(l, &all);
  const A* pa = static_cast<const A*>(attended.data_ptr());
  const X* px = static_cast<const X*>(x.data_ptr());
  X* po = static_cast<X*>(out.data_ptr());
  for_tiles<ForwardTile>(all, [&](int64_t, int64_t b, int64_t c0, int64_t channels, int64_t n0, int64_t positions) {
    T a[ForwardTile::kChannels][ForwardTile::kPositions], y[ForwardTile::kChannels][ForwardTile::kPositions];
    const auto at = [&](const Layout& s) { return b * s.batch + c0 * s.channel + n0 * s.position; };
    read_tile(pa + at(l[0]), l[0], channels, positions, a);
    read_tile(px + at(l[1]), l[1], channels, positions, y);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t n = 0; n < positions; ++n) y[c][n] += g * a[c][n];
    }
    write_tile(po + at(l[2]), l[2], channels, positions, y);
  });
}

template <class A, class X>
void backward_typed(const Tensor& grad, const Tensor& attended, const Tensor& gamma, Tensor& grad_attended,
                    Tensor& grad_gamma, const Layout (&l)[3]) {
  using T = typename std::conditional<std::is_same<X, double>::value, double, float>::type;
  const T g = static_cast<const T*>(gamma.data_ptr())[0];
  const Extent all = extent(grad);
  const X* pg = static_cast<const X*>(grad.data_ptr());
  const A* pa = static_cast<const A*>(attended.data_ptr());
  A* po = static_cast<A*>(grad_attended.data_ptr());
  // A sum for each tile, added up in their order: the result does not depend on the number of threads.
  std::vector<double> sums(static_cast<size_t>(tile_count<BackwardTile>(all)));
  for_tiles<BackwardTile>(all, [&](int64_t tile, int64_t b, int64_t c0, int64_t channels, int64_t n0, int64_t positions) {
    T a[BackwardTile::kChannels][BackwardTile::kPositions], y[BackwardTile::kChannels][BackwardTile::kPositions];
    const auto at = [&](const Layout& s) { return b * s.batch + c0 * s.channel + n0 * s.position; };
    read_tile(pg + at(l[0]), l[0], channels, positions, y);
    read_tile(pa + at(l[1]), l[1], channels, positions, a);
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) {
      T row[8] = {};
      for (int64_t n = 0; n < positions; ++n) a[c][n] *= y[c][n];
      int64_t n = 0;
      for (; n + 8 <= positions; n += 8) {
        for (int e = 0; e < 8; ++e) row[e] += a[c][n + e];
      }
      for (; n < positions; ++n) row[0] += a[c][n];
      for (int e = 0; e < 8; ++e) sum += row[e];
      for (n = 0; n < positions; ++n) y[c][n] *= g;
    }
    sums[static_cast<size_t>(tile)] = sum;
    write_tile(po + at(l[2]), l[2], channels, positions, y);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  static_cast<T*>(grad_gamma.data_ptr())[0] = static_cast<T>(total);
}

// Calls run<A, X>: x has the dtype of attended, or is float32 beside a half-precision attention (autocast).
template <class F>
void dispatch(ScalarType attended, ScalarType x, const F& run) {
  if (attended == x) {
    switch (x) {
      case ScalarType::Float: return run(float{}, float{});
      case ScalarType::Double: return run(double{}, double{});
      case ScalarType::Half: return run(Half{}, Half{});
      case ScalarType::BFloat16: return run(BFloat16{}, BFloat16{});
      default: break;
    }
  }
  if (x == ScalarType::Float && attended == ScalarType::Half) return run(Half{}, float{});
  if (x == ScalarType::Float && attended == ScalarType::BFloat16) return run(BFloat16{}, float{});
  STD_TORCH_CHECK(false, "the residual takes attended and x of one floating dtype, or x of float32.");
}

// A new tensor with the memory layout of `like`, channels-last or NCHW, and another dtype.
Tensor empty_laid_out(const Tensor& like, ScalarType dtype, bool channels_last) {
  int64_t sizes[2 + kMaxAxes];
  const int64_t dims = like.dim();
  for (int64_t d = 0; d < dims; ++d) sizes[d] = like.size(d);
  if (channels_last) {
    for (int64_t d = 2; d < dims; ++d) sizes[d - 1] = like.size(d);
    sizes[dims - 1] = like.size(1);
  }
  Tensor t = torch::stable::new_empty(like, {sizes, static_cast<size_t>(dims)}, dtype);
  if (channels_last) {
    for (int64_t d = dims - 1; d > 1; --d) t = torch::stable::transpose(t, d - 1, d);
  }
  return t;
}

void check(const Tensor& a, const Tensor& b, const Tensor& gamma, ScalarType computed) {
  STD_TORCH_CHECK(a.is_cpu() && b.is_cpu() && gamma.is_cpu(), "the residual takes CPU tensors.");
  STD_TORCH_CHECK(a.dim() == b.dim() && a.dim() >= 3 && a.dim() <= 2 + kMaxAxes,
                  "the residual takes tensors (B, C, *S) with one to three spatial axes.");
  for (int64_t d = 0; d < a.dim(); ++d) {
    STD_TORCH_CHECK(a.size(d) == b.size(d), "attended and x must have one shape.");
  }
  STD_TORCH_CHECK(gamma.numel() == 1 && gamma.scalar_type() == computed,
                  "gamma must be one number, float64 if x is, else float32.");
}

ScalarType computed_dtype(ScalarType x) { return x == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

Tensor residual_forward(Tensor attended, Tensor gamma, Tensor x) {
  check(attended, x, gamma, computed_dtype(x.scalar_type()));
  Layout l[3];
  STD_TORCH_CHECK(flat_layout(attended, &l[0]) && flat_layout(x, &l[1]),
                  "attended and x must be dense over channels or positions.");
  Tensor out = empty_laid_out(x, x.scalar_type(), l[1].position != 1);
  STD_TORCH_CHECK(flat_layout(out, &l[2]), "the output's layout is not understood.");
  if (x.numel() == 0) return out;
  dispatch(attended.scalar_type(), x.scalar_type(), [&](auto a, auto b) {
    forward_typed<decltype(a), decltype(b)>(attended, gamma, x, out, l);
  });
  return out;
}

std::tuple<Tensor, Tensor> residual_backward(Tensor grad, Tensor attended, Tensor gamma) {
  check(attended, grad, gamma, computed_dtype(grad.scalar_type()));
  Layout l[3];
  STD_TORCH_CHECK(flat_layout(grad, &l[0]) && flat_layout(attended, &l[1]),
                  "grad and attended must be dense over channels or positions.");
  Tensor grad_attended = empty_laid_out(attended, attended.scalar_type(), true);
  Tensor grad_gamma = torch::stable::empty_like(gamma);
  STD_TORCH_CHECK(flat_layout(grad_attended, &l[2]), "the output's layout is not understood.");
  if (grad.numel() == 0) return {grad_attended, torch::stable::fill_(grad_gamma, 0.0)};
  dispatch(attended.scalar_type(), grad.scalar_type(), [&](auto a, auto b) {
    backward_typed<decltype(a), decltype(b)>(grad, attended, gamma, grad_attended, grad_gamma, l);
  });
  return {grad_attended, grad_gamma};
}

}  // namespace
}  // namespace cpu
}  // namespace ccnet

STABLE_TORCH_LIBRARY_FRAGMENT(ccnet_d2, m) {
  m.def("gated_residual_forward(Tensor attended, Tensor gamma, Tensor x) -> Tensor");
  m.def(
      "gated_residual_backward(Tensor grad, Tensor attended, Tensor gamma) -> (Tensor grad_attended, Tensor "
      "grad_gamma)");
}

STABLE_TORCH_LIBRARY_IMPL(ccnet_d2, CPU, m) {
  m.impl("gated_residual_forward", TORCH_BOX(&ccnet::cpu::residual_forward));
  m.impl("gated_residual_backward", TORCH_BOX(&ccnet::cpu::residual_backward));
}
