// Short arrays of numbers that the compiler turns into whatever vectors it has. Included inside an anonymous namespace,
// after storage.h.

inline float exponential(float x) { return x < kLeastExponent ? 0.0f : expf(x); }
inline double exponential(double x) { return ::exp(x); }
inline float logarithm(float x) { return logf(x); }
inline double logarithm(double x) { return ::log(x); }

template <typename Scalar, int Width>
struct ArrayVector {
  using T = Scalar;
  static constexpr int W = Width;
  static constexpr int kPanelVectors = 2;
  static constexpr int kAccumulators = 12;  // of 16 registers, as SSE2 has them
  static constexpr bool kMovesWords = false;

#if defined(__GNUC__) || defined(__clang__)
  typedef Scalar reg __attribute__((vector_size(sizeof(Scalar) * Width)));
#else
  struct reg {
    Scalar e[Width];
    Scalar operator[](int i) const { return e[i]; }
    Scalar& operator[](int i) { return e[i]; }
  };
#endif

  static reg zero() { return set1(Scalar(0)); }
  static reg load(const Scalar* p) {
    reg r;
    memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(Scalar* p, reg x) { memcpy(p, &x, sizeof x); }
  static void stream(Scalar* p, reg x) { store(p, x); }
  static void fence() {}
#if defined(__GNUC__) || defined(__clang__)
  static reg set1(Scalar x) { return x - reg{}; }
  static reg max(reg a, reg b) { return a > b ? a : b; }
  static reg add(reg a, reg b) { return a + b; }
  static reg sub(reg a, reg b) { return a - b; }
  static reg mul(reg a, reg b) { return a * b; }
  static reg div(reg a, reg b) { return a / b; }
  static reg fma(reg a, reg b, reg c) { return a * b + c; }
#else
  static reg set1(Scalar x) { reg r; for (int i = 0; i < W; ++i) r[i] = x; return r; }
  static reg max(reg a, reg b) { for (int i = 0; i < W; ++i) a[i] = a[i] > b[i] ? a[i] : b[i]; return a; }
  static reg add(reg a, reg b) { for (int i = 0; i < W; ++i) a[i] += b[i]; return a; }
  static reg sub(reg a, reg b) { for (int i = 0; i < W; ++i) a[i] -= b[i]; return a; }
  static reg mul(reg a, reg b) { for (int i = 0; i < W; ++i) a[i] *= b[i]; return a; }
  static reg div(reg a, reg b) { for (int i = 0; i < W; ++i) a[i] /= b[i]; return a; }
  static reg fma(reg a, reg b, reg c) { for (int i = 0; i < W; ++i) c[i] += a[i] * b[i]; return c; }
#endif
  static reg log(reg x) {
    for (int i = 0; i < W; ++i) x[i] = logarithm(x[i]);
    return x;
  }
  static reg exp(reg x) {
    for (int i = 0; i < W; ++i) x[i] = exponential(x[i]);
    return x;
  }
  static void transpose(reg* t) {
    for (int i = 0; i < W; ++i) {
      for (int j = i + 1; j < W; ++j) {
        const Scalar x = t[i][j];
        t[i][j] = t[j][i];
        t[j][i] = x;
      }
    }
  }
  static double load_one(const double* p) { return *p; }
  template <class S>
  static Scalar load_one(const S* p) {
    return to_float(*p);
  }
  static void store_one(double* p, Scalar x) { *p = x; }
  template <class S>
  static void store_one(S* p, Scalar x) {
    from_float(static_cast<float>(x), p);
  }
  template <class S>
  static reg load_n(const S* p, int n) {
    reg r = zero();
    for (int i = 0; i < n; ++i) r[i] = load_one(p + i);
    return r;
  }
  template <class S>
  static reg load(const S* p) {
    return load_n(p, W);
  }
  template <class S>
  static void store_n(S* p, reg x, int n) {
    for (int i = 0; i < n; ++i) store_one(p + i, x[i]);
  }
  template <class S>
  static void store(S* p, reg x) {
    store_n(p, x, W);
  }
};

#if defined(__GNUC__) || defined(__clang__)

// Four floats, with all that is done for every weight or number in memory done four at a time.
struct FloatVector : ArrayVector<float, 4> {
  using Base = ArrayVector<float, 4>;
  using Base::load;
  using Base::store;
  typedef int32_t Bits __attribute__((vector_size(16)));
  typedef uint16_t Words __attribute__((vector_size(8)));
#if defined(__aarch64__)
  static constexpr int kPanelVectors = 4;
  static constexpr int kAccumulators = 24;  // of 32 registers
#endif

  // As in vector_avx512.h. Added to 1.5 * 2^23, a number is rounded to a whole one, which the lowest bits hold.
  static reg exp(reg x) {
    const Bits none = x < kLeastExponent;  // not where it is NaN
    x = none ? set1(kLeastExponent) : x;
    const reg shifted = x * 1.44269504088896341f + 12582912.0f;
    const reg n = shifted - 12582912.0f;
    const reg r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    reg p = set1(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    const Bits power = ((Bits)shifted + 127) << 23;
    return (reg)((Bits)(p * (reg)power) & ~none);
  }

  static reg load(const BFloat16* p) {
    Words words;
    memcpy(&words, p, sizeof words);
    return (reg)(__builtin_convertvector(words, Bits) << 16);
  }
  static void store(BFloat16* p, reg x) {
    const Bits bits = (Bits)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Bits upper = (x != x ? Bits{} + 0x7fc00000 : rounded) >> 16;
    const Words words = __builtin_convertvector(upper, Words);
    memcpy(p, &words, sizeof words);
  }

#if defined(__aarch64__)
  static reg load(const Half* p) {
    float16x4_t halves;
    memcpy(&halves, p, sizeof halves);
    return (reg)vcvt_f32_f16(halves);
  }
  static void store(Half* p, reg x) {
    const float16x4_t halves = vcvt_f16_f32((float32x4_t)x);
    memcpy(p, &halves, sizeof halves);
  }
#endif
};

#else
using FloatVector = ArrayVector<float, 4>;
#endif
