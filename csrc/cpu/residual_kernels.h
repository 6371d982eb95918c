// x + gamma * attended and its backward, for any vector type. Included after work.h (see line_kernels.h).
//
// attended is channels-last; where x or the result is NCHW, squares of W x W numbers are transposed in registers, so
// that each map goes through memory once. A piece is some channels of a run of positions: lines of memory are used whole
// on both sides.

struct ResidualPiece {
  int64_t batch, channel, channels, position, positions;

  ResidualPiece(const ResidualArgs& args, int64_t item) {
    const int64_t across = (args.channels + args.piece_channels - 1) / args.piece_channels;
    const int64_t along = (args.positions + args.piece_positions - 1) / args.piece_positions;
    batch = item / across / along;
    channel = item % across * args.piece_channels;
    position = item / across % along * args.piece_positions;
    channels = args.channels - channel < args.piece_channels ? args.channels - channel : args.piece_channels;
    positions = args.positions - position < args.piece_positions ? args.positions - position : args.piece_positions;
  }

  template <class S>
  S* in(const FlatMap& map) const {
    return static_cast<S*>(map.data) + batch * map.batch + channel * map.channel + position * map.position;
  }
};

// Runs body(piece, item) for all pieces.
template <class V, class F>
void for_pieces(const ResidualArgs& args, const F& body) {
  run_items(args, residual_items(args), [&](auto next) {
    for (int64_t item; next(&item);) body(ResidualPiece(args, item), item);
    V::fence();
    return true;
  });
}

// Runs body(channel, position, channels from there on) for the vectors of a piece along its channels.
template <class V, class F>
void for_vectors(const ResidualPiece& piece, const F& body) {
  for (int64_t n = 0; n < piece.positions; ++n) {
    for (int64_t c = 0; c < piece.channels; c += V::W) body(c, n, piece.channels - c);
  }
}

// Asks for `count` rows of a piece, from this position on: rows of channels-last maps, and rows of an NCHW one, are far
// apart, which no hardware prefetcher follows.
template <class S>
void ask(const ResidualPiece& piece, const FlatMap& map, const S* first, int64_t position, int64_t count) {
  if (map.position == 1) {
    for (int64_t c = 0; c < piece.channels; ++c) CCNET_PREFETCH(first + c * map.channel + position);
    return;
  }
  for (int64_t n = position; n < position + count; ++n) {
    const char* p = reinterpret_cast<const char*>(first + n * map.position);
    for (int64_t b = 0; b < piece.channels * static_cast<int64_t>(sizeof(S)); b += 64) CCNET_PREFETCH(p + b);
  }
}

// Runs body(channel, position) for the squares of a piece, and ask_for(position, count) for those a few squares on.
template <class V, class Ask, class F>
void for_squares(const ResidualPiece& piece, const Ask& ask_for, const F& body) {
  const int64_t distance = 4 * V::W;
  for (int64_t n = 0; n < piece.positions; n += V::W) {
    if (n + distance < piece.positions) ask_for(n + distance, static_cast<int64_t>(V::W));
    for (int64_t c = 0; c < piece.channels; c += V::W) body(c, n);
  }
}

// Whether the result, of numbers of type S, is to be written past the caches.
template <class V, class S>
bool result_outgrows_caches(const ResidualArgs& args) {
  const FlatMap& out = args.out;
  const int64_t row = out.position == 1 ? args.positions : args.channels, step = out.channel * out.position;
  const int64_t numbers = args.batch * args.channels * args.positions, size = sizeof(S);
  return std::is_same<S, typename V::T>::value &&
         outgrows_caches(out.data, numbers * size, (out.batch | step | row) * size);
}

template <class V, class A, class X>
void residual_forward_typed(const ResidualArgs& args) {
  using reg = typename V::reg;
  const reg gamma = V::set1(static_cast<typename V::T>(args.gamma));
  const bool x_nchw = args.x.position == 1, out_nchw = args.out.position == 1;
  const bool past_caches = result_outgrows_caches<V, X>(args);
  for_pieces<V>(args, [&](const ResidualPiece& piece, int64_t) {
    const A* attended = piece.in<const A>(args.attended);
    const X* x = piece.in<const X>(args.x);
    X* out = piece.in<X>(args.out);
    // Vectors along the channels of a position.
    const auto load_attended = [&](int64_t n, int64_t c, int64_t cols) {
      return load_some<V>(attended + n * args.attended.position + c, cols);
    };
    const auto load_x = [&](int64_t n, int64_t c, int64_t cols) {
      return load_some<V>(x + n * args.x.position + c, cols);
    };
    const auto store_out = [&](int64_t n, int64_t c, int64_t cols, reg y) {
      store_some<V>(out + n * args.out.position + c, y, cols, past_caches);
    };
    if (!x_nchw && !out_nchw) {
      for_vectors<V>(piece, [&](int64_t c, int64_t n, int64_t cols) {
        store_out(n, c, cols, V::fma(gamma, load_attended(n, c, cols), load_x(n, c, cols)));
      });
      return;
    }
    const auto ask_for = [&](int64_t n, int64_t count) {
      ask(piece, args.attended, attended, n, count);
      ask(piece, args.x, x, n, count);
      if (!past_caches) ask(piece, args.out, out, n, count);
    };
    for_squares<V>(piece, ask_for, [&](int64_t c, int64_t n) {
      const int64_t channels = piece.channels - c, positions = piece.positions - n;
      reg t[V::W];
      if (!out_nchw) {
        load_transposed<V>(x + c * args.x.channel + n, args.x.channel, channels, positions, t);
        CCNET_UNROLL
        for (int r = 0; r < V::W; ++r) {
          if (r >= positions) break;
          store_out(n + r, c, channels, V::fma(gamma, load_attended(n + r, c, channels), t[r]));
        }
        return;
      }
      CCNET_UNROLL
      for (int r = 0; r < V::W; ++r) {
        t[r] = r < positions ? load_attended(n + r, c, channels) : V::zero();
        if (!x_nchw && r < positions) t[r] = V::fma(gamma, t[r], load_x(n + r, c, channels));
      }
      V::transpose(t);
      CCNET_UNROLL
      for (int r = 0; r < V::W; ++r) {
        if (r >= channels) break;
        const reg y =
            x_nchw ? V::fma(gamma, t[r], load_some<V>(x + (c + r) * args.x.channel + n, positions)) : t[r];
        store_some<V>(out + (c + r) * args.out.channel + n, y, positions, past_caches);
      }
    });
  });
}

// Sums are taken piece by piece: they do not depend on the number of threads.
template <class V, class A, class X>
void residual_backward_typed(const ResidualArgs& args) {
  using reg = typename V::reg;
  const reg gamma = V::set1(static_cast<typename V::T>(args.gamma));
  const bool past_caches = result_outgrows_caches<V, A>(args);
  for_pieces<V>(args, [&](const ResidualPiece& piece, int64_t item) {
    const A* attended = piece.in<const A>(args.attended);
    const X* grad = piece.in<const X>(args.x);
    A* out = piece.in<A>(args.out);
    reg sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const auto row = [&](reg g, int64_t n, int64_t c, int64_t cols) {
      const reg a = load_some<V>(attended + n * args.attended.position + c, cols);
      sums[n % 4] = V::fma(g, a, sums[n % 4]);
      store_some<V>(out + n * args.out.position + c, V::mul(gamma, g), cols, past_caches);
    };
    if (args.x.position != 1) {
      for_vectors<V>(piece, [&](int64_t c, int64_t n, int64_t cols) {
        row(load_some<V>(grad + n * args.x.position + c, cols), n, c, cols);
      });
    } else {
      const auto ask_for = [&](int64_t n, int64_t count) {
        ask(piece, args.attended, attended, n, count);
        ask(piece, args.x, grad, n, count);
        if (!past_caches) ask(piece, args.out, out, n, count);
      };
      for_squares<V>(piece, ask_for, [&](int64_t c, int64_t n) {
        const int64_t rows = piece.positions - n, cols = piece.channels - c;
        reg t[V::W];
        load_transposed<V>(grad + c * args.x.channel + n, args.x.channel, cols, rows, t);
        CCNET_UNROLL
        for (int r = 0; r < V::W; ++r) {
          if (r < rows) row(t[r], n + r, c, cols);
        }
      });
    }
    typename V::T lanes[4][V::W];
    double sum = 0;
    for (int e = 0; e < 4; ++e) {
      V::store(lanes[e], sums[e]);
      for (int lane = 0; lane < V::W; ++lane) sum += static_cast<double>(lanes[e][lane]);
    }
    args.sums[item] = sum;
  });
}

// Calls run(A{}, X{}).
template <class F>
void residual_any(const ResidualArgs& args, const F& run) {
  const bool wide = args.dtype == DType::kFloat;
  switch (args.attended_dtype) {
    case DType::kFloat: return run(float{}, float{});
    case DType::kHalf: return wide ? run(Half{}, float{}) : run(Half{}, Half{});
    case DType::kBFloat16: return wide ? run(BFloat16{}, float{}) : run(BFloat16{}, BFloat16{});
    case DType::kDouble: return;  // portable only
  }
}

template <class V>
void residual_forward_any(const ResidualArgs& args) {
  residual_any(args, [&](auto a, auto x) { residual_forward_typed<V, decltype(a), decltype(x)>(args); });
}

template <class V>
void residual_backward_any(const ResidualArgs& args) {
  residual_any(args, [&](auto a, auto x) { residual_backward_typed<V, decltype(a), decltype(x)>(args); });
}
