// Copies into channels-last memory. Included inside each translation unit's anonymous namespace (see line_kernels.h).

// Copies one run of positions that are `step` elements apart in the source, a square block at a time. The channels of a
// position are far apart, which no hardware prefetcher follows: the next block is asked for ahead.
template <class V, class S>
void copy_positions(const S* from, int64_t step, int64_t channel, S* to, int64_t row, int64_t count,
                    int64_t channels, bool past_caches) {
  if (step != 1) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < channels; ++c) to[i * row + c] = from[i * step + c * channel];
    }
    return;
  }
  if constexpr (V::kMovesWords && sizeof(S) == 2) {
    // Two bytes are moved as they are; 32 of them are a cache line, which is read once.
    for (int64_t c = 0; c < channels; c += 32) {
      for (int64_t i = 0; i < count; i += 32) {
        const int64_t further = channels - c - 32 < 32 ? channels - c - 32 : 32;
        for (int64_t r = 0; r < further; ++r) CCNET_PREFETCH(from + (c + 32 + r) * channel + i);
        V::transpose_words(from + c * channel + i, channel, channels - c, count - i, to + i * row + c, row);
      }
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += V::W) {
    for (int64_t i = 0; i < count; i += V::W) {
      const int rows = static_cast<int>(count - i < V::W ? count - i : V::W);
      const int64_t further = channels - c - V::W < V::W ? channels - c - V::W : V::W;
      for (int64_t r = 0; r < further; ++r) CCNET_PREFETCH(from + (c + V::W + r) * channel + i);
      typename V::reg t[V::W];
      load_transposed<V>(from + c * channel + i, channel, channels - c, rows, t);
      for (int r = 0; r < rows; ++r) store_some<V>(to + (i + r) * row + c, t[r], channels - c, past_caches);
    }
  }
}

template <class V, class S>
void to_channels_last_typed(const CopyArgs& args) {
  const Grid& grid = args.grid;
  const int last = grid.axes - 1;
  // Where the spatial axes lie one behind the other, an image is one run of positions: no remainder per line.
  bool dense = true;
  for (int a = 0; a < last; ++a) {
    dense = dense && args.from.strides.axis[a] == args.from.strides.axis[a + 1] * grid.size[a + 1];
  }
  const int64_t step = args.from.strides.axis[last], row = args.to.strides.axis[last];
  const int64_t length = dense ? grid.positions() : grid.size[last];
  const bool past_caches = outgrows_caches(grid, args.to, args.channels, sizeof(S));
  const int64_t chunk = length < 128 ? length : 128;
  const int64_t chunks = (length + chunk - 1) / chunk, runs = dense ? grid.batch : grid.lines(last);
  run_items(args, runs * chunks, [&](auto next) {
    for (int64_t item; next(&item);) {
      const int64_t run = item / chunks, begin = item % chunks * chunk;
      const int64_t count = length - begin < chunk ? length - begin : chunk;
      const int64_t from = dense ? run * args.from.strides.batch : line_offset(grid, args.from.strides, last, run);
      const int64_t to = dense ? run * args.to.strides.batch : line_offset(grid, args.to.strides, last, run);
      copy_positions<V, S>(static_cast<const S*>(args.from.data) + from + begin * step, step,
                           args.from.strides.channel, static_cast<S*>(args.to.data) + to + begin * row, row, count,
                           args.channels, past_caches);
    }
    V::fence();
    return true;
  });
}
