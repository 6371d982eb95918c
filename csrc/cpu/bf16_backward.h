// The backward pass along one axis in bf16. Included inside an anonymous namespace (see line_kernels_bf16.h).

template <class Engine>
void backward_axis(const BackwardArgs& args, int axis, bool first) {
  const Grid& grid = args.grid;
  const int64_t L = grid.size[axis], QK = args.qk_channels, C = args.channels;
  const int64_t block = queries_at_once(L), blocks = (L + block - 1) / block;
  const int64_t l32 = round_up(L, 32), b32 = round_up(block, 32);
  const int64_t qk32 = round_up(QK, 32), c32 = round_up(C, 32);
  const int64_t key_edge = depth_edge<Engine>(L);
  const int64_t key_rows = round_up(L, Engine::kRows), key_depth = round_up(L - key_edge, Engine::kDepth);
  const int64_t key_copy = LeftRows<Engine>::scratch(L, QK), value_copy = LeftRows<Engine>::scratch(L, C);
  const int64_t i_words = words_leading(b32), j_words = words_leading(l32);
  const int64_t qk_ld = leading<V>(qk32), c_ld = leading<V>(c32), i_ld = leading<V>(b32);
  const int64_t columns = b32 < Engine::kColumns ? b32 : Engine::kColumns;
  const bool masked = !keeps_self(grid.axes, axis);
  const Strides stat = scalar_strides(grid);
  const int64_t stat_row = stat.axis[axis];
  const int64_t q_row = args.query.strides.axis[axis], k_row = args.key.strides.axis[axis];
  const int64_t v_row = args.value.strides.axis[axis], o_row = args.out.strides.axis[axis];
  const int64_t g_row = args.grad_out.strides.axis[axis];
  const int64_t dq_row = args.grad_query.strides.axis[axis], dk_row = args.grad_key.strides.axis[axis];
  const int64_t dv_row = args.grad_value.strides.axis[axis];

  const Store query_store = narrow_store(args, first);
  const Store value_store = axis_store(grid, args.grad_value, C, first);
  const bool sum = sums_delta(args, first);

  run_items(args, grid.lines(axis), [&](auto next) {
    const int64_t kept = blocks > 1 ? l32 * (qk32 + c32) : 0;
    Scratch<float> scratch((key_copy + b32 * j_words + value_copy) / 2 + l32 * i_words + l32 / 2 * qk_ld +
                           qk32 / 2 * i_ld + b32 / 2 * qk_ld + 2 * l32 * columns + c32 / 2 * i_ld + b32 / 2 * c_ld +
                           2 * b32 + kept);
    if (!scratch.ok()) return false;
    const auto take_words = [&](int64_t n) { return reinterpret_cast<BFloat16*>(scratch.take(n / 2)); };
    const auto take_pairs = [&](int64_t n) { return reinterpret_cast<uint32_t*>(scratch.take(n)); };
    BFloat16* k_copy = take_words(key_copy);
    uint32_t* k_pairs = take_pairs(l32 / 2 * qk_ld);
    uint32_t* q_transposed = take_pairs(qk32 / 2 * i_ld);
    uint32_t* q_pairs = take_pairs(b32 / 2 * qk_ld);
    float* s = scratch.take(l32 * columns);         // energies [j, i] of some queries
    float* dp = scratch.take(l32 * columns);        // grad of their weights [j, i]
    BFloat16* p = take_words(l32 * i_words);        // weights [j, i]
    BFloat16* ds = take_words(l32 * i_words);       // grad of the energies [j, i]
    BFloat16* ds_rows = take_words(b32 * j_words);  // the same [i, j]
    BFloat16* v_copy = take_words(value_copy);
    uint32_t* g_transposed = take_pairs(c32 / 2 * i_ld);
    uint32_t* g_pairs = take_pairs(b32 / 2 * c_ld);
    float* lse = scratch.take(b32);
    float* delta = scratch.take(b32);
    float* dk_sums = blocks > 1 ? scratch.take(l32 * qk32) : nullptr;
    float* dv_sums = blocks > 1 ? scratch.take(l32 * c32) : nullptr;
    [[maybe_unused]] typename Engine::Session session;

    int64_t line, upcoming;
    bool more = next(&line);
    for (; more; line = upcoming) {
      more = next(&upcoming);
      const int64_t next_line = more ? upcoming : line;
      const BFloat16* k = line_data<BFloat16>(args.key, grid, axis, line);
      Ahead ahead;
      if (more) {
        const int64_t n = L < block ? L : block;
        ahead.add(line_data<BFloat16>(args.key, grid, axis, next_line), k_row, L, QK);
        ahead.add(line_data<BFloat16>(args.query, grid, axis, next_line), q_row, n, QK);
        ahead.add(line_data<BFloat16>(args.grad_out, grid, axis, next_line), g_row, n, C);
        if (sum) ahead.add(line_data<BFloat16>(args.out, grid, axis, next_line), o_row, n, C);
        ahead.add(line_data<BFloat16>(args.value, grid, axis, next_line), v_row, L, C);
        if (value_store != Store::kPastCaches) {
          ahead.add(line_data<BFloat16>(args.grad_value, grid, axis, next_line), dv_row, L, C);
        }
        ahead.add(line_data<BFloat16>(args.grad_query, grid, axis, next_line), dq_row, n, QK);
        ahead.add(line_data<BFloat16>(args.grad_key, grid, axis, next_line), dk_row, L, QK);
        const int64_t products = Engine::steps(key_rows, n, qk32) + Engine::steps(key_rows, n, c32) +
                                 Engine::steps(n, qk32, key_depth) + Engine::steps(key_rows, qk32 + c32, n);
        const int64_t packing = n / 16 * (qk32 + c32) / 32 + n / 4 + (sum ? n : 0);
        const int64_t weighing = (n + columns - 1) / columns * (l32 / 8);
        const int64_t storing = (qk32 + c32) / kPanel * (key_rows / 4);
        ahead.spread(blocks * (products + packing + weighing + storing) + key_rows / 4);
      }
      const LeftRows<Engine> keys(k, k_row, L, QK, k_copy, &ahead);
      pack_pairs(k, k_row, L, QK, key_depth, k_pairs, qk_ld, &ahead);
      const LeftRows<Engine> values(line_data<BFloat16>(args.value, grid, axis, line), v_row, L, C, v_copy, &ahead);

      for (int64_t i0 = 0; i0 < L; i0 += block) {
        const int64_t rows = L - i0 < block ? L - i0 : block;
        const int64_t r32 = round_up(rows, 32), r16 = round_up(rows, 16);
        const int64_t query_edge = depth_edge<Engine>(rows);
        const int64_t query_rows = round_up(rows, Engine::kRows);
        const int64_t query_depth = round_up(rows - query_edge, Engine::kDepth);
        // Queries from here on are an edge, left to dot products.
        const int64_t inner = rows > 16 && rows % 16 <= Engine::kEdgeColumns ? rows - rows % 16 : r16;
        const BFloat16* q = line_data<BFloat16>(args.query, grid, axis, line) + i0 * q_row;
        const BFloat16* o = line_data<BFloat16>(args.out, grid, axis, line) + i0 * o_row;
        const BFloat16* g = line_data<BFloat16>(args.grad_out, grid, axis, line) + i0 * g_row;
        const int64_t stat0 = line_offset(grid, stat, axis, line) + i0 * stat_row;
        const float* lse_in = static_cast<const float*>(args.lse) + stat0;
        float* delta_io = static_cast<float*>(args.delta) + stat0;

        pack_transposed(q, q_row, rows, QK, r16, q_transposed, i_ld, &ahead);
        pack_pairs(q, q_row, rows, QK, query_depth, q_pairs, qk_ld, &ahead);
        // As many rows of grad_out at once as stay in the first-level cache until all is done with them.
        for (int64_t i = 0; i < query_depth || i < r16; i += 16) {
          const int64_t here = rows - i < 16 ? rows - i : 16;
          if (i < r16) pack_transposed(g + i * g_row, g_row, here, C, 16, g_transposed + i, i_ld, &ahead);
          if (i < query_depth) {
            pack_pairs(g + i * g_row, g_row, here, C, query_depth - i < 16 ? query_depth - i : 16,
                       g_pairs + i / 2 * c_ld, c_ld, &ahead);
          }
          for (int64_t n = i; n < i + here; ++n) {
            lse[n] = lse_in[n * stat_row];
            if (sum) {
              ahead.ask();
              delta_io[n * stat_row] = dot_words(g + n * g_row, o + n * o_row, C);
            }
            delta[n] = delta_io[n * stat_row];
          }
        }
        for (int64_t i = rows; i < r32; ++i) lse[i] = delta[i] = 0.0f;

        for (int64_t from = 0; from < r32; from += columns) {
          const int64_t to = from + columns < r32 ? from + columns : r32;
          const int64_t here = (to < r16 ? to : r16) - from, whole = (to < inner ? to : inner) - from;
          keys.product(here, qk32, q_transposed + from, i_ld, s, columns, &ahead);
          values.product(whole, c32, g_transposed + from, i_ld, dp, columns, &ahead);
          for (int64_t i = from + whole; i < from + here && i < rows; ++i) {
            for (int64_t j = 0; j < L; ++j) dp[j * columns + i - from] = dot_words(values.row(j), g + i * g_row, C);
          }
          for (int64_t j = 0; j < l32; ++j) {
            if (j % 8 == 0) ahead.ask();
            // Rows beyond the line and columns beyond the block are zero in p and ds.
            for (int64_t i = from; i < to; i += 16) {
              __m256i weights = _mm256_setzero_si256(), grads = _mm256_setzero_si256();
              if (j < L && i < rows) {
                const int64_t at = j * columns + i - from, self = j - i0 - i;
                __mmask16 valid = V::first(static_cast<int>(rows - i < 16 ? rows - i : 16));
                if (masked && self >= 0 && self < 16) valid &= static_cast<__mmask16>(~(1u << self));
                const reg w = _mm512_maskz_mov_ps(valid, weight_exp(V::sub(V::load(s + at), V::load(lse + i))));
                weights = (__m256i)_mm512_cvtneps_pbh(w);
                grads = (__m256i)_mm512_cvtneps_pbh(
                    _mm512_maskz_mul_ps(valid, w, V::sub(V::load(dp + at), V::load(delta + i))));
              }
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + j * i_words + i), weights);
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + j * i_words + i), grads);
            }
          }
          for (int64_t j = 0; j < l32; j += 32) {
            for (int64_t i = from; i < to; i += 32) {
              V::transpose_words(ds + j * i_words + i, i_words, 32, 32, ds_rows + i * j_words + j, j_words);
            }
          }
        }
        const BlockPosition at{i0 == 0, i0 + block >= L};
        const GradientLine to_query{line_data<BFloat16>(args.grad_query, grid, axis, line) + i0 * dq_row,
                                    dq_row, QK, query_store, nullptr, at};
        const GradientLine to_key{line_data<BFloat16>(args.grad_key, grid, axis, line),
                                  dk_row, QK, query_store, dk_sums, at};
        const GradientLine to_value{line_data<BFloat16>(args.grad_value, grid, axis, line),
                                    dv_row, C, value_store, dv_sums, at};
        DepthEdge of_keys, of_queries, of_grads;
        if (key_edge > 0) of_keys = {k + key_depth * k_row, QK, ds_rows + key_depth, j_words};
        if (query_edge > 0) {
          of_queries = {q + query_depth * q_row, QK, ds + query_depth, i_words};
          of_grads = {g + query_depth * g_row, C, p + query_depth, i_words};
        }
        product_to_gradient<Engine>(query_rows, rows, key_depth, ds_rows, j_words, k_pairs, qk_ld, of_keys, to_query,
                                    &ahead);
        product_to_gradient<Engine>(key_rows, L, query_depth, ds, i_words, q_pairs, qk_ld, of_queries, to_key, &ahead);
        product_to_gradient<Engine>(key_rows, L, query_depth, p, i_words, g_pairs, c_ld, of_grads, to_value, &ahead);
      }
    }
    V::fence();
    return true;
  });
}

template <class Engine>
void backward(const BackwardArgs& args) {
  if (args.delta_first) sum_delta<V, BFloat16>(args);
  for_axes(args.grid, [&](int axis, bool first, bool) { backward_axis<Engine>(args, axis, first); });
}
