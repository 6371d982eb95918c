// A CTA on the CPU: its threads are fibers that run one at a time and change at barriers and warp collectives. Memory
// is shadowed, so that what a GPU would leave undefined is an error here:
//   - two threads that touch the same shared memory, one of them writing, with no barrier in between;
//   - shared memory read before it was written, or touched while an asynchronous copy is under way;
//   - two CTAs of one launch, or two threads of a CTA with no barrier in between, that touch the same global memory,
//     one of them writing;
//   - global memory outside the registered tensors, outputs read before they were written, misaligned accesses;
//   - threads that do not meet at a barrier, or lanes that do not call the same warp collective.
// Asynchronous copies land either at once or not before the wait, and threads take turns in several orders: results
// must not depend on it. Bank conflicts are counted. Single-threaded; one Machine at a time.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace ccnet {
namespace emulation {

enum class Order { kAscending, kDescending, kRandom };

// Deliberate faults of the machine; the checks and the oracle must notice each.
enum class Fault {
  kNone,
  kSkipBarrier,      // one barrier in three does not exist
  kCopyLate,         // a wait leaves the copies under way
  kSwapFragments,    // words 1 and 2 of ldmatrix exchanged
  kTransposeMma,     // the fragment of A read as if transposed
  kShuffleNeighbour, // shuffles deliver the next lane's value
  kDropTail,         // copies of fewer than 16 bytes deliver nothing
};

struct Options {
  Order order = Order::kAscending;
  bool copies_land_late = true;
  uint32_t seed = 1;
  Fault fault = Fault::kNone;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Machine {
 public:
  static Machine*& current() {
    static Machine* machine = nullptr;
    return machine;
  }

  explicit Machine(const Options& options) : options_(options), random_(options.seed) { current() = this; }
  ~Machine() { current() = nullptr; }
  Machine(const Machine&) = delete;

  // Global memory that kernels may touch. Outputs start unwritten.
  void add_region(const void* data, size_t bytes, bool writable, const char* name) {
    Region region;
    region.begin = reinterpret_cast<uintptr_t>(data);
    region.end = region.begin + bytes;
    region.writable = writable;
    region.name = name;
    region.cells.resize((bytes + kUnit - 1) / kUnit);
    for (Cell& cell : region.cells) cell.written = !writable;
    regions_.push_back(std::move(region));
  }
  // Throws unless every byte of the outputs has been written.
  void check_outputs_written() const {
    for (const Region& region : regions_) {
      for (size_t i = 0; i < region.cells.size(); ++i) {
        if (!region.cells[i].written) {
          throw Error(std::string(region.name) + ": byte " + std::to_string(i * kUnit) + " was never written");
        }
      }
    }
  }
  // Bytes of global memory asked for, caches left out.
  int64_t bytes_read() const { return bytes_read_; }
  int64_t bytes_written() const { return bytes_written_; }
  long bank_conflicts() const { return bank_conflicts_; }
  long matrix_loads() const { return matrix_loads_; }

  void run_grid(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
    ++launch_;
    std::vector<int64_t> order(static_cast<size_t>(blocks));
    for (int64_t b = 0; b < blocks; ++b) order[static_cast<size_t>(b)] = b;
    if (options_.order == Order::kDescending) std::reverse(order.begin(), order.end());
    if (options_.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random_);
    for (int64_t b : order) run_block(b, threads, shared_bytes, kernel);
  }

  // What the running thread asks for.
  int thread() const { return running_; }
  int64_t block() const { return block_; }
  char* shared() { return shared_; }

  void barrier() {
    if (options_.fault == Fault::kSkipBarrier && ++fibers_[static_cast<size_t>(running_)].barriers % 3 == 0) return;
    ++at_barrier_;
    if (at_barrier_ == threads_) {
      at_barrier_ = 0;
      ++epoch_;
      for (Fiber& f : fibers_) f.waiting = false;
      return;
    }
    wait();
  }

  // Every lane of the warp passes its operand; the last to arrive runs `all` on the 32 of them.
  void collective(int kind, void* operand, void (*all)(Machine&, void* const* operands)) {
    Warp& warp = warps_[static_cast<size_t>(running_ / 32)];
    if (warp.arrived == 0) warp.kind = kind;
    if (warp.kind != kind) throw Error("lanes of one warp call different collectives");
    warp.operands[running_ % 32] = operand;
    if (++warp.arrived < 32) {
      wait();
      return;
    }
    warp.arrived = 0;
    all(*this, warp.operands);
    for (int lane = 0; lane < 32; ++lane) fibers_[static_cast<size_t>(running_ / 32 * 32 + lane)].waiting = false;
  }

  void shared_access(const char* p, int bytes, bool write, int thread) {
    const int64_t offset = p - shared_;
    if (offset < 0 || offset + bytes > shared_bytes_) throw Error("shared memory: access out of bounds");
    if (offset % bytes != 0) throw Error("shared memory: misaligned access");
    for (int64_t i = offset / kUnit; i < (offset + bytes) / kUnit; ++i) {
      SharedCell& cell = shared_cells_[static_cast<size_t>(i)];
      if (cell.copying) throw Error("shared memory: touched while a copy into it is under way");
      if (cell.written_at == epoch_ && cell.writer != thread) {
        throw Error(write ? "shared memory: two threads write without a barrier between"
                          : "shared memory: read without a barrier after another thread's write");
      }
      if (write) {
        if (cell.read_at == epoch_ && cell.reader != thread) {
          throw Error("shared memory: written without a barrier after another thread's read");
        }
        cell.written_at = epoch_;
        cell.writer = thread;
      } else {
        if (cell.written_at == 0) throw Error("shared memory: read before it was written");
        if (cell.read_at == epoch_ && cell.reader != thread) {
          cell.reader = kSeveral;
        } else {
          cell.reader = thread;
        }
        cell.read_at = epoch_;
      }
    }
  }

  void global_access(const void* p, int bytes, bool write) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (address % static_cast<uintptr_t>(bytes) != 0) throw Error("global memory: misaligned access");
    (write ? bytes_written_ : bytes_read_) += bytes;
    Region& region = find(address, static_cast<uintptr_t>(bytes));
    if (write && !region.writable) throw Error(std::string(region.name) + ": is not an output");
    for (uintptr_t i = (address - region.begin) / kUnit; i < (address - region.begin + bytes) / kUnit; ++i) {
      touch(region, region.cells[i], write);
    }
  }

  void copy_async(char* to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) throw Error("global memory: misaligned copy");
    shared_access(to, 16, true, running_);
    bytes_read_ += bytes;
    if (bytes > 0) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(from);
      Region& region = find(address, static_cast<uintptr_t>(bytes));
      for (uintptr_t i = (address - region.begin) / kUnit; i < (address - region.begin + bytes) / kUnit; ++i) {
        touch(region, region.cells[i], false);
      }
    }
    if (options_.fault == Fault::kDropTail && bytes < 16) bytes = 0;
    Copy copy{to, {}};
    memcpy(copy.data, from, static_cast<size_t>(bytes));
    if (!options_.copies_land_late) memcpy(to, copy.data, 16);
    mark(to, true);
    fibers_[static_cast<size_t>(running_)].copies.push_back(copy);
  }

  void wait_copies() {
    Fiber& fiber = fibers_[static_cast<size_t>(running_)];
    if (options_.fault == Fault::kCopyLate && fiber.copies.size() > 0 && ++late_ % 7 == 0) return;
    for (const Copy& copy : fiber.copies) {
      memcpy(copy.to, copy.data, 16);
      mark(copy.to, false);
      shared_access(copy.to, 16, true, running_);
    }
    fiber.copies.clear();
  }

  void count_matrix_rows(void* const* rows) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned groups = 0;
      for (int r = 0; r < 8; ++r) {
        groups |= 1u << (static_cast<const char*>(rows[8 * matrix + r]) - shared_) / 16 % 8;
      }
      ++matrix_loads_;
      if (groups != 0xffu) ++bank_conflicts_;
    }
  }

  const Options& options() const { return options_; }

 private:
  static constexpr int kUnit = 2;  // bytes for each shadow cell
  static constexpr int kSeveral = -2;
  static constexpr size_t kStackBytes = 64 * 1024;

  struct Copy {
    char* to;
    char data[16];
  };
  struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started = false, waiting = false, done = false;
    int barriers = 0;
    std::vector<Copy> copies;
    std::unique_ptr<char[]> stack;
  };
  struct Warp {
    int arrived = 0, kind = 0;
    void* operands[32];
  };
  struct SharedCell {
    int64_t written_at = 0, read_at = 0;  // epochs; 0 is never
    int writer = -1, reader = -1;
    bool copying = false;
  };
  struct Cell {
    bool written = false;
    int64_t write_launch = 0, read_launch = 0;
    int64_t write_block = -1, read_block = -1;
    int64_t write_epoch = 0, read_epoch = 0;
    int writer = -1, reader = -1;
  };
  struct Region {
    uintptr_t begin, end;
    bool writable;
    const char* name;
    std::vector<Cell> cells;
  };

  Region& find(uintptr_t address, uintptr_t bytes) {
    for (Region& region : regions_) {
      if (address >= region.begin && address + bytes <= region.end) return region;
    }
    throw Error("global memory: access outside every tensor");
  }

  void touch(Region& region, Cell& cell, bool write) {
    if (!region.writable) return;
    const auto clash = [&](int64_t launch, int64_t block, int64_t epoch, int thread) {
      return launch == launch_ && (block != block_ || (epoch == epoch_ && thread != running_));
    };
    if (clash(cell.write_launch, cell.write_block, cell.write_epoch, cell.writer)) {
      throw Error(std::string(region.name) + ": " + (write ? "written twice" : "read after a write") +
                  " in one launch by threads that are not ordered");
    }
    if (write) {
      if (clash(cell.read_launch, cell.read_block, cell.read_epoch, cell.reader)) {
        throw Error(std::string(region.name) + ": written after a read in one launch by threads that are not ordered");
      }
      cell.written = true;
      cell.write_launch = launch_;
      cell.write_block = block_;
      cell.write_epoch = epoch_;
      cell.writer = running_;
    } else {
      if (!cell.written) throw Error(std::string(region.name) + ": read before it was written");
      const bool again = cell.read_launch == launch_;
      const bool same_block = again && cell.read_block == block_;
      cell.reader = same_block && cell.read_epoch == epoch_ && cell.reader != running_ ? kSeveral : running_;
      cell.read_block = again && !same_block ? kSeveral : block_;
      cell.read_launch = launch_;
      cell.read_epoch = epoch_;
    }
  }

  void mark(const char* to, bool copying) {
    for (int64_t i = (to - shared_) / kUnit; i < (to - shared_ + 16) / kUnit; ++i) {
      SharedCell& cell = shared_cells_[static_cast<size_t>(i)];
      cell.copying = copying;
      // The issue counted as a write for the checks; the landing counts anew.
      if (!copying) cell.writer = running_, cell.written_at = 0, cell.read_at = 0;
    }
  }

  void wait() {
    Fiber& fiber = fibers_[static_cast<size_t>(running_)];
    fiber.waiting = true;
    if (_setjmp(fiber.at) == 0) _longjmp(scheduler_, 1);
  }

  static void enter() {
    Machine& machine = *current();
    try {
      (*machine.kernel_)();
    } catch (const std::exception& e) {
      machine.error_ = e.what();
    }
    machine.fibers_[static_cast<size_t>(machine.running_)].done = true;
    _longjmp(machine.scheduler_, 1);
  }

  // The scheduler's frame outlives every fiber's turn.
  void resume(int thread) {
    running_ = thread;
    Fiber& fiber = fibers_[static_cast<size_t>(thread)];
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Machine::enter, 0);
    setcontext(&fiber.start);
  }

  void run_block(int64_t block, int threads, int shared_bytes, const std::function<void()>& kernel) {
    block_ = block;
    threads_ = threads;
    kernel_ = &kernel;
    shared_bytes_ = shared_bytes;
    shared_memory_.assign(static_cast<size_t>(shared_bytes) + 1024, static_cast<char>(0xff));  // NaN in every type
    const uintptr_t base = reinterpret_cast<uintptr_t>(shared_memory_.data());
    shared_ = shared_memory_.data() + (1024 - base % 1024) % 1024;
    shared_cells_.assign(static_cast<size_t>(shared_bytes / kUnit), SharedCell());
    ++epoch_;
    at_barrier_ = 0;
    error_.clear();
    while (fibers_.size() < static_cast<size_t>(threads)) {
      fibers_.emplace_back();
      fibers_.back().stack.reset(new char[kStackBytes]);
    }
    fibers_.resize(static_cast<size_t>(threads));
    warps_.assign(static_cast<size_t>(threads / 32), Warp());
    std::vector<int> order(static_cast<size_t>(threads));
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers_[static_cast<size_t>(t)];
      fiber.started = fiber.waiting = fiber.done = false;
      fiber.barriers = 0;
      fiber.copies.clear();
      order[static_cast<size_t>(t)] = t;
    }
    if (options_.order == Order::kDescending) std::reverse(order.begin(), order.end());
    for (int left = threads; left > 0;) {
      if (options_.order == Order::kRandom) {
        // Whole warps change places, and sometimes only a few take a turn: they drift apart as far as barriers allow.
        std::vector<int> warps(static_cast<size_t>(threads / 32));
        for (size_t w = 0; w < warps.size(); ++w) warps[w] = static_cast<int>(w);
        std::shuffle(warps.begin(), warps.end(), random_);
        warps.resize(1 + random_() % warps.size());
        order.clear();
        for (int w : warps) {
          for (int lane = 0; lane < 32; ++lane) order.push_back(32 * w + (lane * 5 + 3) % 32);
        }
      }
      bool progress = false;
      for (int t : order) {
        Fiber& fiber = fibers_[static_cast<size_t>(t)];
        if (fiber.done || fiber.waiting) continue;
        resume(t);
        progress = true;
        if (!error_.empty()) {
          throw Error(error_ + " (block " + std::to_string(block) + ", thread " + std::to_string(t) + ")");
        }
        if (fiber.done) {
          --left;
          if (!fiber.copies.empty()) throw Error("a thread ended with copies under way");
        }
      }
      if (!progress && left > 0) {  // a random order may have left out the warps that can go on
        const auto runs = [](const Fiber& f) { return !f.done && !f.waiting; };
        if (std::none_of(fibers_.begin(), fibers_.end(), runs)) throw Error("deadlock: threads wait for each other");
      }
    }
  }

  Options options_;
  std::mt19937 random_;
  std::vector<Region> regions_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<char> shared_memory_;
  std::vector<SharedCell> shared_cells_;
  char* shared_ = nullptr;
  int64_t shared_bytes_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  jmp_buf scheduler_;
  std::string error_;
  int running_ = 0, threads_ = 0, at_barrier_ = 0;
  int64_t block_ = 0, launch_ = 0, epoch_ = 0;
  int64_t bytes_read_ = 0, bytes_written_ = 0;
  long bank_conflicts_ = 0, matrix_loads_ = 0, late_ = 0;
};

}  // namespace emulation
}  // namespace ccnet
