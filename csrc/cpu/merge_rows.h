// Joins one axis' softmax statistics of a block of rows with those of the axes before; `merge` in lines.h, a vector of
// rows at a time. Included inside each translation unit's anonymous namespace (see line_kernels.h).

// What takes the place of the largest energy of a row where all are minus infinity, as those of keys of minus infinity
// may be: such a row sums up to 0, while minus infinity less itself would be NaN. NaN stays NaN.
template <class V>
typename V::reg above_minus_infinity(typename V::reg most) {
  return V::max(V::set1(std::numeric_limits<typename V::T>::lowest()), most);
}

// On entry keep and fresh hold the largest energy and the sum of exponentials of each row on this axis; on return the
// factors of what `out` holds (the mean over the keys seen so far) and of this axis' sum_j exp(S - max) V.
// max_io and sum_io are rows `step` apart; after the last axis sum_io is the log-sum-exp. The two scratch arrays, keep
// and fresh have room for whole vectors.
template <class V>
void merge_rows(int64_t rows, bool first, bool last, typename V::T* max_io, typename V::T* sum_io, int64_t step,
                typename V::T* keep, typename V::T* fresh, typename V::T* before_max, typename V::T* before_sum) {
  using T = typename V::T;
  using reg = typename V::reg;
  for (int64_t i = 0; i < rows; ++i) {
    before_max[i] = first ? static_cast<T>(-INFINITY) : max_io[i * step];
    before_sum[i] = first ? T(0) : sum_io[i * step];
  }
  for (int64_t i = 0; i < rows; i += V::W) {
    const reg m_here = V::load(keep + i), m_before = V::load(before_max + i);
    const reg s_here = V::load(fresh + i), s_before = V::load(before_sum + i);
    const reg m = V::max(m_before, m_here);  // never -inf
    const reg scale_here = V::exp(V::sub(m_here, m));
    const reg kept = V::mul(V::exp(V::sub(m_before, m)), s_before);
    const reg sum = V::fma(s_here, scale_here, kept);
    V::store(before_max + i, m);
    V::store(before_sum + i, last ? V::add(m, V::log(sum)) : sum);
    // Of a row without a finite energy so far, the mean is 0 until one comes.
    const reg whole = last ? sum : V::max(V::set1(std::numeric_limits<T>::min()), sum);
    V::store(keep + i, V::div(kept, whole));
    V::store(fresh + i, V::div(scale_here, whole));
  }
  for (int64_t i = 0; i < rows; ++i) {
    max_io[i * step] = before_max[i];
    sum_io[i * step] = before_sum[i];
  }
}
