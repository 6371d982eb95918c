// The backward pass along one axis. Included inside each translation unit's anonymous namespace (see line_kernels.h).

// dst[row, x] (+)= tile[r, x]
template <class V, class S>
void add_rows(const typename V::T* tile, int64_t ld, int64_t rows, int64_t cols, const LineView<S>& dst, int64_t row,
              int64_t first_col, bool accumulate) {
  using reg = typename V::reg;
  for (int64_t r = 0; r < rows; ++r) {
    S* d = dst.data + (row + r) * dst.row + first_col;
    const typename V::T* t = tile + r * ld;
    for (int64_t x = 0; x < cols; x += V::W) {
      reg y = V::load(t + x);
      if (accumulate) y = V::add(load_some<V>(d + x, cols - x), y);
      store_some<V>(d + x, y, cols - x);
    }
  }
}

// dst[M, 0..cols) (+)= A[M, K] B[K, cols]: B packed with row stride ldb, dst in storage type.
template <class V, AOrder ORDER, class S>
void gemm_to_line(int64_t M, int64_t cols, int64_t K, const typename V::T* a, int64_t lda, const typename V::T* b,
                  int64_t ldb, typename V::T* tile, const LineView<S>& dst, int64_t first_col, Store store,
                  Ahead* ahead) {
  const int64_t padded = round_up(cols, V::W);
  for (int64_t col = 0; col < padded;) {
    const int64_t left = (padded - col) / V::W;
    const int vectors = static_cast<int>(left < V::kPanelVectors ? left : V::kPanelVectors);
    const int64_t width = vectors * V::W;
    const int64_t valid = cols - col < width ? cols - col : width;
    for_row_blocks<V, ORDER>(M, vectors, [&](int64_t row, int count, MicroFn<V> fn) {
      const typename V::T* a_rows = a + (ORDER == kColMajor ? row : row * lda);
      if constexpr (std::is_same<S, typename V::T>::value) {
        if (valid == width) {
          S* to = dst.data + row * dst.row + first_col + col;
          fn(K, a_rows, lda, b + col, ldb, to, dst.row, store, nullptr, ahead);
          return;
        }
      }
      fn(K, a_rows, lda, b + col, ldb, tile, width, Store::kReplace, nullptr, ahead);
      add_rows<V>(tile, width, count, valid, dst, row, first_col + col, store == Store::kJoin);
    });
    col += width;
  }
}

// Keys beyond the last whole vector where they are few: for them dP is a dot product per row rather than a vector of
// which most is padding. Images of 8n + 1 pixels are the rule in segmentation (97 = 6 * 16 + 1).
template <class V>
int64_t edge_columns(int64_t length) {
  const int64_t rest = length % V::W;
  return length > V::W && rest <= V::W / 8 ? rest : 0;
}

// One panel of grad_out's rows, packed into gp, with the products that read them once:
//   sums[i] += sum_c g[i, c] o[i, c], where out is given, and sums[(1 + e) * rows + i] += sum_c g[i, c] v[e, c]
// over the EDGES keys whose values of this panel lie `width` apart at v. A sum is a vector of partial sums.
template <class V, int EDGES, class S>
void pack_gradient(const LineView<const S>& g, const LineView<const S>* out, const typename V::T* v, int64_t rows,
                   int64_t first, int64_t cols, typename V::T* gp, int64_t ld, typename V::T* sums) {
  using reg = typename V::reg;
  const int64_t width = round_up(cols, V::W);
  for (int64_t i = 0; i < rows; ++i) {
    const S* from = g.data + i * g.row + first;
    const S* with = out ? out->data + i * out->row + first : nullptr;
    typename V::T* to = gp + i * ld;
    reg dot = V::zero(), edge[EDGES + 1];
    for (int e = 0; e < EDGES; ++e) edge[e] = V::zero();
    for (int64_t x = 0; x < cols; x += V::W) {
      const reg y = load_some<V>(from + x, cols - x);
      V::store(to + x, y);
      if (with) dot = V::fma(load_some<V>(with + x, cols - x), y, dot);
      CCNET_UNROLL
      for (int e = 0; e < EDGES; ++e) edge[e] = V::fma(y, V::load(v + e * width + x), edge[e]);
    }
    typename V::T* sum = sums + i * V::W;
    if (with) V::store(sum, V::add(V::load(sum), dot));
    CCNET_UNROLL
    for (int e = 0; e < EDGES; ++e) {
      sum += rows * V::W;
      V::store(sum, V::add(V::load(sum), edge[e]));
    }
  }
}

template <class V, class S>
void backward_axis(const BackwardArgs& args, int axis, bool first) {
  using T = typename V::T;
  using reg = typename V::reg;
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = rows_per_block<V>(L, 384 * 1024);
  const int64_t lpad = leading<V>(L), bpad = leading<V>(block), edge = edge_columns<V>(L),
                jpad = edge ? L - edge : round_up(L, V::W), row_pad = round_up(L, V::W);
  const int64_t panel = 2 * V::kPanelVectors * V::W, g_ld = leading<V>(panel), qkpad = leading<V>(QK);
  const bool masked = !keeps_self(grid.axes, axis);
  const bool sum = sums_delta(args, first);
  const auto pack_with_edges = edge == 0   ? pack_gradient<V, 0, S>
                               : edge == 1 ? pack_gradient<V, 1, S>
                                           : pack_gradient<V, 2, S>;
  const Strides stat = scalar_strides(grid);
  // Blocks of queries after the first add to a line that should still be at hand. Narrow numbers are added up in wide
  // ones: rounded with every block, the sums over a long line would be off by several times their last digit.
  const bool summed = !std::is_same<S, T>::value && block < L;
  const int64_t c_ld = round_up(C, V::W);
  const Store query_store = narrow_store(args, first);
  const Store value_store = block < L && first ? Store::kReplace : axis_store<V, S>(grid, args.grad_value, C, first);

  run_items(args, grid.lines(axis), [&](auto next) {
    Scratch<T> scratch(QK * lpad + qkpad * (L + block) + 2 * block * lpad + block * g_ld + panel * lpad +
                       2 * bpad + (1 + edge) * bpad * V::W + panel * max_rows<V>(1) * 2 +
                       (summed ? L * (qkpad + c_ld) : 0));
    if (!scratch.ok()) return false;
    T* kt = scratch.take(QK * lpad);
    T* kr = scratch.take(qkpad * L);
    T* qr = scratch.take(qkpad * block);
    T* p = scratch.take(block * lpad);
    T* ds = scratch.take(block * lpad);
    T* gp = scratch.take(block * g_ld);  // grad_out, one panel of channels
    T* vt = scratch.take(panel * lpad);   // value transposed, the same channels
    T* lse = scratch.take(bpad);
    T* delta = scratch.take(bpad);
    T* sums = scratch.take((1 + edge) * bpad * V::W);
    T* tile = scratch.take(panel * max_rows<V>(1));
    const LineView<T> dk_sums{scratch.take(summed ? qkpad * L : 0), qkpad};
    const LineView<T> dv_sums{scratch.take(summed ? c_ld * L : 0), c_ld};

    int64_t line, upcoming;
    for (bool more = next(&line); more; line = upcoming) {
      more = next(&upcoming);
      const auto keys = line_view<const S>(args.key, grid, axis, line);
      pack_columns<V>(keys, L, 0, QK, kt, lpad);
      pack_rows<V>(keys, L, 0, QK, kr, qkpad);

      for (int64_t i0 = 0; i0 < L; i0 += block) {
        const int64_t rows = L - i0 < block ? L - i0 : block;
        const BackwardViews<S> views(args, axis, line, i0);
        const auto &q = views.query, &v = views.value, &o = views.out, &g = views.grad_out;
        const auto &dq = views.grad_query, &dk = views.grad_key, &dv = views.grad_value;
        const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat.axis[axis];
        const int64_t stat_row = stat.axis[axis];
        const T* lse_in = static_cast<const T*>(args.lse) + stat0;
        T* delta_io = static_cast<T*>(args.delta) + stat0;
        pack_rows<V>(q, rows, 0, QK, qr, qkpad);
        const NextBlock next_block(L, block, line, i0, more, upcoming);
        // The gradient of keys or values, to which every block of queries adds: (+)= A^T B from column c on.
        const auto add_to_keys = [&](int64_t cols, const T* a, const T* b, int64_t ldb, const LineView<S>& dst,
                                     const LineView<T>& dst_sums, int64_t c, Store store, Ahead* ahead) {
          if (summed) {
            gemm_to_line<V, kColMajor>(L, cols, rows, a, lpad, b, ldb, tile, dst_sums, c,
                                       i0 > 0 ? Store::kJoin : Store::kReplace, ahead);
          } else {
            gemm_to_line<V, kColMajor>(L, cols, rows, a, lpad, b, ldb, tile, dst, c, i0 > 0 ? Store::kJoin : store,
                                       ahead);
          }
        };
        const int64_t first_cols = panel < C ? panel : C;
        Ahead first_panel;  // each product asks for what the next ones need
        if (value_store != Store::kPastCaches) first_panel.add(dv.data, dv.row, L, first_cols);
        if (sum) first_panel.add(o.data, o.row, rows, first_cols);
        first_panel.spread(steps<V>(rows, row_pad / V::W, QK));
        gemm<V, kRowMajor>(rows, row_pad, QK, qr, qkpad, kt, lpad, p, lpad, false, &first_panel);
        for (int64_t i = 0; i < rows; ++i) {
          const reg l = V::set1(lse_in[i * stat_row]);
          T* row = p + i * lpad;
          for (int64_t j = 0; j < row_pad; j += V::W) V::store(row + j, V::exp(V::sub(V::load(row + j), l)));
          if (masked) row[i0 + i] = T(0);
        }
        for (int64_t i = 0; i < (1 + edge) * rows * V::W; ++i) sums[i] = T(0);

        for (int64_t c = 0; c < C; c += panel) {
          const int64_t cols = C - c < panel ? C - c : panel;
          const int64_t width = round_up(cols, V::W);
          const int64_t next_cols = C - c - cols < panel ? C - c - cols : panel;
          if (edge > 0) pack_rows<V>(LineView<const S>{v.data + jpad * v.row, v.row}, edge, c, cols, tile, width);
          // delta_i = sum_c grad_out * out, while grad_out is at hand.
          pack_with_edges(g, sum ? &o : nullptr, tile, rows, c, cols, gp, g_ld, sums);
          pack_columns<V>(v, edge > 0 ? jpad : L, c, cols, vt, lpad);
          Ahead ahead;
          if (next_cols > 0) {
            ahead.add(g.data + c + cols, g.row, rows, next_cols);
            ahead.add(v.data + c + cols, v.row, L, next_cols);
            if (value_store != Store::kPastCaches) ahead.add(dv.data + c + cols, dv.row, L, next_cols);
            if (sum) ahead.add(o.data + c + cols, o.row, rows, next_cols);
          } else {
            next_block.ask_narrow(args, axis, views, rows, &ahead);
          }
          ahead.spread(steps<V>(rows, jpad / V::W, cols) + steps<V>(L, width / V::W, rows));
          gemm<V, kRowMajor>(rows, jpad, cols, gp, g_ld, vt, lpad, ds, lpad, c > 0, &ahead);
          add_to_keys(cols, p, gp, g_ld, dv, dv_sums, c, value_store, &ahead);
        }

        for (int64_t i = 0; i < rows; ++i) {
          lse[i] = lse_in[i * stat_row];
          if (sum) delta_io[i * stat_row] = sum_lanes<V>(sums + i * V::W);
          delta[i] = delta_io[i * stat_row];
          const reg d = V::set1(delta[i]);
          T* row = ds + i * lpad;
          const T* prob = p + i * lpad;
          for (int64_t e = 0; e < edge; ++e) row[jpad + e] = sum_lanes<V>(sums + ((1 + e) * rows + i) * V::W);
          for (int64_t j = 0; j < row_pad; j += V::W) {
            // C = 0 leaves ds unwritten, and then delta and every gradient but dV's are zero.
            const reg dp = C > 0 ? V::load(row + j) : V::zero();
            V::store(row + j, V::mul(V::load(prob + j), V::sub(dp, d)));
          }
        }
        Ahead next_panel;
        next_block.ask_wide(args, axis, views, first_cols, &next_panel);
        next_panel.spread(steps<V>(rows, qkpad / V::W, L) + steps<V>(L, qkpad / V::W, rows));
        gemm_to_line<V, kRowMajor>(rows, QK, L, ds, lpad, kr, qkpad, tile, dq, 0, query_store, &next_panel);
        add_to_keys(QK, ds, qr, qkpad, dk, dk_sums, 0, query_store, &next_panel);
        if (summed && i0 + block >= L) {
          add_rows<V>(dk_sums.data, qkpad, L, QK, dk, 0, 0, query_store == Store::kJoin);
          add_rows<V>(dv_sums.data, c_ld, L, C, dv, 0, 0, value_store == Store::kJoin);
        }
      }
    }
    V::fence();
    return true;
  });
}

template <class V, class S>
void backward_typed(const BackwardArgs& args) {
  if (args.delta_first) sum_delta<V, S>(args);
  for_axes(args.grid, [&](int axis, bool first, bool) { backward_axis<V, S>(args, axis, first); });
}
