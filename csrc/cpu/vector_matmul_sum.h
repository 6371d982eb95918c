// Products of fp32 matrices whose sums are long, on vector units: the gradient of the projection's weight. Included
// inside an anonymous namespace, after vector_matmul.h and matmul_sum.h.

constexpr int64_t kVectorSumChunks = 16;  // of k, after which what was added up one by one joins the sum
constexpr int64_t kVectorSumTiles = 640;  // of 16 x 16 results, worked on at once

// Some k of one image.
struct ChunkOf {
  int64_t batch, k, depth;

  ChunkOf(const MatmulArgs& args, int64_t chunk, int64_t chunks)
      : batch(chunk / chunks), k(chunk % chunks * kVectorDepth), depth(smaller(args.depth - k, kVectorDepth)) {}
};

// out = sum over batches of left[b] right[b], where columns of left and rows of right are long.
template <class V>
void vector_matmul_sum(const MatmulArgs& args) {
  constexpr int64_t width = kPanelColumns<V>;
  const int64_t panels = panels_of<V>(args.columns), ld = panels * width;
  const int64_t chunks = (args.depth + kVectorDepth - 1) / kVectorDepth, total = args.batch * chunks;
  const SumTasks tasks((args.rows + 15) / 16, (args.columns + 15) / 16, total, args.workers, kVectorSumTiles);
  const int64_t part_rows = tasks.part_tiles * 16;
  const Sums<V> sums(args, tasks, total);
  const LeftCopy<V> copy(args.left, part_rows, kVectorDepth);

  run_items(args, sums.tasks(), [&](auto next) {
    Scratch<float> scratch(copy.size() + kVectorDepth * ld + part_rows * ld);
    if (!scratch.ok()) return false;
    float* const packed = scratch.take(copy.size());
    const Panels<V> right{scratch.take(kVectorDepth * ld), kVectorDepth};
    float* const sum = scratch.take(part_rows * ld);
    for (int64_t task; next(&task);) {
      const SumPart part = sums.part(task);
      for (int64_t chunk = part.first; chunk < part.last; ++chunk) {
        const ChunkOf now(args, chunk, chunks);
        const LeftRows left = copy(now.batch, part.row, part.rows, now.k, now.depth, packed);
        for (int64_t panel = 0; panel < panels; ++panel) {
          pack_panel<V>(args.right, now.batch, now.k, now.depth, args.columns, panel, right.at(panel, 0));
        }
        Ahead ahead;
        if (chunk + 1 < part.last) {
          const ChunkOf next_chunk(args, chunk + 1, chunks);
          ask_for(&ahead, args.left, next_chunk.batch, part.row, part.rows, next_chunk.k, next_chunk.depth);
          ask_for(&ahead, args.right, next_chunk.batch, next_chunk.k, next_chunk.depth, 0, args.columns);
        }
        ahead.spread(steps<V>(part.rows, (args.columns + V::W - 1) / V::W, now.depth));
        const int64_t folded = (chunk - part.first) % kVectorSumChunks;
        for (int64_t panel = 0; panel < panels; ++panel) {
          multiply_panel<V>(left, part.rows, 0, now.depth, args.columns - panel * width, right.at(panel, 0),
                            sum + panel * width, ld, folded > 0, &ahead);
        }
        if (folded == kVectorSumChunks - 1 || chunk + 1 == part.last) {
          fold<V>(part.to, part.to_row, sum, ld, part.rows, args.columns, chunk - part.first >= kVectorSumChunks);
        }
      }
    }
    return true;
  });
  sums.join();
}
