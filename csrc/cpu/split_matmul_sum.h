// Products of fp32 matrices whose sums are long, on matrix units: the gradient of the projection's weight. Included
// inside an anonymous namespace, after split_matmul.h and matmul_sum.h (see line_kernels_split.h).
//
// A worker takes some rows of the result, over a run of k. While it multiplies 64 k, its vector units split the next.

constexpr int64_t kSumDepth = 64;   // k at once
constexpr int64_t kSumChunks = 32;  // of so many k, after which what was added up one by one joins the sum
constexpr int64_t kSumTiles = 640;  // of the result, worked on at once

// out = sum over batches of left[b] right[b], where columns of left and rows of right are long.
void split_matmul_sum(const MatmulArgs& args) {
  constexpr int64_t steps = kSumDepth / kStep;
  const int64_t m_tiles = tiles(args.rows), n_tiles = tiles(args.columns), ld = n_tiles * kTile;
  const int64_t chunks = (args.depth + kSumDepth - 1) / kSumDepth, total = args.batch * chunks;
  const SumTasks tasks(m_tiles, n_tiles, total, args.workers, kSumTiles);
  const Sums<V> sums(args, tasks, total);

  run_items(args, sums.tasks(), [&](auto next) {
    Scratch<float> scratch(2 * tile_floats(tasks.part_tiles + n_tiles, steps) + tasks.part_tiles * kTile * ld);
    if (!scratch.ok()) return false;
    const TileMatrix left[2] = {take_tiles(&scratch, tasks.part_tiles, steps),
                                take_tiles(&scratch, tasks.part_tiles, steps)};
    const TileMatrix right[2] = {take_tiles(&scratch, n_tiles, steps), take_tiles(&scratch, n_tiles, steps)};
    float* const sum = scratch.take(tasks.part_tiles * kTile * ld);
    [[maybe_unused]] const Tiles session;
    for (int64_t task; next(&task);) {
      const SumPart part = sums.part(task);
      const auto depth_of = [&](int64_t chunk) {
        return smaller(args.depth - chunk % chunks * kSumDepth, kSumDepth);
      };
      const auto left_of = [&](int64_t chunk, int which) {
        return left_packer(args.left, chunk / chunks, part.row, part.rows, chunk % chunks * kSumDepth, depth_of(chunk),
                           left[which]);
      };
      const auto right_of = [&](int64_t chunk, int which) {
        return right_packer(args.right, chunk / chunks, chunk % chunks * kSumDepth, depth_of(chunk), args.columns,
                            right[which]);
      };
      Background background;
      LeftEither pack_left;
      RightEither pack_right;
      pack(left_of(part.first, 0), &background.ahead);
      pack(right_of(part.first, 0), &background.ahead);
      int which = 0;
      for (int64_t chunk = part.first; chunk < part.last; ++chunk, which ^= 1) {
        if (chunk + 1 < part.last) {
          pack_left = left_of(chunk + 1, which ^ 1);
          pack_right = right_of(chunk + 1, which ^ 1);
          background.add(&pack_left);
          background.add(&pack_right);
        }
        if (chunk + 2 < part.last) {
          const int64_t later = chunk + 2, k = later % chunks * kSumDepth;
          ask_for(&background.ahead, args.left, later / chunks, part.row, part.rows, k, depth_of(later));
          ask_for(&background.ahead, args.right, later / chunks, k, depth_of(later), 0, args.columns);
        }
        background.spread(multiply_steps(tiles(part.rows), n_tiles, steps));
        const int64_t folded = (chunk - part.first) % kSumChunks;
        multiply(tiles(part.rows), n_tiles, left[which], right[which], sum, ld, folded > 0, &background);
        background.finish();
        if (folded == kSumChunks - 1 || chunk + 1 == part.last) {
          fold<V>(part.to, part.to_row, sum, ld, part.rows, args.columns, chunk - part.first >= kSumChunks);
        }
      }
    }
    return true;
  });
  sums.join();
}
