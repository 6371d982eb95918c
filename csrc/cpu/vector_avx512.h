// Sixteen floats in an AVX-512 register. Included inside an anonymous namespace (see line_kernels.h).

#include "float_log.h"

struct Avx512 {
  using T = float;
  using reg = __m512;
  static constexpr int W = 16;
  static constexpr int kPanelVectors = 4;
  static constexpr int kAccumulators = 24;  // of 32 registers: NR + 1 more hold operands
  static constexpr bool kMovesWords = true;  // has transpose_words

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static reg zero() { return _mm512_setzero_ps(); }
  static reg set1(float x) { return _mm512_set1_ps(x); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static reg max(reg a, reg b) { return _mm512_max_ps(a, b); }

  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static reg load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, reg x) { _mm512_storeu_ps(p, x); }
  static void store_n(float* p, reg x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
  // Past the caches: p is aligned, and fence comes before anybody else reads.
  static void stream(float* p, reg x) { _mm512_stream_ps(p, x); }
  static void fence() { _mm_sfence(); }

  static reg load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static reg load_n(const Half* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static __m256i to_half(reg x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static void store(Half* p, reg x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(x)); }
  static void store_n(Half* p, reg x, int n) { _mm256_mask_storeu_epi16(p, first(n), to_half(x)); }

  static reg widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static __m256i to_bfloat16(reg x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
  }
  static reg load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static reg load_n(const BFloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store(BFloat16* p, reg x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(x)); }
  static void store_n(BFloat16* p, reg x, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bfloat16(x)); }

  // False where exp is to be 0; true for NaN, which stays NaN.
  static __mmask16 counts(reg x) { return _mm512_cmp_ps_mask(x, set1(kLeastExponent), _CMP_NLT_UQ); }

  // exp for x <= some tens: 2^n * p(r) with |r| <= ln2 / 2, error below 2 units in the last place; 0 below
  // kLeastExponent, also for -inf.
  static reg exp(reg x) {
    const reg n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    reg r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    reg p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_scalef_ps(counts(x), p, n);
  }

  // log for normal x > 0.
  static reg log(reg x) {
    return log_of_parts<Avx512>(_mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), _mm512_getexp_ps(x));
  }

  static void transpose(reg* t) {
    reg s[16];
    for (int i = 0; i < 16; i += 2) {
      s[i] = _mm512_unpacklo_ps(t[i], t[i + 1]);
      s[i + 1] = _mm512_unpackhi_ps(t[i], t[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      t[i + 0] = pairs_lo(s[i], s[i + 2]);
      t[i + 1] = pairs_hi(s[i], s[i + 2]);
      t[i + 2] = pairs_lo(s[i + 1], s[i + 3]);
      t[i + 3] = pairs_hi(s[i + 1], s[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      s[i] = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
      s[i + 4] = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
      s[i + 8] = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
      s[i + 12] = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(s[i], s[i + 8], 0x88);
      t[i + 8] = _mm512_shuffle_f32x4(s[i], s[i + 8], 0xdd);
      t[i + 4] = _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0xdd);
    }
  }

  static __mmask32 first_words(int64_t n) {
    return n >= 32 ? ~__mmask32(0) : static_cast<__mmask32>((1u << n) - 1u);
  }

  // dst[i, j] = src[j, i] for i < cols, j < rows, both at most 32; src_step and dst_step between rows. S has 16 bits.
  template <class S>
  static void transpose_words(const S* src, int64_t src_step, int64_t rows, int64_t cols, S* dst, int64_t dst_step) {
    const __mmask32 used = first_words(cols);
    reg lo[16], hi[16];
    CCNET_UNROLL
    for (int r = 0; r < 16; ++r) {
      const S* p = src + 2 * r * src_step;
      const __m512i a = _mm512_maskz_loadu_epi16(2 * r < rows ? used : 0, p);
      const __m512i b = _mm512_maskz_loadu_epi16(2 * r + 1 < rows ? used : 0, p + src_step);
      lo[r] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
      hi[r] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
    }
    transpose(lo);
    transpose(hi);
    CCNET_UNROLL
    for (int r = 0; r < 16; ++r) {
      const int64_t at = r / 4 * 8 + r % 4;  // undoes the order that the unpack instructions gave
      store_words(dst + at * dst_step, lo[r], at < cols ? rows : 0);
      store_words(dst + (at + 4) * dst_step, hi[r], at + 4 < cols ? rows : 0);
    }
  }

 private:
  template <class S>
  static void store_words(S* p, reg x, int64_t n) {
    if (n >= 32) {
      _mm512_storeu_si512(p, _mm512_castps_si512(x));
    } else if (n > 0) {
      _mm512_mask_storeu_epi16(p, first_words(n), _mm512_castps_si512(x));
    }
  }
  static reg pairs_lo(reg a, reg b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static reg pairs_hi(reg a, reg b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
};
