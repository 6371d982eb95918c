// Forward and backward of criss-cross attention in fp32 on matrix units that multiply bf16 (tiles.h), line by line.
//
// Included in kernel_amx_split.cpp, inside its anonymous namespace, after storage.h, vector_avx512.h, work.h and
// line_kernels.h.
//
// An fp32 number has 24 significant bits, a bf16 number 8: the upper halves of x, of what remains of x and of what then
// remains are three bf16 numbers that add up to x exactly. Of the nine products of two such sums the six largest are
// computed, in fp32 sums; the others are below 2^-21 of the product, and 2^-24 of it on average, like the rounding of a
// single fp32 multiplication. Six products of the matrix units take less than half as long as one of the vector units.
// What remains of Inf is NaN: a result that would be Inf is Inf or NaN.
//
// The same walk over lines as line_kernels.h, whose forward_axis and backward_axis serve short lines and few channels.
// The energies of the forward pass are [i, j], whose softmax runs along rows, those of the backward pass [j, i]: so the
// weights are left operands as they come. Lines of 16 n + 1 positions are the rule in segmentation (97 = 6 * 16 + 1):
// their last position, an edge of which a tile would be mostly padding, is left to the vector units, which read the
// rows anyway.

#include "tiles.h"
#include "split_operands.h"
#include "background.h"
#include "split_products.h"

constexpr int64_t kForwardPanel = 64, kBackwardPanel = 128;  // channels worked on at once

// The last position of a line, where it is one more than whole tiles.
inline int64_t edge_of(int64_t n) { return n > kTile && n % kTile == 1 ? 1 : 0; }

// --------------------------------------------------------------------------------------------------- forward

// Queries handled at once, a multiple of 32 unless it is the whole line.
int64_t split_block(int64_t length) {
  if (length <= 256) return length;
  const int64_t rows = 256 * 256 / length / 32 * 32;
  return rows < 32 ? 32 : rows;
}

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
  const int64_t block = split_block(L), blocks = (L + block - 1) / block;
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
      auto q = line_view<const S>(args.query, grid, axis, line);
      const auto k = line_view<const S>(args.key, grid, axis, line);
      const auto v = line_view<const S>(args.value, grid, axis, line);
      auto o = line_view<S>(args.out, grid, axis, line);
      q.data += i0 * q.row;
      o.data += i0 * o.row;
      const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat_row;
      float* max_out = static_cast<float*>(args.max) + stat0;
      float* sum_out = static_cast<float*>(args.lse) + stat0;

      const int64_t first_cols = C < kForwardPanel ? C : kForwardPanel;
      Background background;
      Ahead& asking = background.ahead;
      asking.add(v.data, v.row, L, first_cols);
      if (store != Store::kPastCaches) asking.add(o.data, o.row, rows, first_cols);
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
        const int64_t cols = C - c < kForwardPanel ? C - c : kForwardPanel;
        return RightPacker<S>(v.data + c, v.row, keys, key_edge, cols, v_right[which], from);
      };
      int which = 0;
      if (C > 0) pack(packer_of(0, which), &asking);
      for (int64_t c = 0; c < C; c += kForwardPanel) {
        const int64_t cols = C - c < kForwardPanel ? C - c : kForwardPanel;
        const int64_t ahead_c = c + 2 * kForwardPanel;
        RightPacker<S> packer;
        if (c + cols < C) {
          packer = packer_of(c + cols, which ^ 1);
          background.add(&packer);
        }
        const int64_t next_cols = C - c - cols < kForwardPanel ? C - c - cols : kForwardPanel;
        const int64_t ahead_cols = C - ahead_c < kForwardPanel ? C - ahead_c : kForwardPanel;
        asking.add(v.data + ahead_c, v.row, L, ahead_cols);
        if (store != Store::kPastCaches) asking.add(o.data + c + cols, o.row, rows, next_cols);
        if (next_cols <= 0 && more) {
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

// -------------------------------------------------------------------------------------------------- backward

template <class S>
void split_backward_axis(const BackwardArgs& args, int axis, bool first) {
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = split_block(L);
  const int64_t key_edge = edge_of(L), keys = L - key_edge;
  const int64_t l32 = round_up(L, kStep), b32 = round_up(block, kStep), ld = leading<V>(b32);
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const int64_t stat_row = stat.axis[axis];
  const int64_t panel_tiles = kBackwardPanel / kTile;
  const int64_t edge_floats = round_up(C, kBackwardPanel) + 2 * round_up(QK, kStep);
  // Blocks of queries after the first add to a line that should still be at hand.
  const Store query_store = first ? Store::kReplace : Store::kJoin;
  const Store value_store = block < L ? query_store : axis_store<V, S>(grid, args.grad_value, C, first);

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
      const auto q_line = line_view<const S>(args.query, grid, axis, line);
      const auto k = line_view<const S>(args.key, grid, axis, line);
      const auto v = line_view<const S>(args.value, grid, axis, line);
      const auto o_line = line_view<const S>(args.out, grid, axis, line);
      const auto g_line = line_view<const S>(args.grad_out, grid, axis, line);
      const auto dq_line = line_view<S>(args.grad_query, grid, axis, line);
      const auto dk = line_view<S>(args.grad_key, grid, axis, line);
      const auto dv = line_view<S>(args.grad_value, grid, axis, line);

      for (int64_t i0 = 0; i0 < L; i0 += block) {
        const int64_t rows = L - i0 < block ? L - i0 : block;
        const int64_t query_edge = edge_of(rows), queries = rows - query_edge;
        const int64_t r32 = round_up(rows, kStep);
        auto q = q_line;
        auto o = o_line;
        auto g = g_line;
        auto dq = dq_line;
        q.data += i0 * q.row;
        o.data += i0 * o.row;
        g.data += i0 * g.row;
        dq.data += i0 * dq.row;
        p_left.steps = ds_left.steps = q_right.steps = g_right.steps = depth(queries);
        const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat_row;
        const float* lse_in = static_cast<const float*>(args.lse) + stat0;
        float* delta_io = static_cast<float*>(args.delta) + stat0;
        // The block of queries after this one, perhaps of the next line. Each step asks for what the next ones need.
        const bool same_line = i0 + rows < L, any = same_line || more;
        const int64_t next_line = same_line ? line : (more ? upcoming : line), next_i0 = same_line ? i0 + rows : 0;
        const int64_t next_rows = !any ? 0 : (L - next_i0 < block ? L - next_i0 : block);
        const int64_t first_cols = kBackwardPanel < C ? kBackwardPanel : C;
        v_left.steps = g_transposed.steps = depth(first_cols);
        const S* last_gradient = query_edge > 0 ? g.data + queries * g.row : nullptr;
        memset(delta_sums, 0, static_cast<size_t>(V::W * rows) * sizeof(float));
        memset(last_key_sums, 0, static_cast<size_t>(V::W * rows) * sizeof(float));
        memset(last_query_sums, 0, static_cast<size_t>(V::W * L) * sizeof(float));
        Background background;
        Ahead& asking = background.ahead;
        if (value_store != Store::kPastCaches) asking.add(dv.data, dv.row, L, first_cols);
        if (first) asking.add(o.data, o.row, rows, first_cols);
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
          const int64_t cols = C - c < kBackwardPanel ? C - c : kBackwardPanel, next_c = c + cols;
          const int64_t next_cols = C - next_c < kBackwardPanel ? C - next_c : kBackwardPanel;
          FromRows<S> from;
          if (key_edge > 0) {
            from.weights = p + keys * ld;
            from.weighted = edge_row + c;
            from.with = v.data + keys * v.row + c;
            from.with_dots = last_key_sums;
          }
          if (first) {
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
            if (first) asking.add(o.data + next_c, o.row, rows, next_cols);
          } else {
            asking.add(dq.data, dq.row, rows, QK);
            asking.add(dk.data, dk.row, L, QK);
            asking.add(line_data<const S>(args.query, grid, axis, next_line) + next_i0 * q.row, q.row, next_rows, QK);
            const int64_t next_keys = same_line || next_rows == 0 ? 0 : L;
            asking.add(line_data<const S>(args.key, grid, axis, next_line), k.row, next_keys, QK);
          }
          background.spread(multiply_steps(tiles(keys), tiles(cols), g_right.steps));
          product.run(keys, c, tiles(cols), p_left, g_right, &background);
          background.finish();
        }
        if (key_edge > 0) to.put_row(keys, edge_row);

        for (int64_t i = 0; i < rows; ++i) {
          if (first) delta_io[i * stat_row] = sum_lanes<V>(delta_sums + i * V::W);
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
        pack_left_transposed(ds, ld, queries, ds_transposed);
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

        const auto next_g = line_view<const S>(args.grad_out, grid, axis, next_line);
        asking.add(next_g.data + next_i0 * next_g.row, next_g.row, next_rows, first_cols);
        asking.add(line_data<const S>(args.value, grid, axis, next_line), v.row, next_rows ? L : 0, first_cols);
        background.spread(multiply_steps(tiles(rows), tiles(QK), k_right.steps) +
                          multiply_steps(tiles(L), tiles(QK), q_right.steps));
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

// ------------------------------------------------------------------------------------------------------ lines

// Whether the matrix units are worth the splitting: below, the vector units are as fast or faster.
inline bool pays(const AttentionArgs& args, int axis) { return args.grid.size[axis] >= 64 && args.channels >= 192; }

template <class S>
void split_forward_typed(const ForwardArgs& args) {
  const int first = first_axis(args.grid), last = args.grid.axes - 1;
  for (int axis = first; axis <= last; ++axis) {
    if (!contributes(args.grid, axis)) continue;
    const auto run = pays(args, axis) ? split_forward_axis<S> : forward_axis<V, S>;
    run(args, axis, axis == first, axis == last);
  }
}

template <class S>
void split_backward_typed(const BackwardArgs& args) {
  const int first = first_axis(args.grid);
  for (int axis = first; axis < args.grid.axes; ++axis) {
    if (!contributes(args.grid, axis)) continue;
    const auto run = pays(args, axis) ? split_backward_axis<S> : backward_axis<V, S>;
    run(args, axis, axis == first);
  }
}
