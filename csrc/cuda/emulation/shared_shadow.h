// Who touched which bytes of a cluster's shared memory, and whether the next to touch them is ordered after that.
#pragma once

#include <string>
#include <vector>

#include "clocks.h"
#include "error.h"

namespace ccnet {
namespace emulation {

class SharedShadow {
 public:
  static constexpr int kGranule = 16;  // bytes

  explicit SharedShadow(Clocks& clocks) : clocks_(clocks) {}

  // `bytes` for each CTA, which begin `stride` apart.
  void start(int ctas, int64_t bytes, int64_t stride) {
    bytes_ = bytes;
    stride_ = stride;
    granules_.resize(static_cast<size_t>(ctas * stride / kGranule));
    for (Granule& g : granules_) {
      g.writes.clear();
      g.reads.clear();
      g.written = g.barrier = 0;
      g.copying = false;
    }
  }

  // An ordinary access by a thread, of 1 to 16 bytes. `seen(barrier)`: the last phase of a barrier in shared memory that
  // the thread itself waited for.
  template <typename Seen>
  void touch(int64_t offset, int bytes, bool write, int thread, const Seen& seen) {
    Granule& g = at(offset, bytes);
    const uint16_t mask = mask_of(offset, bytes);
    if (g.barrier & mask) fail(offset, "a barrier, touched like data");
    if (g.copying) fail(offset, "touched while a copy into it is under way");
    for (const Access& w : g.writes) {
      if (!(w.bytes & mask)) continue;
      const bool of_box = clocks_.is_phase(w.agent);
      if (!clocks_.knows(thread, w.agent, w.time)) {
        if (of_box) fail(offset, "touched while a copy into it is under way, for all that this thread has waited for");
        fail(offset, write ? "two threads write without a barrier between"
                           : "read without a barrier after another thread's write");
      }
      if (!write && of_box && seen(clocks_.barrier_of(w.agent)) < w.time) {
        fail(offset, "a box read by a thread that has not itself waited for its barrier");
      }
    }
    if (write) {
      check_reads(g, offset, mask, thread);
      cover(g.writes, mask);
      cover(g.reads, mask);
      g.written |= mask;
      g.writes.push_back({thread, clocks_.now(thread), mask});
    } else {
      if (mask & ~g.written) fail(offset, "read before it was written");
      // A later write that is ordered after this read is ordered after those known to it.
      drop(g.reads, [&](const Access& r) { return !(r.bytes & ~mask) && clocks_.knows(thread, r.agent, r.time); });
      g.reads.push_back({thread, clocks_.now(thread), mask});
    }
  }

  // 16 bytes that a thread's copy_async writes, until land().
  void begin_copy(int64_t offset) { at(offset, kGranule).copying = true; }
  void land_copy(int64_t offset) {
    Granule& g = at(offset, kGranule);
    g.copying = false;
    g.writes.clear();
    g.reads.clear();
  }

  // 16 bytes of a box that `thread` asks for and that will have landed by phase `time` of the barrier.
  void write_box(int64_t offset, int thread, int barrier, uint32_t time) {
    Granule& g = at(offset, kGranule);
    if (g.barrier) fail(offset, "a barrier, overwritten by a box");
    if (g.copying) fail(offset, "touched while a copy into it is under way");
    for (const Access& w : g.writes) {
      if (!clocks_.knows(thread, w.agent, w.time)) {
        fail(offset, clocks_.is_phase(w.agent) ? "a box is loaded while another into the same place is under way"
                                               : "a box is loaded without a barrier after another thread's write");
      }
      if (clocks_.is_thread(w.agent) && !clocks_.knows(thread, clocks_.fenced_writes(w.agent), w.time)) {
        fail(offset, "a box is loaded over ordinary writes without a fence between");
      }
    }
    check_reads(g, offset, 0xffff, thread);
    g.writes.clear();
    g.reads.clear();
    g.written = 0xffff;
    g.writes.push_back({clocks_.phases(barrier), time, 0xffff});
  }

  // 16 bytes that a group of products of a warpgroup reads. `seen(barrier)`: the last phase that all its threads waited
  // for.
  template <typename Seen>
  void read_product(int64_t offset, int warpgroup, uint32_t group, const Seen& seen) {
    const Reader reader{clocks_.products(warpgroup), group};
    read_asynchronously(offset, "a product", "not all threads of the warpgroup have", reader, seen,
                        [&](int agent, uint32_t time) { return clocks_.all_know(warpgroup, agent, time); });
  }

  // 16 bytes that a group of a warp's stored boxes reads. `seen(barrier)`: the last phase that the thread waited for.
  template <typename Seen>
  void read_store(int64_t offset, int thread, uint32_t group, const Seen& seen) {
    read_asynchronously(offset, "a stored box", "the thread has not", {clocks_.stores(thread), group}, seen,
                        [&](int agent, uint32_t time) { return clocks_.knows(thread, agent, time); });
  }

  void make_barrier(int64_t offset) {
    Granule& g = at(offset, 8);
    g.barrier |= mask_of(offset, 8);
  }

 private:
  struct Access {
    int agent;
    uint32_t time;
    uint16_t bytes;  // which of the granule
  };
  struct Reader {
    int agent;
    uint32_t group;
  };
  struct Granule {
    std::vector<Access> writes, reads;  // those that a later access might not be ordered after
    uint16_t written = 0;               // which bytes ever were
    uint16_t barrier = 0;               // which bytes are of barriers
    bool copying = false;
  };

  [[noreturn]] void fail(int64_t offset, const std::string& what) const {
    throw Error("shared memory, byte " + std::to_string(offset % stride_) + ": " + what);
  }
  static uint16_t mask_of(int64_t offset, int bytes) {
    return static_cast<uint16_t>(((1u << bytes) - 1) << offset % kGranule);
  }
  Granule& at(int64_t offset, int bytes) {
    if (offset < 0 || offset % stride_ + bytes > bytes_) fail(offset, "access out of bounds");
    if (offset % bytes != 0) fail(offset, "misaligned access");
    return granules_[static_cast<size_t>(offset / kGranule)];
  }
  // `name` and `not_waited`: of the reader and of those who ask for it, for errors. `known(agent, time)`: to them.
  template <typename Seen, typename Known>
  void read_asynchronously(int64_t offset, const char* name, const char* not_waited, const Reader& reader,
                           const Seen& seen, const Known& known) {
    Granule& g = at(offset, kGranule);
    const auto fail_by = [&](const std::string& what) { fail(offset, name + (" reads " + what)); };
    if (g.barrier) fail(offset, std::string("a barrier, read by ") + name);
    if (g.copying) fail(offset, "touched while a copy into it is under way");
    if (g.written != 0xffff) fail_by("what was not written");
    for (const Access& w : g.writes) {
      if (clocks_.is_phase(w.agent)) {
        if (seen(clocks_.barrier_of(w.agent)) < w.time) {
          fail_by(std::string("a box that ") + not_waited + " waited for");
        }
        continue;
      }
      if (!known(w.agent, w.time)) fail_by("without a barrier after another thread's write");
      if (!known(clocks_.fenced_writes(w.agent), w.time)) fail_by("ordinary writes without a fence between");
    }
    drop(g.reads, [&](const Access& r) { return r.agent == reader.agent; });
    g.reads.push_back({reader.agent, reader.group, 0xffff});
  }
  void check_reads(const Granule& g, int64_t offset, uint16_t mask, int thread) const {
    for (const Access& r : g.reads) {
      if (!(r.bytes & mask) || clocks_.knows(thread, r.agent, r.time)) continue;
      fail(offset, clocks_.is_thread(r.agent)  ? "written without a barrier after another thread's read"
                   : clocks_.is_store(r.agent) ? "written while a box that is stored of it may be under way"
                                               : "written while a product that reads it may be under way");
    }
  }
  template <typename Drop>
  static void drop(std::vector<Access>& list, const Drop& drop) {
    list.erase(std::remove_if(list.begin(), list.end(), drop), list.end());
  }
  static void cover(std::vector<Access>& list, uint16_t mask) {
    for (Access& a : list) a.bytes = static_cast<uint16_t>(a.bytes & ~mask);
    drop(list, [](const Access& a) { return a.bytes == 0; });
  }

  Clocks& clocks_;
  int64_t bytes_ = 0, stride_ = 1;
  std::vector<Granule> granules_;
};

}  // namespace emulation
}  // namespace ccnet
