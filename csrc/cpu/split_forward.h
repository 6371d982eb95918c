// The forward pass of one axis on matrix units that multiply bf16. Included inside an anonymous namespace (see
// line_kernels_split.h).

constexpr int64_t kForwardPanel = 64;  // channels worked on at once

// Weights of up to 16 queries from their energies s[i, j]: exp(s - max_i), in place and as a left operand (k = j), with
// the maxima and the sums. Columns up to the next multiple of 32 become zero.
void softmax_rows(float* s, int64_t ld, int64_t rows, int64_t length, const TileMatrix& to, int64_t tile, float* max,
                  float* sum, Ahead* ahead) {
  reg lanes[16];
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * ld;
    const reg lowest = V::set1(-INFINITY);
    if (length % V::W != 0) {
      float* last = row + length / V::W * V::W;
      V::store(last, _mm512_mask_mov_ps(lowest, V::first(static_cast<int>(length % V::W)), V::load(last)));
    }
    for (int64_t j = round_up(length, V::W); j < round_up(length, kStep); j += V::W) V::store(row + j, lowest);
    reg most = V::load(row);
    for (int64_t j = V::W; j < length; j += V::W) most = V::max(most, V::load(row + j));
    lanes[r] = most;
  }
  for (int64_t r = rows; r < 16; ++r) lanes[r] = V::zero();
  V::transpose(lanes);
  for (int r = 1; r < 16; ++r) lanes[0] = V::max(lanes[0], lanes[r]);
  V::store(max, lanes[0]);
  for (int64_t r = 0; r < rows; ++r) {
    ahead->ask();
    float* row = s + r * ld;
    const reg most = V::set1(max[r]);
    reg s0 = V::zero(), s1 = V::zero();
    for (int64_t j = 0; j < length; j += kStep) {
      const reg a = V::exp(V::sub(V::load(row + j), most)), b = V::exp(V::sub(V::load(row + j + 16), most));
      V::store(row + j, a);
      V::store(row + j + 16, b);
      if (j / kStep < to.steps) split(a, b, to.at(tile, j / kStep) + r * kTileRow);
      s0 = V::add(s0, a);
      s1 = V::add(s1, b);
    }
    lanes[r] = V::add(s0, s1);
  }
  for (int64_t r = rows; r < 16; ++r) lanes[r] = V::zero();
  V::transpose(lanes);
  for (int r = 1; r < 16; ++r) lanes[0] = V::add(lanes[0], lanes[r]);
  V::store(sum, lanes[0]);
}

template <class S>
void split_forward_axis(const ForwardArgs& args, int axis, bool first, bool last) {
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = queries_at_once(L), blocks = (L + block - 1) / block;
  const int64_t key_edge = edge_of(L), keys = L - key_edge;
  const int64_t ld = leading<V>(round_up(L, kStep)), b16 = round_up(block, kTile);
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const int64_t stat_row = stat.axis[axis];
  const Store store = axis_store<V, S>(grid, args.out, C, first);
  const int64_t panel_tiles = kForwardPanel / kTile;

  run_items(args, grid.lines(axis) * blocks, [&](auto next) {
    Scratch<float> scratch(tile_floats(tiles(L) + tiles(block), depth(QK)) + b16 * ld +
                           tile_floats(tiles(block) + 2 * panel_tiles, depth(keys)) + 4 * b16 +
                           round_up(C, kForwardPanel));
    if (!scratch.ok()) return false;
    const TileMatrix k_right = take_tiles(&scratch, tiles(L), depth(QK));
    const TileMatrix q_left = take_tiles(&scratch, tiles(block), depth(QK));
    float* s = scratch.take(b16 * ld);  // energies, then weights [i, j]
    const TileMatrix p_left = take_tiles(&scratch, tiles(block), depth(keys));
    const TileMatrix v_right[2] = {take_tiles(&scratch, panel_tiles, depth(keys)),
                                   take_tiles(&scratch, panel_tiles, depth(keys))};
    float* keep = scratch.take(b16);
    float* fresh = scratch.take(b16);
    float* before_max = scratch.take(b16);
    float* before_sum = scratch.take(b16);
    float* edge_row = scratch.take(round_up(C, kForwardPanel));
    [[maybe_unused]] const Tiles session;
    int64_t packed_line = -1;

    int64_t item, upcoming;
    for (bool more = next(&item); more; item = upcoming) {
      more = next(&upcoming);
      const int64_t line = item / blocks, i0 = item % blocks * block;
      const int64_t rows = L - i0 < block ? L - i0 : block;
      const int64_t query_edge = edge_of(rows), queries = rows - query_edge;
      const ForwardViews<S> views(args, axis, line, i0);
      const auto &q = views.query, &k = views.key, &v = views.value;
      const auto& o = views.out;
      const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat_row;
      float* max_out = static_cast<float*>(args.max) + stat0;
      float* sum_out = static_cast<float*>(args.lse) + stat0;

      const auto panel_at = [C](int64_t c) { return C - c < kForwardPanel ? C - c : kForwardPanel; };
      Background background;
      Ahead& asking = background.ahead;
      asking.add(v.data, v.row, L, panel_at(0) + panel_at(kForwardPanel));  // the second one is packed beside the first
      if (store != Store::kPastCaches) asking.add(o.data, o.row, rows, panel_at(0));
      const TransposedPacker<S> pack_keys(k.data, k.row, L, QK, k_right);
      const LeftPacker<S> pack_queries(q.data, q.row, rows, QK, q_left);
      background.spread((packed_line != line ? pack_keys.units() : 0) + pack_queries.units() +
                        multiply_steps(tiles(rows), tiles(L), k_right.steps) + rows);
      if (packed_line != line) {
        pack(pack_keys, &asking);
        packed_line = line;
      }
      pack(pack_queries, &asking);
      multiply(tiles(rows), tiles(L), q_left, k_right, s, ld, false, &background);
      if (masked) {
        for (int64_t i = 0; i < rows; ++i) s[i * ld + i0 + i] = -INFINITY;
      }
      for (int64_t i = 0; i < rows; i += kTile) {
        softmax_rows(s + i * ld, ld, rows - i < kTile ? rows - i : kTile, L, p_left, i / kTile, keep + i, fresh + i,
                     &asking);
      }
      merge_rows<V>(rows, first, last, max_out, sum_out, stat_row, keep, fresh, before_max, before_sum);
      background.finish();

      RowsTo<S> to{o.data, o.row, C, store};
      to.fresh = fresh;
      to.keep = keep;
      if (key_edge > 0) to.add(v.data + keys * v.row, s + keys, ld);
      FinishedProduct<S> product(to);
      const auto packer_of = [&](int64_t c, int which) {
        FromRows<S> from;
        if (query_edge > 0) {
          from.weights = s + queries * ld;
          from.weighted = edge_row + c;
        }
        return RightPacker<S>(v.data + c, v.row, keys, key_edge, panel_at(c), v_right[which], from);
      };
      int which = 0;
      pack(packer_of(0, which), &asking);
      for (int64_t c = 0; c < C; c += kForwardPanel) {
        const int64_t cols = panel_at(c), next_c = c + kForwardPanel, ahead_c = next_c + kForwardPanel;
        RightPacker<S> packer;
        if (next_c < C) {
          packer = packer_of(next_c, which ^ 1);
          background.add(&packer);
        }
        asking.add(v.data + ahead_c, v.row, L, panel_at(ahead_c));
        if (store != Store::kPastCaches) asking.add(o.data + next_c, o.row, rows, panel_at(next_c));
        if (next_c >= C && more) {
          const int64_t next_line = upcoming / blocks, next_i0 = upcoming % blocks * block;
          const auto next_q = line_view<const S>(args.query, grid, axis, next_line);
          asking.add(next_q.data + next_i0 * next_q.row, next_q.row, L - next_i0 < block ? L - next_i0 : block, QK);
          if (next_line != line) asking.add(line_data<const S>(args.key, grid, axis, next_line), k.row, L, QK);
        }
        background.spread(multiply_steps(tiles(queries), tiles(cols), p_left.steps));
        product.run(queries, c, tiles(cols), p_left, v_right[which], &background);
        background.finish();
        which ^= 1;
      }
      if (query_edge > 0) to.put_row(queries, edge_row);
    }
    V::fence();
    return true;
  });
}
