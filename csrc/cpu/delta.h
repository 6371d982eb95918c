// delta ahead of the backward pass, which otherwise sums it up on its way. Included inside each translation unit's
// anonymous namespace, after work.h.

template <class V, class S>
void sum_delta(const BackwardArgs& args) {
  using T = typename V::T;
  const Grid& grid = args.grid;
  const int axis = grid.axes - 1;
  const int64_t g_row = args.grad_out.strides.axis[axis], o_row = args.out.strides.axis[axis];
  const Strides stat = scalar_strides(grid);
  run_items(args, grid.lines(axis), [&](auto next) {
    for (int64_t line; next(&line);) {
      const S* g = line_data<const S>(args.grad_out, grid, axis, line);
      const S* o = line_data<const S>(args.out, grid, axis, line);
      T* delta = static_cast<T*>(args.delta) + line_offset(grid, stat, axis, line);
      for (int64_t i = 0; i < grid.size[axis]; ++i, g += g_row, o += o_row) {
        typename V::reg sum = V::zero();
        for (int64_t c = 0; c < args.channels; c += V::W) {
          const int64_t n = args.channels - c;
          sum = V::fma(load_some<V>(g + c, n), load_some<V>(o + c, n), sum);
        }
        T lanes[V::W];
        V::store(lanes, sum);
        delta[i * stat.axis[axis]] = sum_lanes<V>(lanes);
      }
    }
    return true;
  });
}
