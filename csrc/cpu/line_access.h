// Lines of tensors: where they lie, how they are packed for the products, which comes next and how results are
// written. Included inside each translation unit's anonymous namespace, after work.h and ahead.h (see line_kernels.h).

// One line of a tensor: a matrix [L, channels] whose rows are `row` elements apart.
template <class S>
struct LineView {
  S* data;
  int64_t row;
};

// dst[i * ld + c] = src[i, first + c] for i < rows, c < cols; columns up to the next multiple of W are zeroed.
template <class V, class S>
void pack_rows(const LineView<const S>& src, int64_t rows, int64_t first, int64_t cols, typename V::T* dst,
               int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    const S* p = src.data + i * src.row + first;
    typename V::T* d = dst + i * ld;
    int64_t c = 0;
    for (; c + V::W <= cols; c += V::W) V::store(d + c, V::load(p + c));
    if (c < cols) V::store(d + c, V::load_n(p + c, static_cast<int>(cols - c)));
  }
}

// dst[c * ld + i] = src[i, first + c] for i < rows, c < cols; rows up to the next multiple of W are zeroed.
template <class V, class S>
void pack_columns(const LineView<const S>& src, int64_t rows, int64_t first, int64_t cols, typename V::T* dst,
                  int64_t ld) {
  for (int64_t i = 0; i < rows; i += V::W) {
    for (int64_t c = 0; c < cols; c += V::W) {
      const int width = static_cast<int>(cols - c < V::W ? cols - c : V::W);
      typename V::reg t[V::W];
      load_transposed<V>(src.data + i * src.row + first + c, src.row, rows - i, width, t);
      for (int r = 0; r < width; ++r) V::store(dst + (c + r) * ld + i, t[r]);
    }
  }
}

template <class S>
LineView<S> line_view(const TensorRef& t, const Grid& grid, int axis, int64_t line) {
  return {line_data<S>(t, grid, axis, line), t.strides.axis[axis]};
}

// A line in the forward pass, query and out from position `i0` on.
template <class S>
struct ForwardViews {
  LineView<const S> query, key, value;
  LineView<S> out;

  ForwardViews(const ForwardArgs& args, int axis, int64_t line, int64_t i0)
      : query(line_view<const S>(args.query, args.grid, axis, line)),
        key(line_view<const S>(args.key, args.grid, axis, line)),
        value(line_view<const S>(args.value, args.grid, axis, line)),
        out(line_view<S>(args.out, args.grid, axis, line)) {
    query.data += i0 * query.row;
    out.data += i0 * out.row;
  }
};

// A line in the backward pass, what belongs to queries from position `i0` on.
template <class S>
struct BackwardViews {
  LineView<const S> query, key, value, out, grad_out;
  LineView<S> grad_query, grad_key, grad_value;

  BackwardViews(const BackwardArgs& args, int axis, int64_t line, int64_t i0)
      : query(line_view<const S>(args.query, args.grid, axis, line)),
        key(line_view<const S>(args.key, args.grid, axis, line)),
        value(line_view<const S>(args.value, args.grid, axis, line)),
        out(line_view<const S>(args.out, args.grid, axis, line)),
        grad_out(line_view<const S>(args.grad_out, args.grid, axis, line)),
        grad_query(line_view<S>(args.grad_query, args.grid, axis, line)),
        grad_key(line_view<S>(args.grad_key, args.grid, axis, line)),
        grad_value(line_view<S>(args.grad_value, args.grid, axis, line)) {
    query.data += i0 * query.row;
    out.data += i0 * out.row;
    grad_out.data += i0 * grad_out.row;
    grad_query.data += i0 * grad_query.row;
  }
};

// The block of queries that a worker handles after this one, perhaps of the next line; none where rows is 0.
struct NextBlock {
  int64_t line, i0, rows;
  int64_t keys;  // that come new with it

  NextBlock(int64_t length, int64_t block, int64_t line_now, int64_t i0_now, bool more, int64_t upcoming) {
    const bool same_line = i0_now + block < length;
    line = same_line || !more ? line_now : upcoming;
    i0 = same_line ? i0_now + block : 0;
    rows = same_line || more ? (length - i0 < block ? length - i0 : block) : 0;
    keys = same_line || rows == 0 ? 0 : length;
  }

  // Asks for its query and key, and where this block's gradients of them go.
  template <class S>
  void ask_narrow(const BackwardArgs& args, int axis, const BackwardViews<S>& now, int64_t rows_now,
                  Ahead* ahead) const {
    const Grid& grid = args.grid;
    ahead->add(now.grad_query.data, now.grad_query.row, rows_now, args.qk_channels);
    ahead->add(now.grad_key.data, now.grad_key.row, grid.size[axis], args.qk_channels);
    ahead->add(line_data<const S>(args.query, grid, axis, line) + i0 * now.query.row, now.query.row, rows,
               args.qk_channels);
    ahead->add(line_data<const S>(args.key, grid, axis, line), now.key.row, keys, args.qk_channels);
  }

  // Asks for the first `cols` channels of its gradient and value.
  template <class S>
  void ask_wide(const BackwardArgs& args, int axis, const BackwardViews<S>& now, int64_t cols, Ahead* ahead) const {
    const Grid& grid = args.grid;
    ahead->add(line_data<const S>(args.grad_out, grid, axis, line) + i0 * now.grad_out.row, now.grad_out.row, rows,
               cols);
    ahead->add(line_data<const S>(args.value, grid, axis, line), now.value.row, rows > 0 ? grid.size[axis] : 0, cols);
  }
};

// Query rows handled at once: the whole line, unless its L x rows energies would overflow the second-level cache.
template <class V>
int64_t rows_per_block(int64_t length, int64_t limit_bytes) {
  int64_t rows = limit_bytes / static_cast<int64_t>(sizeof(typename V::T)) / (length > 0 ? length : 1);
  rows = rows / 48 * 48;
  if (rows < 48) rows = 48;
  return rows < length ? rows : length;
}

// How an axis writes a tensor that the axes add up. Numbers that are converted on the way are never written past the
// caches: that is done straight from the products' registers.
template <class V, class S>
Store axis_store(const Grid& grid, const TensorRef& t, int64_t channels, bool first) {
  if (!first) return Store::kJoin;
  const bool past = std::is_same<S, typename V::T>::value && outgrows_caches(grid, t, channels, sizeof(S));
  return past ? Store::kPastCaches : Store::kReplace;
}
