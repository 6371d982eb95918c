// Products of large fp32 matrices on vector units: the layer's 1x1 projection and its gradients, where PyTorch's library
// is slower, since it leaves half of every vector unused or the processor is not its maker's. Included inside an
// anonymous namespace, after line_kernels.h and matmul_blocks.h.
//
// The micro-kernels of line_kernels.h, on the right operand in panels of a few vectors. A worker takes 96 rows at a time,
// and so many k at once that their part of a panel stays in the first-level cache.

constexpr int64_t kVectorRows = 96;    // of the left operand and of the result, worked on at once
constexpr int64_t kVectorDepth = 128;  // of k

template <class V>
constexpr int64_t kPanelColumns = V::kPanelVectors * V::W;

// The right operand, panel after panel of `depth` rows.
template <class V>
struct Panels {
  float* data;
  int64_t depth;

  float* at(int64_t panel, int64_t k) const { return data + (panel * depth + k) * kPanelColumns<V>; }
};

template <class V>
int64_t panels_of(int64_t columns) {
  return (columns + kPanelColumns<V> - 1) / kPanelColumns<V>;
}

// Rows k to k + depth of one panel.
template <class V>
void pack_panel(const MatrixRef& m, int64_t batch, int64_t k, int64_t depth, int64_t columns, int64_t panel,
                float* to) {
  constexpr int64_t width = kPanelColumns<V>;
  const int64_t column = panel * width, there = smaller(columns - column, width);
  const float* from = element(m, batch, k, column);
  if (m.column == 1) {
    pack_rows<V>(LineView<const float>{from, m.row}, depth, 0, there, to, width);
  } else {
    pack_columns<V>(LineView<const float>{from, m.column}, there, 0, depth, to, width);
  }
}

// Packs runs of k of panels that all workers read.
template <class V>
struct PanelPacker {
  const MatmulArgs* args;
  Panels<V> to;

  int64_t runs() const { return (args->depth + kVectorDepth - 1) / kVectorDepth; }
  int64_t units() const { return panels_of<V>(args->columns) * runs(); }
  void operator()(int64_t unit) const {
    const int64_t panel = unit / runs(), k = unit % runs() * kVectorDepth;
    pack_panel<V>(args->right, 0, k, smaller(args->depth - k, kVectorDepth), args->columns, panel, to.at(panel, k));
  }
};

// Rows of the left operand, over some k.
struct LeftRows {
  const float* data;
  int64_t step;  // between rows, or between columns if they are packed
  bool by_columns;

  const float* at(int64_t row, int64_t k) const { return data + (by_columns ? k * step + row : row * step + k); }
};

// C[rows, columns of a panel] = A B, or C += A B.
template <class V>
void multiply_panel(const LeftRows& left, int64_t rows, int64_t k, int64_t depth, int64_t columns, const float* b,
                    float* c, int64_t ldc, bool add, Ahead* ahead) {
  const int vectors = static_cast<int>((smaller(columns, kPanelColumns<V>) + V::W - 1) / V::W);
  const Store store = add ? Store::kJoin : Store::kReplace;
  const auto run = [&](int64_t row, int, MicroFn<V> fn) {
    fn(depth, left.at(row, k), left.step, b, kPanelColumns<V>, c + row * ldc, ldc, store, nullptr, ahead);
  };
  if (left.by_columns) {
    for_row_blocks<V, kColMajor>(rows, vectors, run);
  } else {
    for_row_blocks<V, kRowMajor>(rows, vectors, run);
  }
}

// Copies so many rows of the left operand, over so many k at once, with rows or columns as they lie in memory.
template <class V>
class LeftCopy {
 public:
  LeftCopy(const MatrixRef& m, int64_t rows, int64_t depth)
      : m_(m),
        by_columns_(m.column != 1),
        ld_(leading<V>(by_columns_ ? rows : depth)),
        size_(ld_ * (by_columns_ ? depth : rows)) {}

  int64_t size() const { return size_; }

  LeftRows operator()(int64_t batch, int64_t row, int64_t rows, int64_t k, int64_t depth, float* to) const {
    const LineView<const float> from{element(m_, batch, row, k), by_columns_ ? m_.column : m_.row};
    pack_rows<V>(from, by_columns_ ? depth : rows, 0, by_columns_ ? rows : depth, to, ld_);
    return {to, ld_, by_columns_};
  }

 private:
  MatrixRef m_;
  bool by_columns_;
  int64_t ld_, size_;
};

// out[b] = left[b] right + bias + added[b].
template <class V>
void vector_matmul(const MatmulArgs& args) {
  constexpr int64_t width = kPanelColumns<V>;
  const int64_t panels = panels_of<V>(args.columns);
  // Rows of the left operand are read where they are if their numbers lie side by side.
  const bool in_place = args.left.column == 1, past_caches = streams(args);
  const LeftCopy<V> copy(args.left, kVectorRows, args.depth);
  Scratch<float> shared(panels * args.depth * width);
  if (!shared.ok()) throw std::bad_alloc();
  const Panels<V> right{shared.take(panels * args.depth * width), args.depth};
  pack_shared(args, PanelPacker<V>{&args, right}, 1);

  run_items(args, RowBlock::count(args, kVectorRows), [&](auto next) {
    Scratch<float> scratch(kVectorRows * width + (in_place ? 0 : copy.size()));
    if (!scratch.ok()) return false;
    float* const results = scratch.take(kVectorRows * width);
    float* const packed = scratch.take(in_place ? 0 : copy.size());
    int64_t item, upcoming;
    for (bool more = next(&item); more; item = upcoming) {
      more = next(&upcoming);
      const RowBlock block(args, item, kVectorRows);
      const LeftRows left =
          in_place ? LeftRows{element(args.left, block.batch, block.row, 0), args.left.row, false}
                   : copy(block.batch, block.row, block.rows, 0, args.depth, packed);
      Ahead ahead;
      if (more) {
        const RowBlock later(args, upcoming, kVectorRows);
        ask_for(&ahead, args.left, later.batch, later.row, later.rows, 0, args.depth);
      }
      ahead.spread(steps<V>(block.rows, (args.columns + V::W - 1) / V::W, args.depth));
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * width;
        for (int64_t k = 0; k < args.depth; k += kVectorDepth) {
          multiply_panel<V>(left, block.rows, k, smaller(args.depth - k, kVectorDepth), args.columns - column,
                            right.at(panel, k), results, width, k > 0, &ahead);
        }
        const BlockTo<V, width> to(args, block, column, results, past_caches);
        for (int64_t unit = 0; unit < to.units(); ++unit) to(unit);
      }
    }
    V::fence();
    return true;
  });
}
