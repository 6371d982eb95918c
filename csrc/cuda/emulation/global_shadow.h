// Who touched which bytes of global memory, and whether the next to touch them is ordered after that.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "clocks.h"
#include "error.h"

namespace ccnet {
namespace emulation {

class GlobalShadow {
 public:
  enum class Access { kRead, kAsynchronousRead, kWrite };

  // Who makes an access, and when, as the clocks count it. Of asynchronous ones not the thread that asks for them.
  struct Who {
    int agent;
    uint32_t time;
  };

  explicit GlobalShadow(const Clocks& clocks) : clocks_(clocks) {}

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
  void check_outputs_written() const {
    for (const Region& region : regions_) {
      for (size_t i = 0; i < region.cells.size(); ++i) {
        if (!region.cells[i].written) {
          throw Error(std::string(region.name) + ": byte " + std::to_string(i * kUnit) + " was never written");
        }
      }
    }
  }

  // By, or at the request of, a thread of a block of a launch; `has_ended(launch)` tells whether the thread may rely on an
  // earlier launch's end.
  template <typename HasEnded>
  void touch(const void* p, int bytes, Access access, int64_t launch, int64_t block, int thread, const Who& who,
             const HasEnded& has_ended) {
    if (bytes == 0) return;
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    Region& region = find(address, static_cast<uintptr_t>(bytes));
    if (!region.writable) {
      if (access == Access::kWrite) fail(region, "is not an output");
      return;
    }
    const uintptr_t first = (address - region.begin) / kUnit;
    const uintptr_t end = (address - region.begin + static_cast<uintptr_t>(bytes)) / kUnit;
    for (uintptr_t i = first; i < end; ++i) {
      Cell& cell = region.cells[i];
      if (cell.write_launch == launch) {
        if (cell.write_block != block || !clocks_.knows(thread, cell.writer, cell.write_time)) {
          fail(region, access == Access::kWrite ? "written twice in one launch by threads that are not ordered"
                                                : "read after a write in one launch by threads that are not ordered");
        }
        if (access == Access::kAsynchronousRead) fail(region, "a box of what the same launch has written");
      } else if (!has_ended(cell.write_launch)) {
        fail(region, "touched while an earlier launch that writes it may be under way");
      }
      if (access == Access::kWrite) {
        write(region, cell, launch, block, thread, who, has_ended);
      } else {
        read(region, cell, launch, block, thread, who);
      }
    }
  }

 private:
  static constexpr int kUnit = 2;  // bytes for each cell
  static constexpr int kSeveral = -2;

  struct Cell {
    bool written = false;
    int64_t write_launch = 0, read_launch = 0;
    int64_t write_block = -1, read_block = -1;
    uint32_t write_time = 0;
    int writer = -1, reader = -1;
    int64_t read_at = 0;  // the reader's time; of several, the epoch of the last
  };
  struct Region {
    uintptr_t begin, end;
    bool writable;
    const char* name;
    std::vector<Cell> cells;
  };

  [[noreturn]] static void fail(const Region& region, const char* what) {
    throw Error(std::string(region.name) + ": " + what);
  }
  Region& find(uintptr_t address, uintptr_t bytes) {
    for (Region& region : regions_) {
      if (address >= region.begin && address + bytes <= region.end) return region;
    }
    throw Error("global memory: access outside every tensor");
  }
  // Whether the thread is ordered after the cell's reads in its own block.
  bool after_reads(const Cell& cell, int thread) const {
    if (cell.reader == kSeveral) return cell.read_at < clocks_.epoch();
    return clocks_.knows(thread, cell.reader, static_cast<uint32_t>(cell.read_at));
  }

  template <typename HasEnded>
  void write(const Region& region, Cell& cell, int64_t launch, int64_t block, int thread, const Who& who,
             const HasEnded& has_ended) {
    if (cell.read_launch == launch) {
      if (cell.read_block != block || !after_reads(cell, thread)) {
        fail(region, "written after a read in one launch by threads that are not ordered");
      }
    } else if (!has_ended(cell.read_launch)) {
      fail(region, "written while an earlier launch that reads it may be under way");
    }
    cell.written = true;
    cell.write_launch = launch;
    cell.write_block = block;
    cell.write_time = who.time;
    cell.writer = who.agent;
  }
  void read(const Region& region, Cell& cell, int64_t launch, int64_t block, int thread, const Who& who) {
    if (!cell.written) fail(region, "read before it was written");
    const bool again = cell.read_launch == launch;
    cell.read_launch = launch;
    const bool others = again && (cell.read_block != block || !after_reads(cell, thread));
    // Several readers that are ordered by nothing but a barrier of the whole CTA: no barrier orders asynchronous ones.
    const bool asynchronous = !clocks_.is_thread(who.agent) || (again && !clocks_.is_thread(cell.reader));
    if (others && (cell.read_block != block || asynchronous)) {
      cell.read_block = kSeveral;
      return;
    }
    cell.read_block = block;
    cell.reader = others ? kSeveral : who.agent;
    cell.read_at = others ? clocks_.epoch() : int64_t{who.time};
  }

  const Clocks& clocks_;
  std::vector<Region> regions_;
};

}  // namespace emulation
}  // namespace ccnet
