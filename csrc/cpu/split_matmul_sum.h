// Products of fp32 matrices whose sums are long, on matrix units: the gradient of the projection's weight. Included
// inside an anonymous namespace, after split_matmul.h (see line_kernels_split.h).
//
// A worker takes some rows of the result, over a run of k. While it multiplies 64 k, its vector units split the next.

constexpr int64_t kSumDepth = 64;   // k at once
constexpr int64_t kSumChunks = 32;  // of so many k, after which what was added up one by one joins the sum
constexpr int64_t kSumTiles = 640;  // of the result, worked on at once

// How a sum over long columns is divided: into parts of the result's rows, and runs of k whose sums are added up.
struct SumTasks {
  int64_t parts, part_tiles, runs;

  SumTasks(int64_t m_tiles, int64_t n_tiles, int64_t chunks, int64_t workers)
      : parts(1), part_tiles(m_tiles), runs(1) {
    // No part larger than fits the second-level cache beside its operands; of the others, the division that leaves the
    // fewest workers idle. The right operand is packed again for every part.
    const int64_t least = (m_tiles * n_tiles + kSumTiles - 1) / kSumTiles, most = (m_tiles + 7) / 8;
    double best = 0;
    for (int64_t p = least; p <= most || p == least; ++p) {
      const int64_t r = smaller((workers + p - 1) / p, chunks), rounds = (p * r + workers - 1) / workers;
      const double busy = static_cast<double>(p * r) / static_cast<double>(rounds * workers);
      if (busy <= best) continue;
      best = busy;
      part_tiles = ((m_tiles + p - 1) / p + 1) / 2 * 2;
      parts = (m_tiles + part_tiles - 1) / part_tiles;
      runs = r;
    }
  }
};

// to = from, or to += from: whole tiles of `from`, of which `columns` are there in `to`.
void fold(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t columns, bool add) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += V::W) {
      reg y = V::load(from + r * from_row + c);
      if (add) y = V::add(y, load_some<V>(to + r * to_row + c, columns - c));
      store_some<V>(to + r * to_row + c, y, columns - c);
    }
  }
}

// out = sum over batches of left[b] right[b], where columns of left and rows of right are long.
void split_matmul_sum(const MatmulArgs& args) {
  constexpr int64_t steps = kSumDepth / kStep;
  const int64_t m_tiles = tiles(args.rows), n_tiles = tiles(args.columns), ld = n_tiles * kTile;
  const int64_t chunks = (args.depth + kSumDepth - 1) / kSumDepth, total = args.batch * chunks;
  const SumTasks tasks(m_tiles, n_tiles, total, args.workers);
  float* const out = static_cast<float*>(args.out.data);
  // Of the runs but the first.
  Scratch<float> shared((tasks.runs - 1) * args.rows * ld);
  if (!shared.ok()) throw std::bad_alloc();
  float* const others = shared.take((tasks.runs - 1) * args.rows * ld);

  run_items(args, tasks.parts * tasks.runs, [&](auto next) {
    Scratch<float> scratch(2 * tile_floats(tasks.part_tiles + n_tiles, steps) + tasks.part_tiles * kTile * ld);
    if (!scratch.ok()) return false;
    const TileMatrix left[2] = {take_tiles(&scratch, tasks.part_tiles, steps),
                                take_tiles(&scratch, tasks.part_tiles, steps)};
    const TileMatrix right[2] = {take_tiles(&scratch, n_tiles, steps), take_tiles(&scratch, n_tiles, steps)};
    float* const sum = scratch.take(tasks.part_tiles * kTile * ld);
    [[maybe_unused]] const Tiles session;
    for (int64_t task; next(&task);) {
      const int64_t run = task / tasks.parts, row = task % tasks.parts * tasks.part_tiles * kTile;
      const int64_t rows = smaller(args.rows - row, tasks.part_tiles * kTile);
      float* const to = run == 0 ? out + row * args.out.row : others + ((run - 1) * args.rows + row) * ld;
      const int64_t to_row = run == 0 ? args.out.row : ld;
      const int64_t first = total * run / tasks.runs, last = total * (run + 1) / tasks.runs;
      const auto depth_of = [&](int64_t chunk) {
        return smaller(args.depth - chunk % chunks * kSumDepth, kSumDepth);
      };
      const auto left_of = [&](int64_t chunk, int which) {
        return left_packer(args.left, chunk / chunks, row, rows, chunk % chunks * kSumDepth, depth_of(chunk),
                           left[which]);
      };
      const auto right_of = [&](int64_t chunk, int which) {
        return right_packer(args.right, chunk / chunks, chunk % chunks * kSumDepth, depth_of(chunk), args.columns,
                            right[which]);
      };
      Background background;
      LeftEither pack_left;
      RightEither pack_right;
      pack(left_of(first, 0), &background.ahead);
      pack(right_of(first, 0), &background.ahead);
      int which = 0;
      for (int64_t chunk = first; chunk < last; ++chunk, which ^= 1) {
        if (chunk + 1 < last) {
          pack_left = left_of(chunk + 1, which ^ 1);
          pack_right = right_of(chunk + 1, which ^ 1);
          background.add(&pack_left);
          background.add(&pack_right);
        }
        if (chunk + 2 < last) {
          const int64_t later = chunk + 2, k = later % chunks * kSumDepth;
          ask_for(&background.ahead, args.left, later / chunks, row, rows, k, depth_of(later));
          ask_for(&background.ahead, args.right, later / chunks, k, depth_of(later), 0, args.columns);
        }
        background.spread(multiply_steps(tiles(rows), n_tiles, steps));
        const int64_t folded = (chunk - first) % kSumChunks;
        multiply(tiles(rows), n_tiles, left[which], right[which], sum, ld, folded > 0, &background);
        background.finish();
        if (folded == kSumChunks - 1 || chunk + 1 == last) {
          fold(to, to_row, sum, ld, rows, args.columns, chunk - first >= kSumChunks);
        }
      }
    }
    return true;
  });

  if (tasks.runs == 1) return;
  run_items(args, args.rows, [&](auto next) {
    for (int64_t r; next(&r);) {
      for (int64_t run = 1; run < tasks.runs; ++run) {
        fold(out + r * args.out.row, 0, others + ((run - 1) * args.rows + r) * ld, 0, 1, args.columns, true);
      }
    }
    return true;
  });
}
