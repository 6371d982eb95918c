// Any processor, and float64 everywhere: short arrays that the compiler turns into whatever vectors it has.
#include "common.h"

namespace ccnet {
namespace cpu {
namespace {

#include "storage.h"

inline float exponential(float x) { return x < kLeastExponent ? 0.0f : expf(x); }
inline double exponential(double x) { return ::exp(x); }
inline float logarithm(float x) { return logf(x); }
inline double logarithm(double x) { return ::log(x); }

template <typename Scalar, int Width>
struct ArrayVector {
  using T = Scalar;
  static constexpr int W = Width;
  static constexpr int kPanelVectors = 2;
  static constexpr int kAccumulators = 12;  // fits the 16 registers of SSE2 and the 32 of NEON
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
  static reg set1(Scalar x) {
    reg r;
    for (int i = 0; i < W; ++i) r[i] = x;
    return r;
  }
  static reg load(const Scalar* p) {
    reg r;
    memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(Scalar* p, reg x) { memcpy(p, &x, sizeof x); }
  static void stream(Scalar* p, reg x) { store(p, x); }
  static void fence() {}
#if defined(__GNUC__) || defined(__clang__)
  static reg add(reg a, reg b) { return a + b; }
  static reg sub(reg a, reg b) { return a - b; }
  static reg mul(reg a, reg b) { return a * b; }
  static reg div(reg a, reg b) { return a / b; }
  static reg fma(reg a, reg b, reg c) { return a * b + c; }
#else
  static reg add(reg a, reg b) { for (int i = 0; i < W; ++i) a[i] += b[i]; return a; }
  static reg sub(reg a, reg b) { for (int i = 0; i < W; ++i) a[i] -= b[i]; return a; }
  static reg mul(reg a, reg b) { for (int i = 0; i < W; ++i) a[i] *= b[i]; return a; }
  static reg div(reg a, reg b) { for (int i = 0; i < W; ++i) a[i] /= b[i]; return a; }
  static reg fma(reg a, reg b, reg c) { for (int i = 0; i < W; ++i) c[i] += a[i] * b[i]; return c; }
#endif
  static reg max(reg a, reg b) {
    for (int i = 0; i < W; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
  }
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

#include "work.h"
#include "line_kernels.h"
#include "residual_kernels.h"

void forward(const ForwardArgs& args) {
  if (args.dtype == DType::kDouble) return forward_typed<ArrayVector<double, 2>, double>(args);
  forward_any<ArrayVector<float, 4>>(args);
}

void backward(const BackwardArgs& args) {
  if (args.dtype == DType::kDouble) return backward_typed<ArrayVector<double, 2>, double>(args);
  backward_any<ArrayVector<float, 4>>(args);
}

void to_channels_last(const CopyArgs& args) {
  if (args.dtype == DType::kDouble) return to_channels_last_typed<ArrayVector<double, 2>, double>(args);
  to_channels_last_any<ArrayVector<float, 4>>(args);
}

void residual_forward(const ResidualArgs& args) {
  if (args.dtype == DType::kDouble) return residual_forward_typed<ArrayVector<double, 2>, double, double>(args);
  residual_forward_any<ArrayVector<float, 4>>(args);
}

void residual_backward(const ResidualArgs& args) {
  if (args.dtype == DType::kDouble) return residual_backward_typed<ArrayVector<double, 2>, double, double>(args);
  residual_backward_any<ArrayVector<float, 4>>(args);
}

const Kernels kKernels{"portable", to_channels_last, forward, backward, residual_forward, residual_backward};

}  // namespace

const Kernels* portable_kernels() { return &kKernels; }

}  // namespace cpu
}  // namespace ccnet
