// Work for the vector units beside products of the matrix units. Included inside an anonymous namespace, after ahead.h
// (see line_kernels_split.h).

// What the vector units do while the matrix units multiply: a product takes a step of it after every four products of
// tiles, in small portions, since a processor looks only some hundred instructions ahead.
class Background {
 public:
  Ahead ahead;

  // Adds a packer, at most two at a time.
  template <class Packer>
  void add(const Packer* packer) {
    jobs_[size_++] = Job(packer, packer->units());
  }

  // Spreads what was added over so many steps.
  void spread(int64_t steps) {
    ahead.spread(steps);
    for (int i = 0; i < size_; ++i) jobs_[i].spread(steps, i * kUnit / 2);  // by turns
  }

  // What is to become of a product's last block, during the next block's steps: rows(0) ... rows(count - 1).
  template <class Rows>
  void hand_on(const Rows* rows, int64_t count, int64_t steps) {
    rows_ = Job(rows, count);
    rows_.spread(steps, 0);
  }
  void finish_rows() { rows_.finish(); }

  __attribute__((noinline)) void step() {
    ahead.ask();
    rows_.step();
    for (int i = 0; i < size_; ++i) jobs_[i].step();
  }

  // Does what is left, and forgets it.
  void finish() {
    finish_rows();
    for (int i = 0; i < size_; ++i) jobs_[i].finish();
    size_ = 0;
    ahead = Ahead();
  }

 private:
  static constexpr int64_t kUnit = 1 << 16;

  class Job {
   public:
    Job() = default;
    template <class Units>
    Job(const Units* units, int64_t count)
        : run_([](const void* it, int64_t unit) { (*static_cast<const Units*>(it))(unit); }),
          it_(units),
          count_(count) {}

    void spread(int64_t steps, int64_t credit) {
      rate_ = steps > 0 ? (count_ * kUnit + steps - 1) / steps : 0;
      credit_ = credit;
    }
    void step() {
      for (credit_ += rate_; credit_ >= kUnit && next_ < count_; credit_ -= kUnit) run_(it_, next_++);
    }
    void finish() {
      while (next_ < count_) run_(it_, next_++);
    }

   private:
    void (*run_)(const void*, int64_t) = nullptr;
    const void* it_ = nullptr;
    int64_t next_ = 0, count_ = 0;
    int64_t rate_ = 0, credit_ = 0;  // in units, kUnit times as many
  };

  Job rows_, jobs_[2];
  int size_ = 0;
};
