// What products of large fp32 matrices share whatever units multiply: how they are divided among the workers, and what
// becomes of the results. Included inside each translation unit's anonymous namespace, after work.h and ahead.h.

inline float* element(const MatrixRef& m, int64_t batch, int64_t row, int64_t column) {
  return static_cast<float*>(m.data) + batch * m.batch + row * m.row + column * m.column;
}

// Asks for rows x columns of a matrix ahead.
inline void ask_for(Ahead* ahead, const MatrixRef& m, int64_t batch, int64_t row, int64_t rows, int64_t column,
                    int64_t columns) {
  const float* first = element(m, batch, row, column);
  if (m.column == 1) {
    ahead->add(first, m.row, rows, columns);
  } else {
    ahead->add(first, m.column, columns, rows);
  }
}

// Rows of one image that a worker takes at a time.
struct RowBlock {
  int64_t batch, row, rows;

  RowBlock(const MatmulArgs& args, int64_t item, int64_t at_once) {
    const int64_t blocks = count(args, at_once) / args.batch;
    batch = item / blocks;
    row = item % blocks * at_once;
    rows = smaller(args.rows - row, at_once);
  }

  static int64_t count(const MatmulArgs& args, int64_t at_once) {
    return args.batch * ((args.rows + at_once - 1) / at_once);
  }
};

// What becomes of a block of results, COLUMNS wide: squares whose rows or columns are vectors, as they lie in memory.
template <class V, int64_t COLUMNS>
class BlockTo {
 public:
  BlockTo() = default;
  BlockTo(const MatmulArgs& args, const RowBlock& rows, int64_t column, const float* block, bool past_caches)
      : args_(&args),
        to_(element(args.out, rows.batch, rows.row, column)),
        added_(args.added.data != nullptr ? element(args.added, rows.batch, rows.row, column) : nullptr),
        bias_(args.bias != nullptr ? args.bias + column : nullptr),
        block_(block),
        rows_(rows.rows),
        columns_(smaller(args.columns - column, COLUMNS)),
        past_caches_(past_caches) {}

  int64_t units() const { return (rows_ + V::W - 1) / V::W * kAcross; }

  void operator()(int64_t unit) const {
    const int64_t r = unit / kAcross * V::W, c = unit % kAcross * V::W;
    const int64_t rows = smaller(rows_ - r, V::W), columns = smaller(columns_ - c, V::W);
    if (columns <= 0) return;
    reg y[V::W];
    CCNET_UNROLL
    for (int i = 0; i < V::W; ++i) y[i] = V::load(block_ + (r + i) * COLUMNS + c);
    if (bias_ != nullptr) {
      const reg bias = load_some<V>(bias_ + c, columns);
      CCNET_UNROLL
      for (int i = 0; i < V::W; ++i) y[i] = V::add(y[i], bias);
    }
    const bool by_rows = args_->out.column == 1;
    if (added_ == nullptr) {
      if (!by_rows) V::transpose(y);
    } else if (args_->added.column == 1) {
      add(y, added_ + r * args_->added.row + c, args_->added.row, rows, columns);
      if (!by_rows) V::transpose(y);
    } else {
      V::transpose(y);
      add(y, added_ + r + c * args_->added.column, args_->added.column, columns, rows);
      if (by_rows) V::transpose(y);
    }
    if (by_rows) {
      put(y, to_ + r * args_->out.row + c, args_->out.row, rows, columns);
    } else {
      put(y, to_ + r + c * args_->out.column, args_->out.column, columns, rows);
    }
  }

 private:
  using reg = typename V::reg;
  static constexpr int64_t kAcross = COLUMNS / V::W;

  static void add(reg* y, const float* from, int64_t step, int64_t count, int64_t n) {
    CCNET_UNROLL
    for (int i = 0; i < V::W; ++i) {
      if (i < count) y[i] = V::add(y[i], load_some<V>(from + i * step, n));
    }
  }

  void put(const reg* y, float* to, int64_t step, int64_t count, int64_t n) const {
    CCNET_UNROLL
    for (int i = 0; i < V::W; ++i) {
      if (i >= count) return;
      if (past_caches_) {
        V::stream(to + i * step, y[i]);
      } else {
        store_some<V>(to + i * step, y[i], n);
      }
    }
  }

  const MatmulArgs* args_ = nullptr;
  float* to_ = nullptr;
  const float* added_ = nullptr;
  const float* bias_ = nullptr;
  const float* block_ = nullptr;
  int64_t rows_ = 0, columns_ = 0;
  bool past_caches_ = false;
};

// Whether the result should be written past the caches.
inline bool streams(const MatmulArgs& args) {
  const int64_t bytes = args.batch * args.rows * args.columns * 4;
  const int64_t steps = (args.out.row | args.out.batch | args.columns) * 4;
  return args.out.column == 1 && outgrows_caches(args.out.data, bytes, steps);
}

// Packs what all workers read, units of it by turns.
template <class Packer>
void pack_shared(const MatmulArgs& args, const Packer& packer, int64_t at_once) {
  const int64_t units = packer.units();
  run_items(args, (units + at_once - 1) / at_once, [&](auto next) {
    for (int64_t item; next(&item);) {
      const int64_t last = smaller((item + 1) * at_once, units);
      for (int64_t unit = item * at_once; unit < last; ++unit) packer(unit);
    }
    return true;
  });
}
