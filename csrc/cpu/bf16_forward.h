// The forward pass along one axis in bf16. Included inside an anonymous namespace (see line_kernels_bf16.h).

// exp for weights, which are rounded to 8 bits afterwards: relative error below 1e-6 for x in [-16, 0], and 1e-5 below,
// where weights no longer matter; 0 below kLeastExponent. 2^t is 2^floor(t) times a polynomial of the fraction.
inline reg weight_exp(reg x) {
  const reg t = V::mul(x, V::set1(1.44269504088896341f));
  const reg r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);
  reg p = V::set1(1.8775764100062524e-3f);
  p = V::fma(p, r, V::set1(8.989340732314256e-3f));
  p = V::fma(p, r, V::set1(5.582631751465259e-2f));
  p = V::fma(p, r, V::set1(2.401536172263563e-1f));
  p = V::fma(p, r, V::set1(6.931530731791089e-1f));
  p = V::fma(p, r, V::set1(9.999999250639034e-1f));
  return _mm512_maskz_scalef_ps(V::counts(x), p, t);
}

// Weights of 16 queries: p[i, j] = exp(s[j, i] - max_i) in bf16, zero for L <= j < the next multiple of 32, with the
// maxima and the (fp32) sums. Down the columns nothing is horizontal; the weights are then transposed in registers.
void softmax_columns(const float* s, int64_t ld, int64_t L, BFloat16* p, int64_t p_ld, float* max, float* sum,
                     Ahead* ahead) {
  reg m0 = V::load(s), m1 = m0;
  for (int64_t j = 1; j < L; j += 2) {
    m0 = V::max(m0, V::load(s + j * ld));
    m1 = V::max(m1, V::load(s + (j + 1 < L ? j + 1 : j) * ld));
  }
  const reg m = above_minus_infinity<V>(V::max(m0, m1));
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  reg s0 = V::zero(), s1 = V::zero();
  for (int64_t j0 = 0; j0 < L; j0 += 32) {
    alignas(64) float pairs[16][16];
    for (int r = 0; r < 16; ++r) {
      if (r % 2 == 0) ahead->ask();
      const int64_t j = j0 + 2 * r;
      const reg e0 = j < L ? weight_exp(V::sub(V::load(s + j * ld), m)) : V::zero();
      const reg e1 = j + 1 < L ? weight_exp(V::sub(V::load(s + (j + 1) * ld), m)) : V::zero();
      s0 = V::add(s0, e0);
      s1 = V::add(s1, e1);
      const __m512i words = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(e1, e0));
      _mm512_store_si512(pairs[r], words);
    }
    reg t[16];
    CCNET_UNROLL
    for (int r = 0; r < 16; ++r) t[r] = _mm512_load_ps(pairs[r]);
    V::transpose(t);
    CCNET_UNROLL
    for (int r = 0; r < 16; ++r) _mm512_storeu_ps(p + r * p_ld + j0, t[r]);
  }
  V::store(max, m);
  V::store(sum, V::add(s0, s1));
}

template <class Engine>
void forward_axis(const ForwardArgs& args, int axis, bool first, bool last) {
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = queries_at_once(L), blocks = (L + block - 1) / block;
  const int64_t l32 = round_up(L, 32), l16 = round_up(L, 16), b16 = round_up(block, 16);
  const int64_t qk32 = round_up(QK, 32), c32 = round_up(C, 32);
  const int64_t key_edge = depth_edge<Engine>(L);
  const int64_t key_rows = round_up(L, Engine::kRows), key_depth = round_up(L - key_edge, Engine::kDepth);
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const int64_t stat_row = stat.axis[axis];
  const int64_t v_row = args.value.strides.axis[axis], o_row = args.out.strides.axis[axis];
  const int64_t q_row = args.query.strides.axis[axis], k_row = args.key.strides.axis[axis];

  const Store store = axis_store(grid, args.out, C, first);

  const int64_t ld = leading<V>(b16), p_ld = words_leading(l32);
  const int64_t columns = b16 < Engine::kColumns ? b16 : Engine::kColumns;

  run_items(args, grid.lines(axis) * blocks, [&](auto next) {
    const int64_t key_copy = LeftRows<Engine>::scratch(L, QK);
    Scratch<float> scratch(key_copy / 2 + qk32 / 2 * ld + l16 * columns + b16 * p_ld / 2 + l32 / 2 * kPanel + 4 * b16);
    if (!scratch.ok()) return false;
    BFloat16* k_copy = reinterpret_cast<BFloat16*>(scratch.take(key_copy / 2));
    uint32_t* q_transposed = reinterpret_cast<uint32_t*>(scratch.take(qk32 / 2 * ld));
    float* s = scratch.take(l16 * columns);  // energies [j, i] of some queries
    BFloat16* p = reinterpret_cast<BFloat16*>(scratch.take(b16 * p_ld / 2));  // weights [i, j]
    uint32_t* v_pairs = reinterpret_cast<uint32_t*>(scratch.take(l32 / 2 * kPanel));
    float* keep = scratch.take(b16);
    float* fresh = scratch.take(b16);
    float* before_max = scratch.take(b16);
    float* before_sum = scratch.take(b16);
    [[maybe_unused]] typename Engine::Session session;

    int64_t item, upcoming;
    bool more = next(&item);
    for (; more; item = upcoming) {
      more = next(&upcoming);
      const int64_t line = item / blocks, i0 = item % blocks * block;
      const int64_t rows = L - i0 < block ? L - i0 : block;
      const int64_t r16 = round_up(rows, 16), query_rows = round_up(rows, Engine::kRows);
      const BFloat16* v = line_data<BFloat16>(args.value, grid, axis, line);
      BFloat16* o = line_data<BFloat16>(args.out, grid, axis, line) + i0 * o_row;
      const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat_row;
      float* max_out = static_cast<float*>(args.max) + stat0;
      float* sum_out = static_cast<float*>(args.lse) + stat0;

      Ahead ahead;
      if (more && upcoming / blocks != line) {
        const int64_t next_line = upcoming / blocks;
        ahead.add(line_data<BFloat16>(args.key, grid, axis, next_line), k_row, L, QK);
        ahead.add(line_data<BFloat16>(args.query, grid, axis, next_line), q_row, L, QK);
        ahead.add(line_data<BFloat16>(args.value, grid, axis, next_line), v_row, L, C);
        if (store != Store::kPastCaches) ahead.add(line_data<BFloat16>(args.out, grid, axis, next_line), o_row, L, C);
        ahead.spread(Engine::steps(key_rows, r16, qk32) + Engine::steps(query_rows, c32, key_depth) +
                     r16 / 16 * (l32 / 4) + c32 / kPanel * (key_depth / 8 + rows / 4));
      }

      const LeftRows<Engine> k(line_data<BFloat16>(args.key, grid, axis, line), k_row, L, QK, k_copy, &ahead);
      pack_transposed(line_data<BFloat16>(args.query, grid, axis, line) + i0 * q_row, q_row, rows, QK, r16,
                      q_transposed, ld, &ahead);
      for (int64_t from = 0; from < r16; from += columns) {
        const int64_t here = r16 - from < columns ? r16 - from : columns;
        k.product(here, qk32, q_transposed + from, ld, s, columns, &ahead);
        if (masked) {
          const int64_t real = rows - from < here ? rows - from : here;
          for (int64_t i = 0; i < real; ++i) s[(i0 + from + i) * columns + i] = -INFINITY;
        }
        for (int64_t i = from; i < from + here; i += 16) {
          softmax_columns(s + i - from, columns, L, p + i * p_ld, p_ld, keep + i, fresh + i, &ahead);
        }
      }
      merge_rows<V>(rows, first, last, max_out, sum_out, stat_row, keep, fresh, before_max, before_sum);

      for (int64_t c = 0; c < c32; c += kPanel) {
        const int64_t width = c32 - c < kPanel ? c32 - c : kPanel;
        const int64_t valid = C - c < width ? C - c : width;
        pack_pairs(v + c, v_row, L, valid, key_depth, v_pairs, kPanel, &ahead);
        with_store_way(store, valid, [&](auto way) {
          const MeanStore<decltype(way)> to{o + c, o_row, valid, keep, fresh};
          DepthEdge edge;
          if (key_edge > 0) edge = {v + key_depth * v_row + c, valid, p + key_depth, p_ld};
          Engine::product_to(query_rows, rows, width, key_depth, p, p_ld, v_pairs, kPanel, to, &ahead, edge);
        });
      }
    }
    V::fence();
    return true;
  });
}

template <class Engine>
void forward(const ForwardArgs& args) {
  for_axes(args.grid, [&](int axis, bool first, bool last) { forward_axis<Engine>(args, axis, first, last); });
}
