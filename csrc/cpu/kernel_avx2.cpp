// x86-64 processors with AVX2 and FMA (Haswell, Zen and newer).
#include "common.h"

#if defined(CCNET_X86_DISPATCH)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace ccnet {
namespace cpu {
namespace {

#include "storage.h"
#include "float_log.h"

struct Avx2 {
  using T = float;
  using reg = __m256;
  static constexpr int W = 8;
  static constexpr int kPanelVectors = 2;
  static constexpr int kAccumulators = 12;  // of 16 registers
  static constexpr bool kMovesWords = false;

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static reg zero() { return _mm256_setzero_ps(); }
  static reg set1(float x) { return _mm256_set1_ps(x); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static reg max(reg a, reg b) { return _mm256_max_ps(a, b); }

  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static reg load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store(float* p, reg x) { _mm256_storeu_ps(p, x); }
  static void store_n(float* p, reg x, int n) { _mm256_maskstore_ps(p, first(n), x); }
  static void stream(float* p, reg x) { _mm256_stream_ps(p, x); }
  static void fence() { _mm_sfence(); }

  static reg load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(Half* p, reg x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static reg load(const BFloat16* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static void store(BFloat16* p, reg x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  template <class S>
  static reg load_n(const S* p, int n) {
    S some[W];
    memset(some, 0, sizeof some);
    memcpy(some, p, static_cast<size_t>(n) * sizeof(S));
    return load(some);
  }
  template <class S>
  static void store_n(S* p, reg x, int n) {
    S some[W];
    store(some, x);
    memcpy(p, some, static_cast<size_t>(n) * sizeof(S));
  }

  // log for normal x > 0.
  static reg log(reg x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i exponent = _mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127));
    const __m256i mantissa = _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff)),
                                             _mm256_set1_epi32(0x3f800000));
    const reg result = log_of_parts<Avx2>(_mm256_castsi256_ps(mantissa), _mm256_cvtepi32_ps(exponent));
    return _mm256_blendv_ps(result, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }

  // As in vector_avx512.h.
  static reg exp(reg x) {
    const reg counts = _mm256_cmp_ps(x, set1(kLeastExponent), _CMP_NLT_UQ);
    x = _mm256_max_ps(set1(kLeastExponent), x);  // the second where one is NaN
    const reg n = _mm256_round_ps(mul(x, set1(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    reg r = _mm256_fnmadd_ps(n, set1(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, set1(-2.12194440e-4f), r);
    reg p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set1(1.0f)));
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(counts, mul(p, _mm256_castsi256_ps(exponent)));
  }

  static void transpose(reg* t) {
    reg s[8];
    for (int i = 0; i < 8; i += 2) {
      s[i] = _mm256_unpacklo_ps(t[i], t[i + 1]);
      s[i + 1] = _mm256_unpackhi_ps(t[i], t[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      t[i + 0] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
      t[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
      t[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
      t[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      s[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
      s[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) t[i] = s[i];
  }
};

#include "work.h"
#include "line_kernels.h"
#include "residual_kernels.h"
#include "matmul_blocks.h"
#include "matmul_sum.h"
#include "vector_matmul.h"
#include "vector_matmul_sum.h"

const Kernels kKernels{"avx2",
                       to_channels_last_any<Avx2>,
                       forward_any<Avx2>,
                       backward_any<Avx2>,
                       residual_forward_any<Avx2>,
                       residual_backward_any<Avx2>,
                       vector_matmul<Avx2>,
                       vector_matmul_sum<Avx2>};

}  // namespace
}  // namespace cpu
}  // namespace ccnet

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace ccnet {
namespace cpu {
const Kernels* avx2_kernels() {
  __builtin_cpu_init();
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!has) return nullptr;
  static const Kernels kernels = paying_where_not_intel(kKernels);
  return &kernels;
}
}  // namespace cpu
}  // namespace ccnet

#else
namespace ccnet {
namespace cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace ccnet
#endif
