// Products of operands that split_operands.h packed. Included inside an anonymous namespace, after tiles.h, background.h
// and split_operands.h (see line_kernels_split.h).

constexpr int64_t kProducts = 6;  // of parts, for each product of tiles

// C[16 * MT, 16 * NT] = A B, or C += A B, over so many steps; the operands' tiles have `row` of them.
template <int MT, int NT>
void multiply_tiles(int64_t steps, const BFloat16* a, const BFloat16* b, float* c, int64_t ldc, bool add,
                    Background* background, int64_t row) {
  const int64_t next = row * kTriple;
  constexpr int64_t kRow = kTileRow * 2;  // bytes
  if (add) {
    const int64_t stride = ldc * static_cast<int64_t>(sizeof(float));
    _tile_loadd(0, c, stride);
    if (NT > 1) _tile_loadd(1, c + kTile, stride);
    if (MT > 1) _tile_loadd(2, c + kTile * ldc, stride);
    if (MT > 1 && NT > 1) _tile_loadd(3, c + kTile * ldc + kTile, stride);
  } else {
    zero_block<MT, NT>();
  }
  const auto load_a = [&](int64_t part) CCNET_INLINE {
    _tile_loadd(4, a + part * kStep, kRow);
    if (MT > 1) _tile_loadd(5, a + next + part * kStep, kRow);
  };
  const auto load_b = [&](int64_t part) CCNET_INLINE {
    _tile_loadd(6, b + part * kStep, kRow);
    if (NT > 1) _tile_loadd(7, b + next + part * kStep, kRow);
  };
  const auto multiply = [&]() CCNET_INLINE {
    _tile_dpbf16ps(0, 4, 6);
    if (NT > 1) _tile_dpbf16ps(1, 4, 7);
    if (MT > 1) _tile_dpbf16ps(2, 5, 6);
    if (MT > 1 && NT > 1) _tile_dpbf16ps(3, 5, 7);
    background->step();
  };
  for (int64_t s = 0; s < steps; ++s) {
    // One operand changes at a time.
    load_a(0);
    load_b(2);
    multiply();
    load_b(0);
    multiply();
    load_b(1);
    multiply();
    load_a(1);
    multiply();
    load_b(0);
    multiply();
    load_a(2);
    multiply();
    a += kTriple;
    b += kTriple;
  }
  store_block<MT, NT>(c, ldc);
}

inline void multiply_block(bool tall, bool wide, int64_t steps, const BFloat16* a, const BFloat16* b, float* c,
                           int64_t ldc, bool add, Background* background, int64_t row) {
  const auto run = tall ? (wide ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                        : (wide ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
  run(steps, a, b, c, ldc, add, background, row);
}

// C = A B, or C += A B, of so many tiles.
void multiply(int64_t m_tiles, int64_t n_tiles, const TileMatrix& a, const TileMatrix& b, float* c, int64_t ldc,
              bool add, Background* background) {
  for (int64_t n = 0; n < n_tiles; n += 2) {
    for (int64_t m = 0; m < m_tiles; m += 2) {
      multiply_block(m + 1 < m_tiles, n + 1 < n_tiles, a.steps, a.at(m, 0), b.at(n, 0),
                     c + m * kTile * ldc + n * kTile, ldc, add, background, a.steps);
    }
  }
}

// Steps of the background in such a product.
inline int64_t multiply_steps(int64_t m_tiles, int64_t n_tiles, int64_t steps) {
  return (m_tiles + 1) / 2 * ((n_tiles + 1) / 2) * steps * kProducts;
}

// What becomes of a product's rows: dst = x, or keep * dst + x, for x = fresh * (product + weight * edge).
template <class S>
struct RowsTo {
  S* dst;
  int64_t row, cols;
  Store store;
  const S* edge = nullptr;         // where there is one
  const float* weights = nullptr;  // of the edge, `step` apart
  int64_t step = 0;
  const float* fresh = nullptr;  // forward pass
  const float* keep = nullptr;

  // Row r, from column c on: two vectors, or `here` numbers of them.
  template <Store STORE, bool EDGE, bool SCALED>
  void put(int64_t r, int64_t c, const float* product, int64_t here) const {
    const reg weight = EDGE ? V::set1(weights[r * step]) : V::zero();
    const reg scale = V::set1(SCALED ? fresh[r] : 1.0f), old = V::set1(SCALED ? keep[r] : 1.0f);
    S* to = dst + r * row + c;
    CCNET_UNROLL
    for (int x = 0; x < 2 * V::W; x += V::W) {
      if (here <= x) break;
      reg y = V::load(product + x);
      if (EDGE) y = V::fma(weight, load_some<V>(edge + c + x, here - x), y);
      if (SCALED) y = V::mul(y, scale);
      if (STORE == Store::kJoin) y = V::fma(load_some<V>(to + x, here - x), old, y);
      if constexpr (STORE == Store::kPastCaches) {
        V::stream(reinterpret_cast<float*>(to + x), y);
      } else {
        store_some<V>(to + x, y, here - x);
      }
    }
  }

  template <Store STORE, bool EDGE, bool SCALED>
  void put_rows(int64_t first, int64_t last, int64_t c, const float* product) const {
    const int64_t here = cols - c;
    if (here >= 2 * V::W) {
      for (int64_t r = first; r < last; ++r, product += 2 * V::W) put<STORE, EDGE, SCALED>(r, c, product, 2 * V::W);
    } else {
      for (int64_t r = first; r < last; ++r, product += 2 * V::W) put<STORE, EDGE, SCALED>(r, c, product, here);
    }
  }

  // Adds weight[r] * values to row r.
  void add(const S* values, const float* weight, int64_t between) {
    edge = values;
    weights = weight;
    step = between;
  }

  // Row r alone, to which nothing is added: `product` has room for whole pairs of vectors.
  void put_row(int64_t r, const float* product) {
    edge = nullptr;
    const Put run = best();
    for (int64_t c = 0; c < cols; c += 2 * V::W) (this->*run)(r, r + 1, c, product + c);
  }

  using Put = void (RowsTo::*)(int64_t, int64_t, int64_t, const float*) const;

  Put best() const {
    const bool scaled = fresh != nullptr;
    return edge != nullptr ? (scaled ? stored<true, true>() : stored<true, false>())
                           : (scaled ? stored<false, true>() : stored<false, false>());
  }

 private:
  template <bool EDGE, bool SCALED>
  Put stored() const {
    return store == Store::kJoin         ? &RowsTo::put_rows<Store::kJoin, EDGE, SCALED>
           : store == Store::kPastCaches ? &RowsTo::put_rows<Store::kPastCaches, EDGE, SCALED>
                                         : &RowsTo::put_rows<Store::kReplace, EDGE, SCALED>;
  }
};

// A product whose rows are handed on while the next block of it is computed; those of the last block, when the
// background is finished.
template <class S>
class FinishedProduct {
 public:
  explicit FinishedProduct(const RowsTo<S>& to) : to_(to), put_(to.best()) {}

  // Columns from `column` on.
  void run(int64_t rows, int64_t column, int64_t n_tiles, const TileMatrix& a, const TileMatrix& b,
           Background* background) {
    for (int64_t n = 0; n < n_tiles; n += 2) {
      for (int64_t m = 0; m < rows; m += 2 * kTile) {
        float* block = blocks_[which_];
        multiply_block(m + kTile < rows, n + 1 < n_tiles, a.steps, a.at(m / kTile, 0), b.at(n, 0), block, 2 * kTile,
                       false, background, a.steps);
        background->finish_rows();
        row_ = m;
        rows_ = rows - m < 2 * kTile ? rows - m : 2 * kTile;
        column_ = column + n * kTile;
        done_ = block;
        which_ ^= 1;
        background->hand_on(this, (rows_ + kRowsAtOnce - 1) / kRowsAtOnce, a.steps * kProducts);
      }
    }
  }

  void operator()(int64_t unit) const {
    const int64_t first = unit * kRowsAtOnce, last = rows_ - first < kRowsAtOnce ? rows_ : first + kRowsAtOnce;
    (to_.*put_)(row_ + first, row_ + last, column_, done_ + first * 2 * kTile);
  }

 private:
  static constexpr int64_t kRowsAtOnce = 2;
  alignas(64) float blocks_[2][2 * kTile * 2 * kTile];
  const RowsTo<S> to_;
  const typename RowsTo<S>::Put put_;
  const float* done_ = nullptr;
  int64_t row_ = 0, rows_ = 0, column_ = 0;
  int which_ = 0;
};
