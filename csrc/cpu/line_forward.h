// The forward pass along one axis. Included inside each translation unit's anonymous namespace (see line_kernels.h).

// Softmax down the columns of s [L, cols], before the division: each number becomes exp(s - max), with the column's max
// and the sum of its exponentials.
template <class V>
void softmax_columns(typename V::T* s, int64_t ld, int64_t L, int64_t cols, typename V::T* max, typename V::T* sum) {
  using T = typename V::T;
  using reg = typename V::reg;
  for (int64_t i = 0; i < cols; i += V::W) {
    reg m0 = V::load(s + i), m1 = m0;
    int64_t j = 1;
    for (; j + 1 < L; j += 2) {
      m0 = V::max(m0, V::load(s + j * ld + i));
      m1 = V::max(m1, V::load(s + (j + 1) * ld + i));
    }
    if (j < L) m0 = V::max(m0, V::load(s + j * ld + i));
    m0 = above_minus_infinity<V>(V::max(m0, m1));
    reg s0 = V::zero(), s1 = V::zero();
    j = 0;
    for (; j + 1 < L; j += 2) {
      T* p = s + j * ld + i;
      const reg e0 = V::exp(V::sub(V::load(p), m0)), e1 = V::exp(V::sub(V::load(p + ld), m0));
      V::store(p, e0);
      V::store(p + ld, e1);
      s0 = V::add(s0, e0);
      s1 = V::add(s1, e1);
    }
    if (j < L) {
      T* p = s + j * ld + i;
      const reg e0 = V::exp(V::sub(V::load(p), m0));
      V::store(p, e0);
      s0 = V::add(s0, e0);
    }
    V::store(max + i, m0);
    V::store(sum + i, V::add(s0, s1));
  }
}

template <class V, class S>
void forward_axis(const ForwardArgs& args, int axis, bool first, bool last) {
  using T = typename V::T;
  using reg = typename V::reg;
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = rows_per_block<V>(L, 512 * 1024);
  const int64_t blocks = (L + block - 1) / block;
  const int64_t bpad = leading<V>(block), qk_ld = leading<V>(QK);
  const int64_t panel = V::kPanelVectors * V::W;
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const Store store = axis_store<V, S>(grid, args.out, C, first);

  run_items(args, grid.lines(axis) * blocks, [&](auto next) {
    Scratch<T> scratch(L * qk_ld + QK * bpad + L * bpad + L * panel + 4 * bpad + panel * max_rows<V>(1) * 2);
    if (!scratch.ok()) return false;
    T* kr = scratch.take(L * qk_ld);
    T* qt = scratch.take(QK * bpad);
    T* st = scratch.take(L * bpad);
    T* vp = scratch.take(L * panel);
    T* keep = scratch.take(bpad);   // factor of what is already in out
    T* fresh = scratch.take(bpad);  // factor of this axis' sum_j exp(S - max) V
    T* before_max = scratch.take(bpad);
    T* before_sum = scratch.take(bpad);
    T* tile = scratch.take(panel * max_rows<V>(1));
    int64_t packed_line = -1;

    int64_t item, upcoming;
    for (bool more = next(&item); more; item = upcoming) {
      more = next(&upcoming);
      const int64_t line = item / blocks, i0 = item % blocks * block;
      const int64_t rows = L - i0 < block ? L - i0 : block;
      const int64_t rpad = round_up(rows, V::W);
      const ForwardViews<S> views(args, axis, line, i0);
      const auto &q = views.query, &k = views.key, &v = views.value;
      const auto& o = views.out;
      const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat.axis[axis];
      T* max_out = static_cast<T*>(args.max) + stat0;
      T* sum_out = static_cast<T*>(args.lse) + stat0;
      const int64_t stat_row = stat.axis[axis];

      if (packed_line != line) {
        pack_rows<V>(k, L, 0, QK, kr, qk_ld);
        packed_line = line;
      }
      pack_columns<V>(q, rows, 0, QK, qt, bpad);
      // Each product asks for what the next one reads and writes.
      Ahead first_panel;
      first_panel.add(v.data, v.row, L, panel < C ? panel : C);
      if (store != Store::kPastCaches) first_panel.add(o.data, o.row, rows, panel < C ? panel : C);
      first_panel.spread(steps<V>(L, rpad / V::W, QK));
      gemm<V, kRowMajor>(L, rpad, QK, kr, qk_ld, qt, bpad, st, bpad, false, &first_panel);
      if (masked) {
        for (int64_t i = 0; i < rows; ++i) st[(i0 + i) * bpad + i] = static_cast<T>(-INFINITY);
      }

      softmax_columns<V>(st, bpad, L, rpad, keep, fresh);
      merge_rows<V>(rows, first, last, max_out, sum_out, stat_row, keep, fresh, before_max, before_sum);

      for (int64_t c = 0; c < C; c += panel) {
        const int64_t cols = C - c < panel ? C - c : panel;
        const int64_t width = round_up(cols, V::W);
        const int64_t next_cols = C - c - cols < panel ? C - c - cols : panel;
        pack_rows<V>(v, L, c, cols, vp, width);
        Ahead ahead;
        if (next_cols > 0) {
          ahead.add(v.data + c + cols, v.row, L, next_cols);
          if (store != Store::kPastCaches) ahead.add(o.data + c + cols, o.row, rows, next_cols);
        } else if (more) {
          const int64_t next_line = upcoming / blocks, next_i0 = upcoming % blocks * block;
          const auto next_q = line_view<const S>(args.query, grid, axis, next_line);
          ahead.add(next_q.data + next_i0 * next_q.row, next_q.row, L - next_i0 < block ? L - next_i0 : block, QK);
          if (next_line != line) ahead.add(line_data<const S>(args.key, grid, axis, next_line), k.row, L, QK);
        }
        ahead.spread(steps<V>(rows, width / V::W, L));
        for_row_blocks<V, kColMajor>(rows, static_cast<int>(width / V::W), [&](int64_t row, int count, MicroFn<V> fn) {
          if constexpr (std::is_same<S, T>::value) {
            if (width == cols) {
              const Scales<T> scales{keep + row, fresh + row};
              fn(L, st + row, bpad, vp, width, o.data + row * o.row + c, o.row, store, &scales, &ahead);
              return;
            }
          }
          fn(L, st + row, bpad, vp, width, tile, width, Store::kReplace, nullptr, &ahead);
          for (int r = 0; r < count; ++r) {
            S* d = o.data + (row + r) * o.row + c;
            const T* t = tile + r * width;
            const reg scale = V::set1(fresh[row + r]), old = V::set1(keep[row + r]);
            for (int64_t x = 0; x < cols; x += V::W) {
              reg y = V::mul(V::load(t + x), scale);
              if (!first) y = V::fma(load_some<V>(d + x, cols - x), old, y);
              store_some<V>(d + x, y, cols - x);
            }
          }
        });
      }
    }
    V::fence();
    return true;
  });
}

template <class V, class S>
void forward_typed(const ForwardArgs& args) {
  for_axes(args.grid, [&](int axis, bool first, bool last) { forward_axis<V, S>(args, axis, first, last); });
}
