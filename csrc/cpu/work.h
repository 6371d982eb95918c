// How the kernels of every instruction set walk over lines: scratch memory, and workers that take line after line.
// Included inside each translation unit's anonymous namespace (see line_kernels.h).

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Row stride, in numbers, of a matrix of n columns: whole vectors, and an odd number of cache lines, since rows a
// power of two apart would share a few sets of the first-level cache.
template <class V>
int64_t leading(int64_t n) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(typename V::T));
  const int64_t lines = (n + line - 1) / line;
  return (lines | 1) * line;
}

// Queries of a line that products of bf16 operands take at once, a multiple of 32 unless it is the whole line.
inline int64_t queries_at_once(int64_t length) {
  if (length <= 256) return length;
  const int64_t rows = 256 * 256 / length / 32 * 32;
  return rows < 32 ? 32 : rows;
}

// One worker's memory, cache-line aligned.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : raw_(static_cast<char*>(malloc(static_cast<size_t>(count) * sizeof(T) + 64 * 32))),
        next_(raw_ ? raw_ + (64 - reinterpret_cast<uintptr_t>(raw_) % 64) % 64 : nullptr) {}
  ~Scratch() { free(raw_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return raw_ != nullptr; }
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }

 private:
  char* raw_;
  char* next_;
};

// A masked axis of size 1 has no key at all.
inline bool contributes(const Grid& grid, int axis) { return grid.size[axis] > 1 || keeps_self(grid.axes, axis); }

inline int first_axis(const Grid& grid) {
  int a = 0;
  while (!contributes(grid, a)) ++a;
  return a;
}

// Calls run(axis, whether it is the first, whether it is the last) for the axes that contribute, in order.
template <class F>
void for_axes(const Grid& grid, const F& run) {
  const int first = first_axis(grid);
  for (int axis = first; axis < grid.axes; ++axis) {
    if (contributes(grid, axis)) run(axis, axis == first, axis == grid.axes - 1);
  }
}

// The first n numbers at p, at most a vector of them.
template <class V, class S>
typename V::reg load_some(const S* p, int64_t n) {
  return n >= V::W ? V::load(p) : V::load_n(p, static_cast<int>(n));
}

template <class V, class S>
void store_some(S* p, typename V::reg x, int64_t n) {
  if (n >= V::W) {
    V::store(p, x);
  } else {
    V::store_n(p, x, static_cast<int>(n));
  }
}

// Whole vectors past the caches if so asked: numbers of their own type only, since those of two bytes, half as much to
// write, gain nothing by it. See `outgrows_caches`; V::fence comes before anybody else reads.
template <class V, class S>
void store_some(S* p, typename V::reg x, int64_t n, bool past_caches) {
  if constexpr (std::is_same<S, typename V::T>::value) {
    if (past_caches && n >= V::W) {
      V::stream(p, x);
      return;
    }
  }
  store_some<V>(p, x, n);
}

// The transpose of a square: t[c][r] = p[r * row + c] for r < rows and c < cols, zeros beyond.
template <class V, class S>
void load_transposed(const S* p, int64_t row, int64_t rows, int64_t cols, typename V::reg* t) {
  CCNET_UNROLL
  for (int r = 0; r < V::W; ++r) t[r] = r < rows ? load_some<V>(p + r * row, cols) : V::zero();
  V::transpose(t);
}

// The sum of the vector that lies at p, first to last.
template <class V>
typename V::T sum_lanes(const typename V::T* p) {
  typename V::T sum = 0;
  for (int e = 0; e < V::W; ++e) sum += p[e];
  return sum;
}

template <class S>
S* line_data(const TensorRef& t, const Grid& grid, int axis, int64_t line) {
  return static_cast<S*>(t.data) + line_offset(grid, t.strides, axis, line);
}

// What becomes of a result: it takes the place of what is in memory, or joins it.
enum class Store { kReplace, kPastCaches, kJoin };

// How an axis of the backward pass writes the gradients of query and key.
inline Store narrow_store(const BackwardArgs& args, bool first) {
  return first && !args.accumulate ? Store::kReplace : Store::kJoin;
}

// Whether an axis of the backward pass sums up delta on its way.
inline bool sums_delta(const BackwardArgs& args, bool first) { return first && !args.delta_first; }

// Whether a result of so many bytes should be written past the caches: it is too large to wait there for whoever reads
// it next, and written so it is not fetched from memory only to be overwritten. Only whole cache lines can be: `steps`
// has the bits of all distances between rows, and of their length, in bytes.
inline bool outgrows_caches(const void* data, int64_t bytes, int64_t steps) {
  constexpr int64_t line = 64, large = 8 << 20;
  return bytes > large && steps % line == 0 && reinterpret_cast<uintptr_t>(data) % line == 0;
}

// The same of a tensor, which the first axis writes and the next one reads; `size` is a number's.
inline bool outgrows_caches(const Grid& grid, const TensorRef& t, int64_t channels, int64_t size) {
  int64_t steps = channels | t.strides.batch;
  for (int a = 0; a < grid.axes; ++a) steps |= t.strides.axis[a];
  return outgrows_caches(t.data, grid.batch * grid.positions() * channels * size, steps * size);
}

// Hands out items 0 .. count-1 to the workers of one parallel region: runs of neighbours, which share pages of memory,
// and shorter ones towards the end, so that all workers finish together.
template <class Args, class Worker>
void run_items(const Args& args, int64_t count, const Worker& worker) {
  struct Context {
    std::atomic<int64_t> next;
    int64_t count, workers;
    const Worker* worker;
    std::atomic<bool> out_of_memory;

    bool take(int64_t* begin, int64_t* end) {
      int64_t from = next.load(std::memory_order_relaxed), run;
      do {
        if (from >= count) return false;
        const int64_t share = (count - from) / (2 * workers);
        run = share > 1 ? share : 1;
      } while (!next.compare_exchange_weak(from, from + run, std::memory_order_relaxed));
      *begin = from;
      *end = from + run;
      return true;
    }
  } context{{0}, count, args.workers < count ? args.workers : count, &worker, {false}};
  if (context.workers <= 0) return;
  args.parallel(
      static_cast<int>(context.workers),
      [](void* p, int) {
        Context* c = static_cast<Context*>(p);
        int64_t at = 0, end = 0;
        const bool ok = (*c->worker)([c, &at, &end](int64_t* item) {
          if (at == end && !c->take(&at, &end)) return false;
          *item = at++;
          return true;
        });
        if (!ok) c->out_of_memory = true;
      },
      &context);
  if (context.out_of_memory) throw std::bad_alloc();
}
