// Operands of bf16 products. Included inside an anonymous namespace (see line_kernels_bf16.h).

inline __m512i load_words(const BFloat16* p, int64_t n) {
  return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(V::first_words(n), p);
}

// dst[i, c] = src[i, c], i < rows, c < cols, zeros up to padded_rows and to a multiple of 32 columns.
void pack_plain(const BFloat16* src, int64_t row, int64_t rows, int64_t cols, int64_t padded_rows, BFloat16* dst,
                int64_t ld, Ahead* ahead) {
  for (int64_t i = 0; i < padded_rows; ++i) {
    if (i % 4 == 0) ahead->ask();
    for (int64_t c = 0; c < cols; c += 32) {
      const __m512i x = i < rows ? load_words(src + i * row + c, cols - c) : _mm512_setzero_si512();
      _mm512_storeu_si512(dst + i * ld + c, x);
    }
  }
}

// dst[r, c] = (src[2r, c], src[2r+1, c]) for c < cols padded to 32, 2r < padded_rows; columns permuted (see above).
void pack_pairs(const BFloat16* src, int64_t row, int64_t rows, int64_t cols, int64_t padded_rows, uint32_t* dst,
                int64_t ld, Ahead* ahead) {
  for (int64_t i = 0; i < padded_rows; i += 2) {
    if (i % 8 == 0) ahead->ask();
    const BFloat16* p = src + i * row;
    uint32_t* d = dst + i / 2 * ld;
    for (int64_t c = 0; c < cols; c += 32) {
      const __m512i a = i < rows ? load_words(p + c, cols - c) : _mm512_setzero_si512();
      const __m512i b = i + 1 < rows ? load_words(p + row + c, cols - c) : _mm512_setzero_si512();
      _mm512_storeu_si512(d + c, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(d + c + 16, _mm512_unpackhi_epi16(a, b));
    }
  }
}

// dst[k, i] = (src[i, 2k], src[i, 2k+1]) for i < padded_rows (a multiple of 16), 2k < cols padded to 32.
void pack_transposed(const BFloat16* src, int64_t row, int64_t rows, int64_t cols, int64_t padded_rows,
                     uint32_t* dst, int64_t ld, Ahead* ahead) {
  for (int64_t i = 0; i < padded_rows; i += 16) {
    for (int64_t c = 0; c < cols; c += 32) {
      ahead->ask();
      reg t[16];
      CCNET_UNROLL
      for (int r = 0; r < 16; ++r) {
        t[r] = i + r < rows ? _mm512_castsi512_ps(load_words(src + (i + r) * row + c, cols - c)) : V::zero();
      }
      V::transpose(t);
      CCNET_UNROLL
      for (int r = 0; r < 16; ++r) _mm512_storeu_ps(dst + (c / 2 + r) * ld + i, t[r]);
    }
  }
}

// The rows of a line as the left operand of products: in place where they are whole steps of the products, and only the
// last few, which a product's last block of rows would read past the end of, from a copy that is padded with zeros.
template <class Engine>
class LeftRows {
 public:
  // Numbers of scratch memory for lines of `length` rows and `cols` numbers.
  static int64_t scratch(int64_t length, int64_t cols) {
    return (in_place(cols) ? Engine::kRows : round_up(length, Engine::kRows)) * words_leading(round_up(cols, 32));
  }

  LeftRows(const BFloat16* src, int64_t row, int64_t rows, int64_t cols, BFloat16* copy, Ahead* ahead)
      : src_(src), copy_(copy), row_(row), copy_row_(words_leading(round_up(cols, 32))),
        whole_(in_place(cols) ? rows / Engine::kRows * Engine::kRows : 0),
        rest_(round_up(rows - whole_, Engine::kRows)) {
    pack_plain(src + whole_ * row, row, rows - whole_, cols, rest_, copy, copy_row_, ahead);
  }

  // C[rows, N] = rows times B.
  void product(int64_t N, int64_t depth, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, Ahead* ahead) const {
    if (whole_ > 0) Engine::product(whole_, N, depth, src_, row_, b, ldb, c, ldc, ahead);
    if (rest_ > 0) Engine::product(rest_, N, depth, copy_, copy_row_, b, ldb, c + whole_ * ldc, ldc, ahead);
  }

  const BFloat16* row(int64_t i) const { return i < whole_ ? src_ + i * row_ : copy_ + (i - whole_) * copy_row_; }

 private:
  static bool in_place(int64_t cols) { return cols % 32 == 0; }

  const BFloat16* src_;
  const BFloat16* copy_;
  int64_t row_, copy_row_, whole_, rest_;
};

// sum_c a[c] * b[c]
inline float dot_words(const BFloat16* a, const BFloat16* b, int64_t count) {
  reg sum = V::zero();
  for (int64_t c = 0; c < count; c += 32) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)load_words(a + c, count - c), (__m512bh)load_words(b + c, count - c));
  }
  return _mm512_reduce_add_ps(sum);
}

// The last k of a product where it is one more than whole kDepth, which would be mostly padding: what product_to hands
// out is A B + weights[row * step] values[column].
struct DepthEdge {
  const BFloat16* values = nullptr;
  int64_t cols = 0;
  const BFloat16* weights = nullptr;
  int64_t step = 0;

  // 32 values, in the order of pack_pairs.
  void columns(int64_t c, reg* lo, reg* hi) const {
    const __m512i x = load_words(values + c, cols - c > 0 ? cols - c : 0), zero = _mm512_setzero_si512();
    *lo = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, x));
    *hi = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, x));
  }
};

// How many of `depth` k are such an edge.
template <class Engine>
int64_t depth_edge(int64_t depth) {
  return depth > Engine::kDepth && depth % Engine::kDepth <= Engine::kEdgeDepth ? depth % Engine::kDepth : 0;
}
