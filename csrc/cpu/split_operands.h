// fp32 numbers as sums of three bf16 numbers, packed for matrix units that multiply bf16. Included inside an anonymous
// namespace (see line_kernels_split.h).
//
// Operands are kept as tiles of 16 rows (left operand) or 16 columns (right operand) and 32 successive k, the three
// parts of a row side by side. A 32-bit unit holds the numbers of k and k + 16: no words change places.
//
// A packer fills such an operand in units of some 100 instructions, few enough to be done beside products
// (background.h): packer(0) ... packer(packer.units() - 1), in any order.

using V = Avx512;
using reg = __m512;

constexpr int64_t kStep = 32;  // successive k of a tile
constexpr int64_t kParts = 3;
constexpr int64_t kTileRow = kParts * kStep;   // numbers of a tile's row, its parts side by side
constexpr int64_t kTriple = kTile * kTileRow;  // of a tile

inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
inline int64_t depth(int64_t n) { return (n + kStep - 1) / kStep; }

// Tiles [tile][step of k], three parts each.
struct TileMatrix {
  BFloat16* data;
  int64_t steps;

  BFloat16* at(int64_t tile, int64_t step) const { return data + (tile * steps + step) * kTriple; }
};

// Scratch memory of so many tiles and steps, in floats.
inline int64_t tile_floats(int64_t tiles, int64_t steps) { return tiles * steps * kTriple / 2; }

inline TileMatrix take_tiles(Scratch<float>* scratch, int64_t tiles, int64_t steps) {
  return {reinterpret_cast<BFloat16*>(scratch->take(tile_floats(tiles, steps))), steps};
}

// The three parts of 16 pairs (a, b).
inline void split(reg a, reg b, BFloat16* to) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  CCNET_UNROLL
  for (int part = 0; part < kParts; ++part) {
    const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    // x >> 16 | (y & upper)
    _mm512_store_si512(to + part * kStep, _mm512_ternarylogic_epi32(_mm512_srli_epi32(x, 16), y, upper, 0xf8));
    if (part + 1 < kParts) {
      a = V::sub(a, _mm512_castsi512_ps(_mm512_and_si512(x, upper)));
      b = V::sub(b, _mm512_castsi512_ps(_mm512_and_si512(y, upper)));
    }
  }
}

// Up to a vector of the n numbers at p; zeros where there is none.
template <class S>
reg load_there(const S* p, int64_t n) {
  return n > 0 ? load_some<V>(p, n) : V::zero();
}

// Packs a left operand, to[m, k] = src[m, k] for m < rows and k < cols, zeros beyond, a row at a time. Where `with` is
// given, dots[m] (a vector of partial sums) grows by sum_k src[m, k] with[k].
template <class S>
class LeftPacker {
 public:
  LeftPacker() = default;
  LeftPacker(const S* src, int64_t row, int64_t rows, int64_t cols, const TileMatrix& to, const S* with = nullptr,
             float* dots = nullptr)
      : src_(src), with_(with), dots_(dots), row_(row), rows_(rows), cols_(cols), to_(to) {}

  int64_t units() const { return tiles(rows_) * kTile; }

  void operator()(int64_t m) const {
    const S* p = src_ + m * row_;
    reg dot = V::zero();
    for (int64_t s = 0; s < to_.steps; ++s) {
      const int64_t k = s * kStep, n = m < rows_ ? cols_ - k : 0;
      const reg a = load_there(p + k, n), b = load_there(p + k + 16, n - 16);
      split(a, b, to_.at(m / kTile, s) + m % kTile * kTileRow);
      if (with_ != nullptr) {
        dot = V::fma(a, load_there(with_ + k, n), dot);
        dot = V::fma(b, load_there(with_ + k + 16, n - 16), dot);
      }
    }
    if (with_ != nullptr && m < rows_) V::store(dots_ + m * V::W, V::add(V::load(dots_ + m * V::W), dot));
  }

 private:
  const S* src_ = nullptr;
  const S* with_ = nullptr;
  float* dots_ = nullptr;
  int64_t row_ = 0, rows_ = 0, cols_ = 0;
  TileMatrix to_{nullptr, 0};
};

// The transpose of 16 rows of four numbers, `row` apart: t[c][r] = p[r * row + c].
inline void load_transposed_quarter(const float* p, int64_t row, reg* t) {
  reg x[4];
  CCNET_UNROLL
  for (int r = 0; r < 4; ++r) {
    x[r] = _mm512_castps128_ps512(_mm_loadu_ps(p + r * row));
    x[r] = _mm512_insertf32x4(x[r], _mm_loadu_ps(p + (r + 4) * row), 1);
    x[r] = _mm512_insertf32x4(x[r], _mm_loadu_ps(p + (r + 8) * row), 2);
    x[r] = _mm512_insertf32x4(x[r], _mm_loadu_ps(p + (r + 12) * row), 3);
  }
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
  t[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  t[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  t[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  t[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

// A quarter of a tile, or with the first one all of it where some of it is not there, from the transposes of two
// squares: tile row r holds a[i, r] and b[i, r] for i < 16. Rows of both are `row` apart; b is there only where a is.
template <class S>
void split_transposed(int64_t quarter, const S* a, int64_t a_rows, int64_t a_cols, const S* b, int64_t b_rows,
                      int64_t b_cols, int64_t row, BFloat16* to) {
  if constexpr (std::is_same<S, float>::value) {
    if (b_rows >= kTile && b_cols >= kTile) {
      reg x[4], y[4];
      load_transposed_quarter(a + quarter * 4, row, x);
      load_transposed_quarter(b + quarter * 4, row, y);
      CCNET_UNROLL
      for (int r = 0; r < 4; ++r) split(x[r], y[r], to + (quarter * 4 + r) * kTileRow);
      return;
    }
  }
  if (quarter > 0) return;
  reg x[16], y[16];
  load_transposed<V>(a, row, a_cols > 0 ? a_rows : 0, a_cols, x);
  load_transposed<V>(b, row, b_cols > 0 ? b_rows : 0, b_cols, y);
  CCNET_UNROLL
  for (int r = 0; r < 16; ++r) split(x[r], y[r], to + r * kTileRow);
}

// Packs a right operand, to[k, n] = src[n, k] for n < rows and k < cols, zeros beyond, a quarter of a tile at a time.
template <class S>
class TransposedPacker {
 public:
  TransposedPacker() = default;
  TransposedPacker(const S* src, int64_t row, int64_t rows, int64_t cols, const TileMatrix& to)
      : src_(src), row_(row), rows_(rows), cols_(cols), to_(to) {}

  int64_t units() const { return tiles(rows_) * to_.steps * 4; }

  void operator()(int64_t unit) const {
    const int64_t tile = unit / 4 / to_.steps, s = unit / 4 % to_.steps, n = tile * kTile, k = s * kStep;
    const S* p = src_ + n * row_ + k;
    split_transposed(unit % 4, p, rows_ - n, cols_ - k, p + 16, rows_ - n, cols_ - k - 16, row_, to_.at(tile, s));
  }

 private:
  const S* src_ = nullptr;
  int64_t row_ = 0, rows_ = 0, cols_ = 0;
  TileMatrix to_{nullptr, 0};
};

// Packs a left operand, to[m, k] = src[k, m] for k < rows and m < cols, zeros beyond, a quarter of a tile at a time.
class LeftTransposedPacker {
 public:
  LeftTransposedPacker() = default;
  LeftTransposedPacker(const float* src, int64_t row, int64_t rows, int64_t cols, const TileMatrix& to)
      : src_(src), row_(row), rows_(rows), cols_(cols), to_(to) {}

  int64_t units() const { return tiles(cols_) * to_.steps * 4; }

  void operator()(int64_t unit) const {
    const int64_t tile = unit / 4 / to_.steps, s = unit / 4 % to_.steps, m = tile * kTile, k = s * kStep;
    const float* p = src_ + k * row_ + m;
    split_transposed(unit % 4, p, rows_ - k, cols_ - m, p + 16 * row_, rows_ - k - 16, cols_ - m, row_,
                     to_.at(tile, s));
  }

 private:
  const float* src_ = nullptr;
  int64_t row_ = 0, rows_ = 0, cols_ = 0;
  TileMatrix to_{nullptr, 0};
};

// What is computed from a right operand's rows while they are at hand, each only where it is given:
template <class S>
struct FromRows {
  const float* weights = nullptr;  // weighted[n] += sum_k weights[k] src[k, n]
  float* weighted = nullptr;
  const S* other = nullptr;  // other_dots[k] += sum_n src[k, n] other[k, n]; a vector of partial sums, as are the next
  int64_t other_row = 0;
  float* other_dots = nullptr;
  const S* with = nullptr;  // with_dots[k] += sum_n src[k, n] with[n]
  float* with_dots = nullptr;
};

// Packs a right operand, to[k, n] = src[k, n] for k < rows and n < cols, zeros beyond, a pair of rows and up to four
// tiles of columns at a time. Row number `rows`, where there is an edge, takes part in `from` but is not packed.
template <class S>
class RightPacker {
 public:
  RightPacker() = default;
  RightPacker(const S* src, int64_t row, int64_t rows, int64_t edge, int64_t cols, const TileMatrix& to,
              const FromRows<S>& from = {})
      : src_(src), row_(row), rows_(rows), edge_(edge), cols_(cols), to_(to), from_(from) {
    for (int64_t n = 0; from_.weights != nullptr && n < tiles(cols_) * kTile; ++n) from_.weighted[n] = 0.0f;
  }

  int64_t units() const { return to_.steps * kTile * groups(); }

  void operator()(int64_t unit) const {
    const int64_t pair = unit / groups(), first = unit % groups() * 4, count = tiles(cols_) - first;
    const auto run = count >= 4   ? &RightPacker::pack<4>
                     : count == 3 ? &RightPacker::pack<3>
                     : count == 2 ? &RightPacker::pack<2>
                                  : &RightPacker::pack<1>;
    (this->*run)(pair / kTile, pair % kTile, first);
  }

 private:
  int64_t groups() const { return (tiles(cols_) + 3) / 4; }

  template <int NT>
  void pack(int64_t step, int64_t t, int64_t first) const {
    const int64_t k = step * kStep + t, column = first * kTile, cols = cols_ - column;
    reg a[NT], b[NT];
    CCNET_UNROLL
    for (int n = 0; n < NT; ++n) a[n] = b[n] = V::zero();
    if (k < rows_) load<NT>(k, column, cols, a);
    if (k + 16 < rows_) load<NT>(k + 16, column, cols, b);
    CCNET_UNROLL
    for (int n = 0; n < NT; ++n) split(a[n], b[n], to_.at(first + n, step) + t * kTileRow);
    if (edge_ > 0 && k == 0) load<NT>(rows_, column, cols, a);
  }

  template <int NT>
  void load(int64_t k, int64_t column, int64_t cols, reg* x) const {
    const S* p = src_ + k * row_ + column;
    CCNET_UNROLL
    for (int n = 0; n < NT; ++n) x[n] = load_some<V>(p + n * 16, cols - n * 16);
    if (from_.weights != nullptr) {
      const reg w = V::set1(from_.weights[k]);
      float* sums = from_.weighted + column;
      CCNET_UNROLL
      for (int n = 0; n < NT; ++n) V::store(sums + n * 16, V::fma(w, x[n], V::load(sums + n * 16)));
    }
    const auto add_dot = [&](const S* q, float* dots) CCNET_INLINE {
      reg dot = V::load(dots + k * V::W);
      CCNET_UNROLL
      for (int n = 0; n < NT; ++n) dot = V::fma(x[n], load_some<V>(q + column + n * 16, cols - n * 16), dot);
      V::store(dots + k * V::W, dot);
    };
    if (from_.other != nullptr) add_dot(from_.other + k * from_.other_row, from_.other_dots);
    if (from_.with != nullptr) add_dot(from_.with, from_.with_dots);
  }

  const S* src_ = nullptr;
  int64_t row_ = 0, rows_ = 0, edge_ = 0, cols_ = 0;
  TileMatrix to_{nullptr, 0};
  FromRows<S> from_;
};

// Packs all at once.
template <class Packer>
void pack(const Packer& packer, Ahead* ahead) {
  for (int64_t unit = 0; unit < packer.units(); ++unit) {
    ahead->ask();
    packer(unit);
  }
}
