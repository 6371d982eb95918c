// Asks for memory while the processor computes. Included inside each translation unit's anonymous namespace (see
// line_kernels.h).

// The lines of an image's slow axes are far apart, which no hardware prefetcher follows, and a core has few misses
// under way at once, for which its own loads wait as well: the requests are spread evenly over what is computed
// meanwhile.
class Ahead {
 public:
  // `cols` numbers of each of `rows` rows, `row` numbers apart.
  template <class S>
  void add(const S* first, int64_t row, int64_t rows, int64_t cols) {
    constexpr int64_t size = static_cast<int64_t>(sizeof(S));
    if (rows <= 0 || cols <= 0) return;
    streams_[count_++] = {reinterpret_cast<const char*>(first), row * size, rows, cols * size};
    lines_ += rows * ((cols * size + kLine - 1) / kLine);
  }
  // Spreads what was added over `steps` steps.
  void spread(int64_t steps) {
    quota_ = steps > 0 ? (lines_ + steps - 1) / steps : lines_;
    next_row();
  }
  // A step is done. The same number of requests each time, since a count that varies would be mispredicted.
  void ask() {
    for (int64_t n = 0; n < quota_; ++n) {
      CCNET_PREFETCH(at_);
      at_ += kLine;
      if (at_ >= end_) next_row();
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Stream {
    const char* at;
    int64_t step, rows, bytes;
  };

  void next_row() {
    if (current_ == count_) {
      quota_ = 0;
      return;
    }
    Stream& s = streams_[current_];
    at_ = s.at;
    end_ = s.at + s.bytes;
    s.at += s.step;
    if (--s.rows == 0) ++current_;
  }

  Stream streams_[8];
  const char *at_ = nullptr, *end_ = nullptr;
  int count_ = 0, current_ = 0;
  int64_t lines_ = 0, quota_ = 0;
};
