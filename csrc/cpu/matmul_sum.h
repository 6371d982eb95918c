// What products whose sums are long share whatever units multiply: how they are divided among the workers, and how the
// sums are put together. Included inside each translation unit's anonymous namespace, after matmul_blocks.h.

// How a sum over long columns is divided: into parts of the result's rows, and runs of k whose sums are added up.
struct SumTasks {
  int64_t parts, part_tiles, runs;

  // Tiles are of 16 x 16 numbers; a part has `most_tiles` of them at most where two rows of tiles are no more.
  SumTasks(int64_t m_tiles, int64_t n_tiles, int64_t chunks, int64_t workers, int64_t most_tiles)
      : parts(1), part_tiles(m_tiles), runs(1) {
    // No part larger than fits the second-level cache beside its operands; of the others, the division that leaves the
    // fewest workers idle. The right operand is packed again for every part.
    const int64_t least = (m_tiles * n_tiles + most_tiles - 1) / most_tiles, most = (m_tiles + 7) / 8;
    double best = 0;
    for (int64_t p = least; p <= most || p == least; ++p) {
      const int64_t r = smaller((workers + p - 1) / p, chunks), rounds = (p * r + workers - 1) / workers;
      const double busy = static_cast<double>(p * r) / static_cast<double>(rounds * workers);
      if (busy <= best) continue;
      best = busy;
      part_tiles = ((m_tiles + p - 1) / p + 1) / 2 * 2;
      parts = (m_tiles + part_tiles - 1) / part_tiles;
      runs = r;
    }
  }
};

// to = from, or to += from: rows of whole vectors in `from`, of which `columns` numbers are there in `to`.
template <class V>
void fold(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t columns, bool add) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += V::W) {
      typename V::reg y = V::load(from + r * from_row + c);
      if (add) y = V::add(y, load_some<V>(to + r * to_row + c, columns - c));
      store_some<V>(to + r * to_row + c, y, columns - c);
    }
  }
}

// Rows of the result, over one run of chunks of k.
struct SumPart {
  int64_t row, rows;
  int64_t first, last;  // chunks
  float* to;
  int64_t to_row;
};

// The result, and beside it the sums of runs after the first.
template <class V>
class Sums {
 public:
  Sums(const MatmulArgs& args, const SumTasks& tasks, int64_t chunks)
      : args_(args),
        tasks_(tasks),
        chunks_(chunks),
        ld_(round_up(args.columns, V::W)),
        memory_((tasks.runs - 1) * args.rows * ld_) {
    if (!memory_.ok()) throw std::bad_alloc();
    others_ = memory_.take((tasks.runs - 1) * args.rows * ld_);
  }

  int64_t tasks() const { return tasks_.parts * tasks_.runs; }

  SumPart part(int64_t task) const {
    const int64_t run = task / tasks_.parts, row = task % tasks_.parts * tasks_.part_tiles * 16;
    const int64_t rows = smaller(args_.rows - row, tasks_.part_tiles * 16);
    const int64_t first = chunks_ * run / tasks_.runs, last = chunks_ * (run + 1) / tasks_.runs;
    if (run == 0) return {row, rows, first, last, result(row), args_.out.row};
    return {row, rows, first, last, other(run, row), ld_};
  }

  // Adds them up, first to last, when all parts are there.
  void join() const {
    if (tasks_.runs == 1) return;
    run_items(args_, args_.rows, [&](auto next) {
      for (int64_t r; next(&r);) {
        for (int64_t run = 1; run < tasks_.runs; ++run) {
          fold<V>(result(r), 0, other(run, r), 0, 1, args_.columns, true);
        }
      }
      return true;
    });
  }

 private:
  float* result(int64_t row) const { return static_cast<float*>(args_.out.data) + row * args_.out.row; }
  float* other(int64_t run, int64_t row) const { return others_ + ((run - 1) * args_.rows + row) * ld_; }

  const MatmulArgs& args_;
  const SumTasks& tasks_;
  int64_t chunks_, ld_;
  Scratch<float> memory_;
  float* others_;
};
