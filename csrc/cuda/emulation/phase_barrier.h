// A barrier in shared memory (mbarrier).
#pragma once

#include <string>
#include <vector>

#include "clocks.h"
#include "error.h"

namespace ccnet {
namespace emulation {

struct PhaseBarrier {
  int64_t offset = 0;  // in the cluster's shared memory
  int64_t byte = 0;    // in that of its CTA
  int count = 0;       // arrivals that a phase takes
  int owner = 0;       // the thread that initialised it
  uint32_t fenced_at = 0;  // its time when it called fence_barriers(); 0: it has not

  uint32_t ended = 0;  // phases
  int missing = 0;     // arrivals
  int64_t bytes = 0;   // expected in this phase less those that have come
  int under_way = 0;   // boxes issued in this phase
  bool plain = false;  // whether threads ever arrived without bytes
  bool from_afar = false;  // ... threads of another CTA
  Clock arrived, known;       // what came with this phase's arrivals, and with those of the last that ended
  std::vector<uint32_t> seen;  // by each thread: the phase that it last saw the end of

  std::string name() const { return "the barrier at byte " + std::to_string(byte) + " of shared memory"; }

  // What the phase waits for, for messages.
  std::string text() const {
    return "phase " + std::to_string(ended) + " of " + name() + ", which lacks " + std::to_string(missing) +
           " arrivals and " + std::to_string(bytes) + " bytes";
  }

  // Ends the phase if it is complete.
  bool end_phase() {
    if (missing > 0 || bytes != 0) return false;
    if (under_way > 0) throw Error(name() + ": a phase ends without all the bytes that are under way to it");
    ++ended;
    missing = count;
    known.swap(arrived);
    arrived.clear();
    return true;
  }
};

}  // namespace emulation
}  // namespace ccnet
