// How far results are from what is expected, and how far they may be.
#pragma once

#include <math.h>
#include <stdio.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "error.h"
#include "kernels.h"

namespace ccnet {
namespace cuda {

using emulation::Error;

// Errors in units of the expected tensor's root mean square.
struct Errors {
  double worst = 0, rms = 0;

  void join(const Errors& e) {
    worst = std::max(worst, e.worst);
    rms = std::max(rms, e.rms);
  }
  bool within(const Errors& tolerance, double slack) const {
    return worst <= tolerance.worst * slack && rms <= tolerance.rms * slack;
  }
};

// `least` is the smallest unit, for tensors that vanish by cancellation.
inline Errors errors_of(const std::vector<double>& got, const std::vector<double>& expected, const char* what, double least) {
  double squares = 0, error_squares = 0;
  Errors e;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(got[i])) throw Error(std::string(what) + " is not finite");
    squares += expected[i] * expected[i];
    error_squares += (got[i] - expected[i]) * (got[i] - expected[i]);
    e.worst = std::max(e.worst, fabs(got[i] - expected[i]));
  }
  const double count = static_cast<double>(got.size());
  const double unit = std::max(sqrt(squares / count), least);
  e.worst /= unit;
  e.rms = sqrt(error_squares / count) / unit;
  return e;
}

// What the formats allow. The root mean square is the sharp test; single elements scatter, most of all where a few keys
// attract every query.
template <typename T>
struct Tolerance;
template <>
struct Tolerance<float> {
  static constexpr Errors out{1e-5, 2e-6}, grad{6e-5, 1e-5};
};
template <>
struct Tolerance<Half> {
  static constexpr Errors out{1e-2, 1e-3}, grad{8e-2, 4e-3};
};
template <>
struct Tolerance<BFloat16> {
  static constexpr Errors out{8e-2, 8e-3}, grad{4e-1, 3e-2};
};
constexpr Errors kLseTolerance{1e-5, 2e-6};

inline std::string text_of(const Errors& e) {
  char text[64];
  snprintf(text, sizeof text, "%.1e (rms %.1e)", e.worst, e.rms);
  return text;
}

}  // namespace cuda
}  // namespace ccnet
