// What becomes of the results of bf16 products. Included inside an anonymous namespace (see line_kernels_bf16.h).

inline __m512i words_in_order(reg lo, reg hi) {
  const __m512i order = _mm512_set_epi16(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8,  //
                                         23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
}

// How results are stored, known when the code that stores them is compiled: it runs once for every 32 of them.
// WHOLE: they come in whole vectors of 32.
template <Store STORE, bool WHOLE>
struct StoreWay {
  static constexpr Store kStore = STORE;
  static constexpr bool kWhole = WHOLE;
};

// Calls run(StoreWay) for rows of `cols` numbers.
template <class F>
void with_store_way(Store store, int64_t cols, const F& run) {
  const bool whole = cols % 32 == 0;
  switch (store) {
    case Store::kReplace:
      return whole ? run(StoreWay<Store::kReplace, true>()) : run(StoreWay<Store::kReplace, false>());
    case Store::kJoin: return whole ? run(StoreWay<Store::kJoin, true>()) : run(StoreWay<Store::kJoin, false>());
    case Store::kPastCaches: return run(StoreWay<Store::kPastCaches, true>());  // never anything but cache lines
  }
}

// dst[0 .. cols) = (lo, hi), or (lo, hi) + old * dst, at most 32 numbers in the order of pack_pairs.
template <class Way>
inline void store_words(reg lo, reg hi, int64_t cols, reg old, BFloat16* dst) {
  const int64_t count = Way::kWhole ? 32 : cols;
  if (Way::kStore == Store::kJoin) {
    const __m512i before = load_words(dst, count), zero = _mm512_setzero_si512();
    lo = V::fma(_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, before)), old, lo);
    hi = V::fma(_mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, before)), old, hi);
  }
  const __m512i words = words_in_order(lo, hi);
  if (Way::kStore == Store::kPastCaches) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), words);
  } else if (count >= 32) {
    _mm512_storeu_si512(dst, words);
  } else {
    _mm512_mask_storeu_epi16(dst, V::first_words(count), words);
  }
}

// What becomes of the forward pass' products: dst[row, c] = fresh[row] * product, or that + keep[row] * dst[row, c].
template <class Way>
struct MeanStore {
  BFloat16* dst;
  int64_t row_step, cols;
  const float* keep;
  const float* fresh;

  void operator()(int64_t row, int64_t c, reg lo, reg hi) const {
    const reg scale = V::set1(fresh[row]);
    store_words<Way>(V::mul(lo, scale), V::mul(hi, scale), cols - c, V::set1(keep[row]), dst + row * row_step + c);
  }
};

// Block of queries of a line: the first, the last, one in between.
struct BlockPosition {
  bool first, last;
};

// A line of a gradient. Where it comes in several blocks of queries, `sums` [rows, cols padded to 32] keeps the fp32
// totals, and dst is written with the last block.
struct GradientLine {
  BFloat16* dst;
  int64_t row_step, cols;
  Store store;
  float* sums;
  BlockPosition at;

  int64_t padded() const { return round_up(cols, 32); }
};

// What becomes of its products: dst[row, c] (+)= product.
template <class Way>
struct GradientStore {
  GradientLine line;

  void operator()(int64_t row, int64_t c, reg lo, reg hi) const {
    if (line.sums != nullptr) {
      float* s = line.sums + row * line.padded() + c;
      if (!line.at.first) {
        lo = V::add(V::load(s), lo);
        hi = V::add(V::load(s + 16), hi);
      }
      if (!line.at.last) {
        V::store(s, lo);
        V::store(s + 16, hi);
        return;
      }
    }
    store_words<Way>(lo, hi, line.cols - c, V::set1(1.0f), line.dst + row * line.row_step + c);
  }
};

// Engine::product_to, to a line of a gradient.
template <class Engine>
void product_to_gradient(int64_t M, int64_t rows, int64_t depth, const BFloat16* a, int64_t lda, const uint32_t* b,
                         int64_t ldb, const DepthEdge& edge, const GradientLine& line, Ahead* ahead) {
  with_store_way(line.store, line.cols, [&](auto way) {
    Engine::product_to(M, rows, line.padded(), depth, a, lda, b, ldb, GradientStore<decltype(way)>{line}, ahead, edge);
  });
}

// How an axis writes a tensor that the axes add up.
Store axis_store(const Grid& grid, const TensorRef& t, int64_t channels, bool first) {
  if (!first) return Store::kJoin;
  return outgrows_caches(grid, t, channels, sizeof(BFloat16)) ? Store::kPastCaches : Store::kReplace;
}
