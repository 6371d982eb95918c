// A cluster of CTAs on the CPU: their threads are fibers that run one at a time and change at barriers and warp
// collectives. Memory is shadowed, so that what a GPU would leave undefined is an error here:
//   - two threads that touch the same shared memory, one of them writing, with no barrier in between;
//   - shared memory read before it was written, or touched while an asynchronous copy is under way;
//   - two clusters of one launch, or two threads of a cluster with no barrier in between, that touch the same global
//     memory, one of them writing;
//   - global memory outside the registered tensors, outputs read before they were written, misaligned accesses;
//   - threads that do not meet at a barrier, lanes of a warp that wait for one at different places of the program, or
//     that do not call the same warp collective;
//   - boxes (TMA) and products of a warpgroup (wgmma) on shared memory that ordinary accesses, or each other, may still
//     touch: a box is there for the threads that waited for its phase, a product is done for those that waited for its
//     group, and ordinary writes reach both only after a fence and a barrier;
//   - registers touched while a product uses them;
//   - shared memory of another CTA; arrivals at its barriers once it has ended, and waits for them that leave out what
//     was done before;
//   - a launch that touches what an earlier one it overlaps with may still touch.
// Asynchronous work happens either at once or as late as someone's wait allows, and threads take turns in several
// orders: results must not depend on it. What is ordered is decided by clocks (clocks.h), not by the turns taken. Bank
// conflicts are counted. Single-threaded; one Machine at a time.
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
#include <string>
#include <vector>

#include "global_shadow.h"
#include "launch_order.h"
#include "phase_barrier.h"
#include "products.h"
#include "shared_shadow.h"

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
  kSkipPhase,           // one wait in three for a phase does not wait
  kWrongParity,         // one wait in three for a phase waits for the other parity
  kRefillEarly,         // the first arrival ends the wait for barriers at which threads arrive without bytes
  kLoseArrival,         // one arrival in seven is lost
  kSkipFence,           // fence_shared_for_async() does nothing
  kPlainBox,            // boxes are not swizzled
  kKeepOutside,         // what of a box lies outside the tensor is left as it was
  kTransposeDescriptor, // matrices in shared memory are read as if transposed
  kWaitTooLittle,       // waits for products leave one more group under way
  kSkipLaunchWait,      // wait_for_previous_launch() does nothing
  kSkipStoreWait,       // wait_stores_read() does nothing
};

// Of a call in the kernels' sources.
struct Place {
  const char* file = "";
  int line = 0;

  bool operator==(const Place& other) const { return line == other.line && strcmp(file, other.file) == 0; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

struct Options {
  Order order = Order::kAscending;
  bool copies_land_late = true;
  uint32_t seed = 1;
  Fault fault = Fault::kNone;
};

class Machine {
 public:
  static Machine*& current() {
    static Machine* machine = nullptr;
    return machine;
  }

  explicit Machine(const Options& options) : options_(options), random_(options.seed), shadow_(clocks_), global_(clocks_) {
    current() = this;
  }
  ~Machine() { current() = nullptr; }
  Machine(const Machine&) = delete;

  // Global memory that kernels may touch. Outputs start unwritten.
  void add_region(const void* data, size_t bytes, bool writable, const char* name) {
    global_.add_region(data, bytes, writable, name);
  }
  // Throws unless every byte of the outputs has been written.
  void check_outputs_written() const { global_.check_outputs_written(); }
  // Bytes of global memory asked for, caches left out.
  int64_t bytes_read() const { return bytes_read_; }
  int64_t bytes_written() const { return bytes_written_; }
  long bank_conflicts() const { return bank_conflicts_; }
  long matrix_loads() const { return matrix_loads_; }

  // `overlaps_previous`: the launch may begin as soon as all CTAs of the one before have allowed it.
  void run_grid(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel,
                bool overlaps_previous = false, int cluster_blocks = 1) {
    if (shared_bytes > kMostSharedBytes) throw Error("more shared memory than a CTA can have");
    if (threads % 32 != 0 || threads > 1024) throw Error("a CTA of " + std::to_string(threads) + " threads");
    if (blocks % cluster_blocks != 0) throw Error("a grid of no whole number of clusters");
    launches_.begin(overlaps_previous);
    threads_ = threads;
    ctas_ = cluster_blocks;
    shared_bytes_ = shared_bytes;
    shared_stride_ = (shared_bytes / kSwizzlePeriod + 1) * kSwizzlePeriod;
    kernel_ = &kernel;
    std::vector<int64_t> order;
    for (int64_t b = 0; b < blocks; b += cluster_blocks) order.push_back(b);
    if (options_.order == Order::kDescending) std::reverse(order.begin(), order.end());
    if (options_.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random_);
    for (int64_t b : order) run_cluster(b);
  }

  // What the running thread asks for.
  int thread() const { return running_ % threads_; }
  int cluster_thread() const { return running_; }
  int64_t block() const { return first_block_ + cta(); }
  int cluster_rank() const { return cta(); }
  char* shared() { return shared_ + cta() * shared_stride_; }
  int64_t shared_address(const void* p) { return static_cast<const char*>(p) - shared(); }

  void barrier(const Place& place) {
    if (options_.fault == Fault::kSkipBarrier && ++running().barriers % 3 == 0) return;
    gather_warp(place);
    gather_all(at_barrier_[static_cast<size_t>(cta())], cta() * threads_, threads_);
  }
  void cluster_barrier(const Place& place) {
    gather_warp(place);
    gather_all(at_cluster_barrier_, 0, ctas_ * threads_);
  }
  void named_barrier(int number, int threads, const Place& place) {
    if (number < 1 || number >= kNamedBarriers) throw Error("a barrier's number is not within 1 and 15");
    if (threads % 32 != 0 || threads < 32 || threads > threads_) throw Error("a barrier of no whole number of warps");
    if (options_.fault == Fault::kSkipBarrier && ++running().barriers % 3 == 0) return;
    gather_warp(place);
    NamedBarrier& b = named_[static_cast<size_t>(cta() * kNamedBarriers + number)];
    if (b.arrived.empty()) b.threads = threads;
    if (b.threads != threads) throw Error("threads give different counts to one barrier");
    b.arrived.push_back(running_);
    if (static_cast<int>(b.arrived.size()) < threads) {
      wait(Wait::kBarrier);
      return;
    }
    clocks_.synchronize(b.arrived);
    wake(b.arrived);
    b.arrived.clear();
  }

  // Every lane of the warp passes its operand; the last to arrive runs `all` on the 32 of them.
  void collective(int kind, void* operand, void (*all)(Machine&, void* const* operands)) {
    meet(warps_[static_cast<size_t>(running_ / 32)], 32, kind, operand, all);
  }
  void converge_warp() {
    collective(kConverge, nullptr, [](Machine& m, void* const*) {
      std::vector<int> lanes(32);
      for (int lane = 0; lane < 32; ++lane) lanes[static_cast<size_t>(lane)] = m.running_ / 32 * 32 + lane;
      m.clocks_.synchronize(lanes);
    });
  }

  void shared_access(const char* p, int bytes, bool write, int thread) {
    const int64_t offset = shared_offset(p);
    if (offset >= 0 && offset / shared_stride_ != thread / threads_) throw Error("shared memory of another CTA");
    shadow_.touch(offset, bytes, write, thread, [&](int b) {
      return barriers_[static_cast<size_t>(b)].seen[static_cast<size_t>(thread)];
    });
  }

  void global_access(const void* p, int bytes, bool write) {
    if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0) {
      throw Error("global memory: misaligned access");
    }
    (write ? bytes_written_ : bytes_read_) += bytes;
    touch_global(p, bytes, write ? GlobalShadow::Access::kWrite : GlobalShadow::Access::kRead);
  }

  void copy_async(char* to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) throw Error("global memory: misaligned copy");
    shared_access(to, 16, true, running_);
    bytes_read_ += bytes;
    touch_global(from, bytes, GlobalShadow::Access::kRead);
    if (options_.fault == Fault::kDropTail && bytes < 16) bytes = 0;
    Copy copy{to, {}};
    memcpy(copy.data, from, static_cast<size_t>(bytes));
    if (!options_.copies_land_late) memcpy(to, copy.data, 16);
    shadow_.begin_copy(shared_offset(to));
    fibers_[static_cast<size_t>(running_)].copies.push_back(copy);
  }

  void wait_copies() {
    Fiber& fiber = running();
    if (options_.fault == Fault::kCopyLate && fiber.copies.size() > 0 && ++late_ % 7 == 0) return;
    for (const Copy& copy : fiber.copies) {
      memcpy(copy.to, copy.data, 16);
      shadow_.land_copy(shared_offset(copy.to));
      shared_access(copy.to, 16, true, running_);
    }
    fiber.copies.clear();
  }

  void count_matrix_rows(void* const* rows) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned groups = 0;
      for (int r = 0; r < 8; ++r) {
        groups |= 1u << shared_offset(rows[8 * matrix + r]) / 16 % 8;
      }
      ++matrix_loads_;
      if (groups != 0xffu) ++bank_conflicts_;
    }
  }

  // Barriers in shared memory.
  void init_phase_barrier(const char* at, int count) {
    const int64_t offset = shared_offset(at);
    for (const PhaseBarrier& b : barriers_) {
      if (b.offset == offset) throw Error(b.name() + " is initialised twice");
    }
    if (count < 1) throw Error("a barrier in shared memory of no arrivals");
    if (barriers_.size() == Clocks::kMostBarriers) throw Error("more barriers in shared memory than are counted here");
    shared_access(at, 8, true, running_);
    shadow_.make_barrier(offset);
    PhaseBarrier b;
    b.offset = offset;
    b.byte = offset % shared_stride_;
    b.count = b.missing = count;
    b.owner = running_;
    b.seen.assign(fibers_.size(), 0);
    barriers_.push_back(std::move(b));
  }
  void fence_phase_barriers() {
    for (PhaseBarrier& b : barriers_) {
      if (b.owner == running_ && b.fenced_at == 0) b.fenced_at = clocks_.now(running_);
    }
  }
  // One arrival, and so many bytes more to wait for.
  void arrive(const char* at, int bytes) {
    PhaseBarrier& b = barriers_[find_barrier(at)];
    if (bytes < 0 || bytes >= 1 << 20) throw Error(b.name() + ": bytes out of range");
    arrive(b, bytes);
  }
  // At the barrier in the same place of another CTA.
  void arrive_in_cluster(const char* at, int rank) {
    if (rank < 0 || rank >= ctas_) throw Error("no CTA of the cluster has number " + std::to_string(rank));
    const auto first = fibers_.begin() + rank * threads_;
    if (std::all_of(first, first + threads_, [](const Fiber& f) { return f.done; })) {
      throw Error("an arrival at a barrier of a CTA that has ended");
    }
    PhaseBarrier& b = barriers_[find_barrier(at + (rank - cta()) * shared_stride_)];
    if (rank != cta()) b.from_afar = true;
    arrive(b, 0);
  }
  // `in_cluster`: of all its threads the work before their arrivals is waited for, not of those of this CTA only.
  void wait_phase(const char* at, int parity, bool in_cluster = false) {
    const size_t number = find_barrier(at);
    if (parity != 0 && parity != 1) throw Error("a phase's parity is 0 or 1");
    if (options_.fault == Fault::kSkipPhase && ++faults_ % 3 == 0) return;
    if (options_.fault == Fault::kWrongParity && ++faults_ % 3 == 0) parity ^= 1;
    // The parity of the current phase means to wait for its end, the other parity for that of the phase before.
    while (static_cast<int>(barriers_[number].ended & 1) == parity) {
      if (options_.fault == Fault::kRefillEarly && barriers_[number].plain) return;
      running().phase = number;
      wait(Wait::kPhase);
    }
    PhaseBarrier& b = barriers_[number];
    if (b.from_afar && !in_cluster) {
      throw Error(b.name() + ": threads of another CTA arrive, whose work the wait leaves out");
    }
    b.seen[static_cast<size_t>(running_)] = b.ended;
    clocks_.acquire(running_, b.known);
    clocks_.learn(running_, clocks_.phases(static_cast<int>(number)), b.ended);
  }
  void fence_shared_for_async() {
    if (options_.fault != Fault::kSkipFence) clocks_.fence(running_);
  }
  void load_box(char* to, const BoxMap& map, const int (&from)[5], const char* at) {
    const size_t number = find_barrier(at);
    PhaseBarrier& b = barriers_[number];
    if (b.fenced_at == 0) throw Error(b.name() + ": fence_barriers() must come before a box");
    Box box = make_box(to, map, from);
    box.barrier = static_cast<int>(number);
    for (int64_t i = box.to; i < box.to + map.bytes(); i += SharedShadow::kGranule) {
      shadow_.write_box(i, running_, box.barrier, b.ended + 1);
    }
    box.for_each_row([&](int64_t, const char* source, int, int bytes) {
      bytes_read_ += bytes;
      touch_global(source, bytes, GlobalShadow::Access::kAsynchronousRead, {clocks_.phases(box.barrier), b.ended + 1});
    });
    ++b.under_way;
    boxes_.push_back(box);
    if (!options_.copies_land_late) land_box(boxes_.size() - 1);
  }
  void store_box(const BoxMap& map, const char* from, const int (&to)[5]) {
    Fiber& fiber = running();
    const Box box = make_box(from, map, to);
    box.for_each_row([&](int64_t row, const char* target, int before, int bytes) {
      for (int i = before; i < before + bytes; i += SharedShadow::kGranule) {
        shadow_.read_store(swizzle_128(row + i), running_, fiber.store_groups + 1, [&](int b) {
          return barriers_[static_cast<size_t>(b)].seen[static_cast<size_t>(running_)];
        });
      }
      bytes_written_ += bytes;
      // Done for certain only when the launch has ended.
      touch_global(target, bytes, GlobalShadow::Access::kWrite, {clocks_.stores(running_), UINT32_MAX});
    });
    fiber.stores.push_back(box);
    if (!options_.copies_land_late) write_out(box);
  }
  void commit_stores() {
    Fiber& fiber = running();
    ++fiber.store_groups;
    fiber.committed_stores = fiber.stores.size();
  }
  void wait_stores_read() {
    if (options_.fault == Fault::kSkipStoreWait) return;
    Fiber& fiber = running();
    for (size_t i = 0; i < fiber.committed_stores; ++i) {
      if (options_.copies_land_late) write_out(fiber.stores[i]);
    }
    fiber.stores.erase(fiber.stores.begin(), fiber.stores.begin() + static_cast<std::ptrdiff_t>(fiber.committed_stores));
    fiber.committed_stores = 0;
    clocks_.learn(running_, clocks_.stores(running_), fiber.store_groups);
  }

  // Products of the running thread's warpgroup. Not inlined: the caller's registers lie above this frame.
  __attribute__((noinline)) void begin_products() {
    const size_t lane = static_cast<size_t>(running_ % kProductThreads);
    warpgroup().begun[lane] = true;
    // What registers hold, to see whether they change before a product uses them.
    const char* const frame = static_cast<const char*>(__builtin_frame_address(0));
    Fiber& fiber = running();
    fiber.registers_at = frame;
    fiber.registers.assign(frame, static_cast<const char*>(fiber.stack.get()) + kStackBytes);
  }
  void commit_products() { ++warpgroup().committed[running_ % kProductThreads]; }
  void multiply(int kind, const ProductCall& call, bool a_outer, bool b_outer, int columns,
                float (*value_of)(uint16_t)) {
    struct Operand {
      ProductCall call;
      bool a_outer, b_outer;
      int columns;
      float (*value_of)(uint16_t);
    } operand{call, a_outer, b_outer, columns, value_of};
    warpgroup();
    meet(meetings_[static_cast<size_t>(running_ / kProductThreads)], kProductThreads, kind, &operand,
         [](Machine& m, void* const* operands) {
           Product p;
           for (int t = 0; t < kProductThreads; ++t) p.call[t] = static_cast<Operand*>(operands[t])->call;
           const Operand& first = *static_cast<Operand*>(operands[0]);
           p.a_outer = first.a_outer;
           p.b_outer = first.b_outer;
           p.columns = first.columns;
           p.value_of = first.value_of;
           m.issue_product(std::move(p));
         });
  }
  void wait_products(int pending) {
    Warpgroup& w = warpgroup();
    const int lane = running_ % kProductThreads;
    if (options_.fault == Fault::kWaitTooLittle) ++pending;
    w.begun[lane] = false;
    const int64_t reach = static_cast<int64_t>(w.committed[lane]) - pending;
    if (reach <= 0) return;
    const uint32_t group = static_cast<uint32_t>(reach);
    clocks_.learn(running_, clocks_.products(running_ / kProductThreads), group);
    for (Product& p : w.products) {
      if (p.group > group) break;
      if (!p.done) compute_product(p, shared(), options_.fault == Fault::kSwapFragments);
      if (p.call[lane].a_registers != nullptr &&
          memcmp(p.call[lane].a_registers, p.a_registers[lane], sizeof p.a_registers[lane]) != 0) {
        throw Error("a register of A changed, or went out of scope, while a product used it");
      }
    }
    for (auto a = w.accumulators.begin(); a != w.accumulators.end();) {
      if (a->last_group <= group && !a->returned_to[lane]) return_registers(*a, lane);
      if (a->returned == kProductThreads) {
        w.products.remove_if([&](const Product& p) { return p.d == &*a; });
        a = w.accumulators.erase(a);
      } else {
        ++a;
      }
    }
  }

  // The registers that the running thread has from now on.
  void share_registers(int count) { running().register_count = count; }

  // Launches that overlap.
  void allow_next_launch() { launches_.allow(cta(), running().waited_for_launch); }
  void wait_for_previous_launch() {
    if (options_.fault == Fault::kSkipLaunchWait) return;
    Fiber& fiber = running();
    if (fiber.waited_for_launch) return;
    fiber.waited_for_launch = true;
    launches_.wait(cta());
    launch_waits_.push_back({running_, clocks_.now(running_)});
  }

  const Options& options() const { return options_; }

 private:
  static constexpr int kConverge = 50;
  static constexpr size_t kStackBytes = 64 * 1024;
  static constexpr int kMostSharedBytes = 227 * 1024;
  static constexpr int kNamedBarriers = 16;
  static constexpr int kRegisters = 64 * 1024;
  static constexpr uint32_t kPoison = 0x7fc0dead;  // not a number

  enum class Wait { kNothing, kBarrier, kOthers, kPhase };

  struct Copy {
    char* to;
    char data[16];
  };
  struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started = false, done = false;
    Wait waits_for = Wait::kNothing;
    size_t phase = 0;  // the barrier in shared memory that it waits for
    int barriers = 0;
    bool waited_for_launch = false;
    int register_count = 0;  // 0: the share it began with
    std::vector<Copy> copies;
    std::vector<Box> stores;  // under way, those of committed groups first
    size_t committed_stores = 0;
    uint32_t store_groups = 0;
    std::vector<char> registers;  // its stack from registers_at on, when it called begin_products()
    const char* registers_at = nullptr;
    std::unique_ptr<char[]> stack;
  };
  // Threads that come together for a collective.
  struct Meeting {
    int arrived = 0, kind = 0;
    void* operands[kProductThreads];
  };
  struct NamedBarrier {
    int threads = 0;
    std::vector<int> arrived;
  };
  struct WarpAtBarrier {
    int lanes = 0;
    Place place;
  };
  struct LaunchWait {
    int thread;
    uint32_t time;
  };
  // Of the cluster, the running thread's.
  int cta() const { return running_ / threads_; }
  // In the cluster's shared memory, which lies CTA by CTA, as all that is remembered of it does.
  int64_t shared_offset(const void* p) const { return static_cast<const char*>(p) - shared_; }
  Fiber& running() { return fibers_[static_cast<size_t>(running_)]; }
  Warpgroup& warpgroup() {
    const size_t w = static_cast<size_t>(running_ / kProductThreads);
    if (w >= warpgroups_.size()) throw Error("a product by threads that are no whole warpgroup");
    return warpgroups_[w];
  }
  void wake(const std::vector<int>& threads) {
    for (int t : threads) fibers_[static_cast<size_t>(t)].waits_for = Wait::kNothing;
  }

  // A barrier of all `count` threads from `first` on.
  void gather_all(int& arrived, int first, int count) {
    if (++arrived < count) {
      wait(Wait::kBarrier);
      return;
    }
    arrived = 0;
    std::vector<int> all(static_cast<size_t>(count));
    for (int t = 0; t < count; ++t) all[static_cast<size_t>(t)] = first + t;
    if (all.size() == fibers_.size()) {
      clocks_.synchronize_all();
    } else {
      clocks_.synchronize(all);
    }
    wake(all);
  }
  // The lanes of a warp must wait for a barrier at the same place of the program.
  void gather_warp(const Place& place) {
    WarpAtBarrier& warp = at_barrier_of_[static_cast<size_t>(running_ / 32)];
    if (warp.lanes == 0) warp.place = place;
    if (!(warp.place == place)) {
      throw Error("lanes of one warp wait at different barriers: " + warp.place.text() + " and " + place.text());
    }
    if (++warp.lanes == 32) warp.lanes = 0;
  }

  void meet(Meeting& meeting, int count, int kind, void* operand, void (*all)(Machine&, void* const*)) {
    if (meeting.arrived == 0) meeting.kind = kind;
    if (meeting.kind != kind) {
      throw Error(count == 32 ? "lanes of one warp call different collectives"
                              : "threads of one warpgroup issue different products");
    }
    meeting.operands[running_ % count] = operand;
    if (++meeting.arrived < count) {
      wait(Wait::kOthers);
      return;
    }
    meeting.arrived = 0;
    all(*this, meeting.operands);
    const int first = running_ / count * count;
    for (int t = first; t < first + count; ++t) fibers_[static_cast<size_t>(t)].waits_for = Wait::kNothing;
  }

  size_t find_barrier(const char* at) {
    const int64_t offset = shared_offset(at);
    for (size_t i = 0; i < barriers_.size(); ++i) {
      const PhaseBarrier& b = barriers_[i];
      if (b.offset != offset) continue;
      if (b.owner != running_ && (b.fenced_at == 0 || !clocks_.knows(running_, b.owner, b.fenced_at))) {
        throw Error(b.name() + ": used by another thread without fence_barriers() and a barrier after its start");
      }
      return i;
    }
    throw Error("shared memory, byte " + std::to_string(offset) + ": no barrier was initialised here");
  }
  void arrive(PhaseBarrier& b, int bytes) {
    if (options_.fault == Fault::kLoseArrival && ++faults_ % 7 == 0) return;
    if (b.missing == 0) throw Error(b.name() + ": more arrivals in a phase than it takes");
    if (bytes == 0) b.plain = true;
    --b.missing;
    b.bytes += bytes;
    clocks_.release(running_, b.arrived);
    end_phase(b);
  }
  void end_phase(PhaseBarrier& b) {
    if (!b.end_phase()) return;
    for (Fiber& f : fibers_) {
      if (f.waits_for == Wait::kPhase && &barriers_[f.phase] == &b) f.waits_for = Wait::kNothing;
    }
  }

  Box make_box(const char* shared, const BoxMap& map, const int (&at)[5]) const {
    if (map.made != BoxMap::kMade) throw Error("a box of a tensor map that was not made");
    Box box{map, {}, shared_offset(shared), -1};
    for (int d = 0; d < 5; ++d) box.from[d] = at[d];
    if (box.to % kSwizzlePeriod != 0) throw Error("a box's place in shared memory is no multiple of 1024");
    const int64_t begin = box.to - cta() * shared_stride_;
    if (begin < 0 || begin + map.bytes() > shared_bytes_) throw Error("shared memory: box out of bounds");
    return box;
  }
  void write_out(const Box& box) {
    box.for_each_row([&](int64_t from, const char* target, int before, int bytes) {
      for (int i = before; i < before + bytes; i += 2) {
        // The region's memory is its owner's, who registered it as an output.
        memcpy(const_cast<char*>(target) + (i - before),
               shared_ + (options_.fault == Fault::kPlainBox ? from + i : swizzle_128(from + i)), 2);
      }
    });
  }
  void land_box(size_t number) {
    const Box box = boxes_[number];
    boxes_.erase(boxes_.begin() + static_cast<std::ptrdiff_t>(number));
    box.for_each_row([&](int64_t to, const char* source, int before, int bytes) {
      char row[kBoxRowBytes] = {};
      if (bytes > 0) memcpy(row + before, source, static_cast<size_t>(bytes));
      for (int i = 0; i < kBoxRowBytes; i += 2) {
        const int64_t offset = to + i;
        if (options_.fault == Fault::kKeepOutside && (i < before || i >= before + bytes)) continue;
        memcpy(shared_ + (options_.fault == Fault::kPlainBox ? offset : swizzle_128(offset)), row + i, 2);
      }
    });
    PhaseBarrier& b = barriers_[static_cast<size_t>(box.barrier)];
    b.bytes -= box.map.bytes();
    --b.under_way;
    end_phase(b);
  }

  // Where byte p of the running warpgroup's thread was kept by begin_products(); null if it was not.
  char* kept_register(Fiber& fiber, const void* p, size_t bytes) {
    const char* const at = static_cast<const char*>(p);
    if (at < fiber.registers_at || at + bytes > fiber.registers_at + fiber.registers.size()) return nullptr;
    return fiber.registers.data() + (at - fiber.registers_at);
  }
  void set_registers(int thread, float* d, const float* value, int count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    memcpy(d, value, bytes);
    char* const kept = kept_register(fibers_[static_cast<size_t>(thread)], d, bytes);
    if (kept != nullptr) memcpy(kept, value, bytes);
  }
  void issue_product(Product&& p) {
    const int number = running_ / kProductThreads, first = number * kProductThreads;
    Warpgroup& w = warpgroups_[static_cast<size_t>(number)];
    p.group = w.committed[0] + 1;
    for (int t = 0; t < kProductThreads; ++t) {
      const ProductCall& call = p.call[t];
      if (w.committed[t] + 1 != p.group) throw Error("threads of one warpgroup commit different numbers of groups");
      if (!w.begun[t]) throw Error("a product without begin_products() after the last wait");
      if (call.b != p.call[0].b || call.add != p.call[0].add ||
          (call.a_registers == nullptr && call.a != p.call[0].a)) {
        throw Error("threads of one warpgroup issue products of different matrices");
      }
      Fiber& fiber = fibers_[static_cast<size_t>(first + t)];
      const auto check = [&](const void* registers, size_t bytes) {
        const char* const kept = kept_register(fiber, registers, bytes);
        if (kept == nullptr || memcmp(kept, registers, bytes) != 0) {
          throw Error("a register of a product changed after begin_products()");
        }
      };
      if (call.add) check(call.d, static_cast<size_t>(p.columns / 2) * sizeof(float));
      if (call.a_registers != nullptr) {
        check(call.a_registers, sizeof p.a_registers[t]);
        memcpy(p.a_registers[t], call.a_registers, sizeof p.a_registers[t]);
      }
    }

    Accumulator* accumulator = nullptr;
    for (Accumulator& a : w.accumulators) {
      if (a.d[0] == p.call[0].d) accumulator = &a;
    }
    if (accumulator == nullptr) {
      w.accumulators.emplace_back();
      accumulator = &w.accumulators.back();
      accumulator->columns = p.columns;
      accumulator->value.resize(static_cast<size_t>(kProductRows * p.columns));
      for (int t = 0; t < kProductThreads; ++t) {
        accumulator->d[t] = p.call[t].d;
        for (int i = 0; i < p.columns / 2; ++i) accumulator->at(t, i) = p.call[t].d[i];
      }
      if (options_.copies_land_late) {
        std::vector<float> poison(static_cast<size_t>(p.columns / 2));
        for (float& f : poison) memcpy(&f, &kPoison, sizeof f);
        for (int t = 0; t < kProductThreads; ++t) set_registers(first + t, p.call[t].d, poison.data(), p.columns / 2);
      }
    }
    if (accumulator->columns != p.columns) throw Error("products of different shapes add to one accumulator");
    if (accumulator->returned != 0) throw Error("threads of one warpgroup wait for different products");
    for (int t = 0; t < kProductThreads; ++t) {
      if (accumulator->d[t] != p.call[t].d) throw Error("threads of one warpgroup multiply into different accumulators");
    }
    accumulator->last_group = p.group;
    p.d = accumulator;

    const auto seen = [&](int b) {
      const std::vector<uint32_t>& all = barriers_[static_cast<size_t>(b)].seen;
      return *std::min_element(all.begin() + first, all.begin() + first + kProductThreads);
    };
    std::vector<uint32_t> seen_of(barriers_.size());
    for (size_t b = 0; b < barriers_.size(); ++b) seen_of[b] = seen(static_cast<int>(b));
    for_each_segment(p, [&](int64_t offset) {
      shadow_.read_product(cta() * shared_stride_ + offset, number, p.group,
                           [&](int b) { return seen_of[static_cast<size_t>(b)]; });
    });
    w.products.push_back(p);
    if (!options_.copies_land_late) {
      compute_product(w.products.back(), shared(), options_.fault == Fault::kSwapFragments);
      for (int t = 0; t < kProductThreads; ++t) {
        const std::vector<float> part = accumulator->part(t);
        set_registers(first + t, p.call[t].d, part.data(), p.columns / 2);
      }
    }
  }

  void return_registers(Accumulator& a, int lane) {
    if (options_.copies_land_late) {
      for (int i = 0; i < a.columns / 2; ++i) {
        if (memcmp(a.d[lane] + i, &kPoison, sizeof kPoison) != 0) {
          throw Error("an accumulator's register was written while a product used it");
        }
      }
      const std::vector<float> part = a.part(lane);
      memcpy(a.d[lane], part.data(), part.size() * sizeof(float));
    }
    a.returned_to[lane] = true;
    ++a.returned;
  }

  // Whether the running thread may rely on the end of an earlier launch.
  bool has_ended(int64_t earlier) {
    const LaunchOrder::Ended ended = launches_.has_ended(earlier);
    if (ended != LaunchOrder::Ended::kAfterWait) return ended == LaunchOrder::Ended::kYes;
    return running().waited_for_launch ||
           std::any_of(launch_waits_.begin(), launch_waits_.end(),
                       [&](const LaunchWait& w) { return clocks_.knows(running_, w.thread, w.time); });
  }

  void touch_global(const void* p, int bytes, GlobalShadow::Access access) {
    touch_global(p, bytes, access, {running_, clocks_.now(running_)});
  }
  void touch_global(const void* p, int bytes, GlobalShadow::Access access, const GlobalShadow::Who& who) {
    global_.touch(p, bytes, access, launches_.current(), first_block_, running_, who,
                  [&](int64_t launch) { return has_ended(launch); });
  }

  void wait(Wait what) {
    Fiber& fiber = running();
    fiber.waits_for = what;
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

  void run_cluster(int64_t first_block) {
    first_block_ = first_block;
    const int threads = ctas_ * threads_;
    shared_memory_.assign(static_cast<size_t>(ctas_ * shared_stride_) + kSwizzlePeriod,
                          static_cast<char>(0xff));  // NaN in every type
    const uintptr_t base = reinterpret_cast<uintptr_t>(shared_memory_.data());
    shared_ = shared_memory_.data() + (kSwizzlePeriod - base % kSwizzlePeriod) % kSwizzlePeriod;
    clocks_.start(threads);
    shadow_.start(ctas_, shared_bytes_, shared_stride_);
    barriers_.clear();
    boxes_.clear();
    launch_waits_.clear();
    launches_.begin_cluster(ctas_);
    at_barrier_.assign(static_cast<size_t>(ctas_), 0);
    at_cluster_barrier_ = 0;
    named_.assign(static_cast<size_t>(ctas_ * kNamedBarriers), NamedBarrier());
    at_barrier_of_.assign(static_cast<size_t>(threads / 32), {});
    warpgroups_.assign(static_cast<size_t>(threads / kProductThreads), Warpgroup());
    meetings_.assign(warpgroups_.size(), Meeting());
    error_.clear();
    while (fibers_.size() < static_cast<size_t>(threads)) {
      fibers_.emplace_back();
      fibers_.back().stack.reset(new char[kStackBytes]);
    }
    fibers_.resize(static_cast<size_t>(threads));
    warps_.assign(static_cast<size_t>(threads / 32), Meeting());
    std::vector<int> order(static_cast<size_t>(threads));
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers_[static_cast<size_t>(t)];
      fiber.started = fiber.done = fiber.waited_for_launch = false;
      fiber.waits_for = Wait::kNothing;
      fiber.barriers = fiber.register_count = 0;
      fiber.copies.clear();
      fiber.stores.clear();
      fiber.committed_stores = 0;
      fiber.store_groups = 0;
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
        if (fiber.done || fiber.waits_for != Wait::kNothing) continue;
        resume(t);
        progress = true;
        if (!error_.empty()) {
          throw Error(error_ + " (block " + std::to_string(block()) + ", thread " + std::to_string(thread()) + ")");
        }
        if (fiber.done) {
          --left;
          if (!fiber.copies.empty()) throw Error("a thread ended with copies under way");
          if (!fiber.stores.empty()) throw Error("a thread ended with boxes that may still be read from shared memory");
        }
      }
      if (!progress && left > 0) {  // a random order may have left out the warps that can go on
        const auto runs = [](const Fiber& f) { return !f.done && f.waits_for == Wait::kNothing; };
        if (std::any_of(fibers_.begin(), fibers_.end(), runs)) continue;
        if (boxes_.empty()) throw Error(deadlock() + " (block " + std::to_string(first_block) + ")");
        land_box(options_.order == Order::kAscending    ? 0
                 : options_.order == Order::kDescending ? boxes_.size() - 1
                                                        : random_() % boxes_.size());
      }
    }
    if (!boxes_.empty()) throw Error("a CTA ended with boxes under way");
    for (const Warpgroup& w : warpgroups_) {
      if (!w.products.empty()) throw Error("a CTA ended with products under way");
    }
    check_registers();
    launches_.end_cluster();
  }
  // Registers move between whole warpgroups, and no more than there are.
  void check_registers() const {
    int64_t all = 0;
    for (size_t t = 0; t < fibers_.size(); ++t) {
      const int count = fibers_[t].register_count;
      if (count != fibers_[t / kProductThreads * kProductThreads].register_count) {
        throw Error("threads of one warpgroup claim or release different numbers of registers");
      }
      all += count > 0 ? count : kRegisters / threads_ / 8 * 8;
    }
    if (all > ctas_ * kRegisters) throw Error("a CTA claims more registers than there are");
  }
  std::string deadlock() const {
    std::string text = "deadlock: threads wait for each other";
    for (size_t t = 0; t < fibers_.size(); ++t) {
      if (fibers_[t].done || fibers_[t].waits_for != Wait::kPhase) continue;
      return text + ", thread " + std::to_string(t) + " for " + barriers_[fibers_[t].phase].text();
    }
    return text;
  }

  Options options_;
  std::mt19937 random_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_, meetings_;
  std::vector<Warpgroup> warpgroups_;
  std::vector<NamedBarrier> named_;
  std::vector<WarpAtBarrier> at_barrier_of_;
  Clocks clocks_;
  SharedShadow shadow_;
  GlobalShadow global_;
  std::vector<PhaseBarrier> barriers_;
  std::vector<Box> boxes_;  // under way
  LaunchOrder launches_;
  std::vector<LaunchWait> launch_waits_;  // of this CTA
  std::vector<char> shared_memory_;
  char* shared_ = nullptr;
  int64_t shared_bytes_ = 0, shared_stride_ = 0;  // of a CTA
  const std::function<void()>* kernel_ = nullptr;
  jmp_buf scheduler_;
  std::string error_;
  int running_ = 0;  // thread of the cluster
  int threads_ = 0;  // of a CTA
  int ctas_ = 1;     // of the cluster
  std::vector<int> at_barrier_;
  int at_cluster_barrier_ = 0;
  int64_t first_block_ = 0;
  int64_t bytes_read_ = 0, bytes_written_ = 0;
  long bank_conflicts_ = 0, matrix_loads_ = 0, late_ = 0, faults_ = 0;
};

}  // namespace emulation
}  // namespace ccnet
