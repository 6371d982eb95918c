// The natural logarithm of a vector of floats. Included inside each translation unit's anonymous namespace (see
// line_kernels.h).

// log(mantissa * 2^exponent), mantissa in [1, 2): error of some units in the last place of max(1, |result|). With the
// mantissa moved to [1 / sqrt 2, sqrt 2), no number needs to be treated differently from its neighbours. Polynomial of
// the Cephes library (logf).
template <class V>
typename V::reg log_of_parts(typename V::reg mantissa, typename V::reg exponent) {
  using reg = typename V::reg;
  const reg z = V::fma(mantissa, V::set1(0.70710678118654752f), V::set1(-1.0f));
  const reg e = V::add(exponent, V::set1(0.5f));
  const reg square = V::mul(z, z);
  reg p = V::set1(7.0376836292e-2f);
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                  2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f}) {
    p = V::fma(p, z, V::set1(c));
  }
  p = V::mul(V::mul(p, z), square);
  p = V::fma(e, V::set1(-2.12194440e-4f), p);
  p = V::fma(square, V::set1(-0.5f), p);
  return V::fma(e, V::set1(0.693359375f), V::add(z, p));
}
