// Products of large fp32 matrices on matrix units that multiply bf16: the layer's 1x1 projection and its gradients.
// Included inside an anonymous namespace, after split_products.h (see line_kernels_split.h).
//
// A worker takes 128 rows at a time. While it multiplies them, block after block of 32 columns, its vector units split
// the next rows and hand on the results of the block before.

constexpr int64_t kMatmulRows = 128;    // of the left operand and of the result, worked on at once
constexpr int64_t kMatmulColumns = 32;  // of the result
constexpr int64_t kMatmulSteps = 4;     // of k: a block's operands of so many stay in the first-level cache

// A packer for either layout of an operand in memory.
template <class Rows, class Columns>
class EitherPacker {
 public:
  EitherPacker() = default;
  EitherPacker(bool rows, const Rows& of_rows, const Columns& of_columns)
      : of_rows_(of_rows), of_columns_(of_columns), rows_(rows) {}

  int64_t units() const { return rows_ ? of_rows_.units() : of_columns_.units(); }
  void operator()(int64_t unit) const { rows_ ? of_rows_(unit) : of_columns_(unit); }

 private:
  Rows of_rows_;
  Columns of_columns_;
  bool rows_ = true;
};

using LeftEither = EitherPacker<LeftPacker<float>, LeftTransposedPacker>;
using ResultTo = BlockTo<V, kMatmulColumns>;
using RightEither = EitherPacker<RightPacker<float>, TransposedPacker<float>>;

LeftEither left_packer(const MatrixRef& m, int64_t batch, int64_t row, int64_t rows, int64_t k, int64_t depth,
                       const TileMatrix& to) {
  const float* src = element(m, batch, row, k);
  return {m.column == 1, LeftPacker<float>(src, m.row, rows, depth, to),
          LeftTransposedPacker(src, m.column, depth, rows, to)};
}

RightEither right_packer(const MatrixRef& m, int64_t batch, int64_t k, int64_t depth, int64_t columns,
                         const TileMatrix& to) {
  const float* src = element(m, batch, k, 0);
  return {m.column == 1, RightPacker<float>(src, m.row, depth, 0, columns, to),
          TransposedPacker<float>(src, m.column, columns, depth, to)};
}

// What is asked for while the 32 columns from tile n on of a block are computed: the next columns' operand and what
// they are added to, and a share of the rows that are packed beside the next block (`later`, where there is one).
Ahead ahead_of_columns(const MatmulArgs& args, const TileMatrix& right, int64_t n, const RowBlock& block,
                       const RowBlock* later, bool past_caches) {
  const int64_t n_tiles = tiles(args.columns), next = n + 2 < n_tiles ? n + 2 : 0, column = next * kTile;
  Ahead ahead;
  ahead.add(right.at(next, 0), 0, 1, smaller(n_tiles - next, 2) * right.steps * kTriple);
  if (next > 0) {
    const int64_t columns = smaller(args.columns - column, kMatmulColumns);
    for (const MatrixRef* m : {&args.added, &args.out}) {
      if (m->data == nullptr || (m == &args.out && past_caches)) continue;
      ask_for(&ahead, *m, block.batch, block.row, block.rows, column, columns);
    }
  }
  if (later != nullptr) {
    const int64_t panels = (n_tiles + 1) / 2, share = (args.depth + panels - 1) / panels, k = n / 2 * share;
    ask_for(&ahead, args.left, later->batch, later->row, later->rows, k, smaller(args.depth - k, share));
  }
  return ahead;
}

// out[b] = left[b] right + bias + added[b].
void split_matmul(const MatmulArgs& args) {
  const int64_t steps = depth(args.depth), n_tiles = tiles(args.columns);
  const int64_t row_tiles = tiles(smaller(args.rows, kMatmulRows)), result_size = row_tiles * kTile * kMatmulColumns;
  const bool past_caches = streams(args);
  Scratch<float> shared(tile_floats(n_tiles, steps));
  if (!shared.ok()) throw std::bad_alloc();
  const TileMatrix right = take_tiles(&shared, n_tiles, steps);
  pack_shared(args, right_packer(args.right, 0, 0, args.depth, args.columns, right), 64);

  run_items(args, RowBlock::count(args, kMatmulRows), [&](auto next) {
    Scratch<float> scratch(2 * tile_floats(row_tiles, steps) + 2 * result_size);
    if (!scratch.ok()) return false;
    const TileMatrix left[2] = {take_tiles(&scratch, row_tiles, steps), take_tiles(&scratch, row_tiles, steps)};
    float* const results[2] = {scratch.take(result_size), scratch.take(result_size)};
    [[maybe_unused]] const Tiles session;
    const auto packer_of = [&](int64_t item, int which) {
      const RowBlock block(args, item, kMatmulRows);
      return left_packer(args.left, block.batch, block.row, block.rows, 0, args.depth, left[which]);
    };
    Background background;
    LeftEither packer;
    ResultTo done[2];
    int which = 0, half = 0;
    int64_t item, upcoming = 0, later = 0;
    if (!next(&item)) return true;
    pack(packer_of(item, which), &background.ahead);
    for (bool more = next(&upcoming), still = false;; which ^= 1, item = upcoming, upcoming = later, more = still) {
      still = more && next(&later);
      const RowBlock block(args, item, kMatmulRows), block_later(args, later, kMatmulRows);
      const int64_t m_tiles = tiles(block.rows), panel_steps = multiply_steps(m_tiles, 2, steps);
      if (more) {
        packer = packer_of(upcoming, which ^ 1);
        background.add(&packer);
      }
      background.spread((n_tiles + 1) / 2 * panel_steps);
      for (int64_t n = 0; n < n_tiles; n += 2, half ^= 1) {
        background.ahead = ahead_of_columns(args, right, n, block, still ? &block_later : nullptr, past_caches);
        background.ahead.spread(panel_steps);
        for (int64_t s = 0; s < steps; s += kMatmulSteps) {
          for (int64_t m = 0; m < m_tiles; m += 2) {
            multiply_block(m + 1 < m_tiles, n + 1 < n_tiles, smaller(steps - s, kMatmulSteps), left[which].at(m, s),
                           right.at(n, s), results[half] + m * kTile * kMatmulColumns, kMatmulColumns, s > 0,
                           &background, steps);
          }
        }
        background.finish_rows();
        done[half] = ResultTo(args, block, n * kTile, results[half], past_caches);
        background.hand_on(&done[half], done[half].units(), panel_steps);
      }
      background.finish();
      if (!more) break;
    }
    V::fence();
    return true;
  });
}
