// The backward pass of one axis on matrix units that multiply bf16. Included inside an anonymous namespace (see
// line_kernels_split.h).

constexpr int64_t kBackwardPanel = 128;  // channels worked on at once

template <class S>
void split_backward_axis(const BackwardArgs& args, int axis, bool first) {
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = queries_at_once(L);
  const int64_t key_edge = edge_of(L), keys = L - key_edge;
  const int64_t l32 = round_up(L, kStep), b32 = round_up(block, kStep), ld = leading<V>(b32);
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const int64_t stat_row = stat.axis[axis];
  const int64_t panel_tiles = kBackwardPanel / kTile;
  const int64_t edge_floats = round_up(C, kBackwardPanel) + 2 * round_up(QK, kStep);
  // Blocks of queries after the first add to a line that should still be at hand.
  const Store query_store = narrow_store(args, first);
  const Store value_store = block < L && first ? Store::kReplace : axis_store<V, S>(grid, args.grad_value, C, first);

  const bool sum = sums_delta(args, first);
  run_items(args, grid.lines(axis), [&](auto next) {
    Scratch<float> scratch(tile_floats(tiles(L) + tiles(block), depth(QK)) +
                           tile_floats(tiles(QK), depth(L) + depth(block)) + 2 * l32 * ld +
                           tile_floats(2 * tiles(L), depth(block)) + tile_floats(tiles(block), depth(L)) +
                           tile_floats(tiles(L) + tiles(block), depth(kBackwardPanel)) +
                           tile_floats(panel_tiles, depth(block)) + (2 + 2 * V::W) * b32 + V::W * l32 + l32 +
                           edge_floats);
    if (!scratch.ok()) return false;
    const TileMatrix k_left = take_tiles(&scratch, tiles(L), depth(QK));
    const TileMatrix k_right = take_tiles(&scratch, tiles(QK), depth(keys));
    const TileMatrix q_transposed = take_tiles(&scratch, tiles(block), depth(QK));
    TileMatrix q_right = take_tiles(&scratch, tiles(QK), depth(block));
    float* p = scratch.take(l32 * ld);   // weights [j, i]
    float* ds = scratch.take(l32 * ld);  // gradient of the weights, then of the energies [j, i]
    TileMatrix p_left = take_tiles(&scratch, tiles(L), depth(block));
    TileMatrix ds_left = take_tiles(&scratch, tiles(L), depth(block));
    const TileMatrix ds_transposed = take_tiles(&scratch, tiles(block), depth(keys));
    TileMatrix v_left = take_tiles(&scratch, tiles(L), depth(kBackwardPanel));
    TileMatrix g_transposed = take_tiles(&scratch, tiles(block), depth(kBackwardPanel));
    TileMatrix g_right = take_tiles(&scratch, panel_tiles, depth(block));
    float* lse = scratch.take(b32);
    float* delta = scratch.take(b32);
    float* delta_sums = scratch.take(V::W * b32);
    float* last_key_sums = scratch.take(V::W * b32);   // ds[L - 1, i]
    float* last_query_sums = scratch.take(V::W * l32);  // ds[j, rows - 1]
    float* last_query = scratch.take(l32);  // ds[j, rows - 1], side by side
    float* edge_row = scratch.take(edge_floats);
    [[maybe_unused]] const Tiles session;

    int64_t line, upcoming;
    for (bool more = next(&line); more; line = upcoming) {
      more = next(&upcoming);
      for (int64_t i0 = 0; i0 < L; i0 += block) {
        const int64_t rows = L - i0 < block ? L - i0 : block;
        const int64_t query_edge = edge_of(rows), queries = rows - query_edge;
        const int64_t r32 = round_up(rows, kStep);
        const BackwardViews<S> views(args, axis, line, i0);
        const auto &q = views.query, &k = views.key, &v = views.value, &o = views.out, &g = views.grad_out;
        const auto &dq = views.grad_query, &dk = views.grad_key, &dv = views.grad_value;
        p_left.steps = ds_left.steps = q_right.steps = g_right.steps = depth(queries);
        const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat_row;
        const float* lse_in = static_cast<const float*>(args.lse) + stat0;
        float* delta_io = static_cast<float*>(args.delta) + stat0;
        const NextBlock next_block(L, block, line, i0, more, upcoming);
        const auto panel_at = [C](int64_t c) { return C - c < kBackwardPanel ? C - c : kBackwardPanel; };
        const int64_t first_cols = panel_at(0);
        v_left.steps = g_transposed.steps = depth(first_cols);
        const S* last_gradient = query_edge > 0 ? g.data + queries * g.row : nullptr;
        memset(delta_sums, 0, static_cast<size_t>(V::W * rows) * sizeof(float));
        memset(last_key_sums, 0, static_cast<size_t>(V::W * rows) * sizeof(float));
        memset(last_query_sums, 0, static_cast<size_t>(V::W * L) * sizeof(float));
        Background background;  // each product asks for what the next ones need
        Ahead& asking = background.ahead;
        if (value_store != Store::kPastCaches) asking.add(dv.data, dv.row, L, first_cols);
        if (sum) asking.add(o.data, o.row, rows, first_cols);
        Ahead none;
        if (i0 == 0) pack(LeftPacker<S>(k.data, k.row, L, QK, k_left), &none);
        pack(TransposedPacker<S>(q.data, q.row, rows, QK, q_transposed), &none);
        LeftPacker<S> pack_values(v.data, v.row, keys, first_cols, v_left, last_gradient, last_query_sums);
        TransposedPacker<S> pack_gradient(g.data, g.row, queries, first_cols, g_transposed);
        background.add(&pack_values);
        background.add(&pack_gradient);
        background.spread(multiply_steps(tiles(L), tiles(rows), k_left.steps));
        multiply(tiles(L), tiles(rows), k_left, q_transposed, p, ld, false, &background);
        background.finish();
        for (int64_t i = 0; i < r32; ++i) lse[i] = i < rows ? lse_in[i * stat_row] : 0.0f;
        for (int64_t j = 0; j < l32; ++j) {
          // Rows beyond the line and columns beyond the block are zero.
          float* row = p + j * ld;
          for (int64_t i = 0; i < r32; i += kStep) {
            reg w[2];
            CCNET_UNROLL
            for (int h = 0; h < 2; ++h) {
              const int64_t at = i + h * 16, self = j - i0 - at;
              __mmask16 valid = j >= L || at >= rows ? 0 : V::first(static_cast<int>(rows - at < 16 ? rows - at : 16));
              if (masked && self >= 0 && self < 16) valid &= static_cast<__mmask16>(~(1u << self));
              w[h] = _mm512_maskz_mov_ps(valid, V::exp(V::sub(V::load(row + at), V::load(lse + at))));
              V::store(row + at, w[h]);
            }
            if (j < tiles(keys) * kTile && i / kStep < p_left.steps) {
              split(w[0], w[1], p_left.at(j / kTile, i / kStep) + j % kTile * kTileRow);
            }
          }
        }

        RowsTo<S> to{dv.data, dv.row, C, i0 > 0 ? Store::kJoin : value_store};
        if (query_edge > 0) to.add(last_gradient, p + queries, ld);
        FinishedProduct<S> product(to);
        for (int64_t c = 0; c < C; c += kBackwardPanel) {
          const int64_t next_c = c + kBackwardPanel, cols = panel_at(c), next_cols = panel_at(next_c);
          FromRows<S> from;
          if (key_edge > 0) {
            from.weights = p + keys * ld;
            from.weighted = edge_row + c;
            from.with = v.data + keys * v.row + c;
            from.with_dots = last_key_sums;
          }
          if (sum) {
            from.other = o.data + c;
            from.other_row = o.row;
            from.other_dots = delta_sums;
          }
          RightPacker<S> pack_rows(g.data + c, g.row, queries, query_edge, cols, g_right, from);
          background.add(&pack_rows);
          asking.add(g.data + next_c, g.row, rows, next_cols);
          asking.add(v.data + next_c, v.row, L, next_cols);
          background.spread(multiply_steps(tiles(keys), tiles(queries), v_left.steps));
          multiply(tiles(keys), tiles(queries), v_left, g_transposed, ds, ld, c > 0, &background);
          background.finish();

          if (next_cols > 0) {
            v_left.steps = g_transposed.steps = depth(next_cols);
            pack_values = LeftPacker<S>(v.data + next_c, v.row, keys, next_cols, v_left,
                                        last_gradient ? last_gradient + next_c : nullptr, last_query_sums);
            pack_gradient = TransposedPacker<S>(g.data + next_c, g.row, queries, next_cols, g_transposed);
            background.add(&pack_values);
            background.add(&pack_gradient);
            if (value_store != Store::kPastCaches) asking.add(dv.data + next_c, dv.row, L, next_cols);
            if (sum) asking.add(o.data + next_c, o.row, rows, next_cols);
          } else {
            next_block.ask_narrow(args, axis, views, rows, &asking);
          }
          background.spread(multiply_steps(tiles(keys), tiles(cols), g_right.steps));
          product.run(keys, c, tiles(cols), p_left, g_right, &background);
          background.finish();
        }
        if (key_edge > 0) to.put_row(keys, edge_row);

        for (int64_t i = 0; i < rows; ++i) {
          if (sum) delta_io[i * stat_row] = sum_lanes<V>(delta_sums + i * V::W);
          delta[i] = delta_io[i * stat_row];
          if (key_edge > 0) ds[keys * ld + i] = sum_lanes<V>(last_key_sums + i * V::W);
        }
        for (int64_t i = rows; i < r32; ++i) delta[i] = 0.0f;
        if (query_edge > 0) {
          for (int64_t j = 0; j < keys; ++j) ds[j * ld + queries] = sum_lanes<V>(last_query_sums + j * V::W);
        }
        for (int64_t j = 0; j < L; ++j) {
          float* row = ds + j * ld;
          const float* weights = p + j * ld;
          for (int64_t i = 0; i < r32; i += kStep) {
            reg d[2];
            CCNET_UNROLL
            for (int h = 0; h < 2; ++h) {
              const int64_t at = i + h * 16;
              const __mmask16 valid = at >= rows ? 0 : V::first(static_cast<int>(rows - at < 16 ? rows - at : 16));
              d[h] = _mm512_maskz_mul_ps(valid, V::load(weights + at), V::sub(V::load(row + at), V::load(delta + at)));
              V::store(row + at, d[h]);
            }
            if (j < keys && i / kStep < ds_left.steps) {
              split(d[0], d[1], ds_left.at(j / kTile, i / kStep) + j % kTile * kTileRow);
            }
          }
          if (query_edge > 0) last_query[j] = row[queries];
        }
        // What the last key and the last query have no part in is zero.
        for (int64_t j = L; j < l32; ++j) memset(ds + j * ld, 0, static_cast<size_t>(r32) * sizeof(float));
        pack(LeftTransposedPacker(ds, ld, ds_transposed.steps * kStep, round_up(queries, kTile), ds_transposed), &none);
        FromRows<S> from_keys, from_queries;
        if (query_edge > 0) {
          from_keys.weights = last_query;
          from_keys.weighted = edge_row;
        }
        if (key_edge > 0) {
          from_queries.weights = ds + keys * ld;
          from_queries.weighted = edge_row + round_up(QK, kStep);
        }
        pack(RightPacker<S>(k.data, k.row, keys, key_edge, QK, k_right, from_keys), &none);
        pack(RightPacker<S>(q.data, q.row, queries, query_edge, QK, q_right, from_queries), &none);

        next_block.ask_wide(args, axis, views, first_cols, &asking);
        background.spread(multiply_steps(tiles(queries), tiles(QK), k_right.steps) +
                          multiply_steps(tiles(keys), tiles(QK), q_right.steps));
        RowsTo<S> to_query{dq.data, dq.row, QK, query_store};
        RowsTo<S> to_key{dk.data, dk.row, QK, i0 > 0 ? Store::kJoin : query_store};
        if (key_edge > 0) to_query.add(k.data + keys * k.row, ds + keys * ld, 1);
        if (query_edge > 0) to_key.add(q.data + queries * q.row, last_query, 1);
        FinishedProduct<S> query_product(to_query), key_product(to_key);
        query_product.run(queries, 0, tiles(QK), ds_transposed, k_right, &background);
        key_product.run(keys, 0, tiles(QK), ds_left, q_right, &background);
        if (query_edge > 0) to_query.put_row(queries, from_keys.weighted);
        if (key_edge > 0) to_key.put_row(keys, from_queries.weighted);
        background.finish();
      }
    }
    V::fence();
    return true;
  });
}
