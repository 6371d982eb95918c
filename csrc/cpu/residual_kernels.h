// x + gamma * attended and its backward, for any vector type. Included after work.h (see line_kernels.h).
//
// attended is channels-last; where x is NCHW, squares of W x W numbers are transposed in registers, so that each map
// goes through memory once. A piece is some channels of a run of positions: lines of memory are used whole on both
// sides.

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
  S* in(const ResidualArgs::Map& map) const {
    return static_cast<S*>(map.data) + batch * map.batch + channel * map.channel + position * map.position;
  }
};

// Runs body(piece, item) for all pieces.
template <class F>
void for_pieces(const ResidualArgs& args, const F& body) {
  run_items(args, residual_items(args), [&](auto next) {
    for (int64_t item; next(&item);) body(ResidualPiece(args, item), item);
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

// Runs body(channel, position) for the squares of a piece, and asks for those a few squares on: rows of channels-last
// maps, and rows of an NCHW one, are far apart, which no hardware prefetcher follows.
template <class V, class A, class X, class F>
void for_squares(const ResidualPiece& piece, const A* attended, int64_t attended_row, const X* x, int64_t x_row,
                 const F& body) {
  const int64_t distance = 4 * V::W;
  for (int64_t n = 0; n < piece.positions; n += V::W) {
    if (n + distance < piece.positions) {
      for (int64_t r = 0; r < V::W; ++r) {
        const char* p = reinterpret_cast<const char*>(attended + (n + distance + r) * attended_row);
        for (int64_t b = 0; b < piece.channels * static_cast<int64_t>(sizeof(A)); b += 64) CCNET_PREFETCH(p + b);
      }
      for (int64_t c = 0; c < piece.channels; ++c) CCNET_PREFETCH(x + c * x_row + n + distance);
    }
    for (int64_t c = 0; c < piece.channels; c += V::W) body(c, n);
  }
}

template <class V, class A, class X>
void residual_forward_typed(const ResidualArgs& args) {
  using reg = typename V::reg;
  const reg gamma = V::set1(static_cast<typename V::T>(args.gamma));
  for_pieces(args, [&](const ResidualPiece& piece, int64_t) {
    const A* attended = piece.in<const A>(args.attended);
    const X* x = piece.in<const X>(args.x);
    X* out = piece.in<X>(args.out);
    if (args.x.position != 1) {
      for_vectors<V>(piece, [&](int64_t c, int64_t n, int64_t cols) {
        const reg a = load_some<V>(attended + n * args.attended.position + c, cols);
        const reg y = V::fma(gamma, a, load_some<V>(x + n * args.x.position + c, cols));
        store_some<V>(out + n * args.out.position + c, y, cols);
      });
      return;
    }
    for_squares<V>(piece, attended, args.attended.position, x, args.x.channel, [&](int64_t c, int64_t n) {
      const int64_t rows = piece.channels - c, cols = piece.positions - n;
      reg t[V::W];
      load_transposed<V>(attended + n * args.attended.position + c, args.attended.position, cols, rows, t);
      CCNET_UNROLL
      for (int r = 0; r < V::W; ++r) {
        if (r >= rows) break;
        const reg y = V::fma(gamma, t[r], load_some<V>(x + (c + r) * args.x.channel + n, cols));
        store_some<V>(out + (c + r) * args.out.channel + n, y, cols);
      }
    });
  });
}

// Sums are taken piece by piece: they do not depend on the number of threads.
template <class V, class A, class X>
void residual_backward_typed(const ResidualArgs& args) {
  using reg = typename V::reg;
  const reg gamma = V::set1(static_cast<typename V::T>(args.gamma));
  for_pieces(args, [&](const ResidualPiece& piece, int64_t item) {
    const A* attended = piece.in<const A>(args.attended);
    const X* grad = piece.in<const X>(args.x);
    A* out = piece.in<A>(args.out);
    reg sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    const auto row = [&](reg g, int64_t n, int64_t c, int64_t cols) {
      const reg a = load_some<V>(attended + n * args.attended.position + c, cols);
      sums[n % 4] = V::fma(g, a, sums[n % 4]);
      store_some<V>(out + n * args.out.position + c, V::mul(gamma, g), cols);
    };
    if (args.x.position != 1) {
      for_vectors<V>(piece, [&](int64_t c, int64_t n, int64_t cols) {
        row(load_some<V>(grad + n * args.x.position + c, cols), n, c, cols);
      });
    } else {
      for_squares<V>(piece, attended, args.attended.position, grad, args.x.channel, [&](int64_t c, int64_t n) {
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
