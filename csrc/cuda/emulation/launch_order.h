// Launches that may overlap (griddepcontrol): which of the earlier ones have certainly ended when a thread touches what
// they touched. A launch that overlaps may begin as soon as every CTA of the one before has allowed it; the one before
// that may then still be running, unless the allowance came after a wait.
#pragma once

#include <stdint.h>

#include <vector>

namespace ccnet {
namespace emulation {

class LaunchOrder {
 public:
  enum class Ended { kYes, kAfterWait, kUnknown };

  // Launches are numbered from 1; 0 stands for what was before the first.
  int64_t current() const { return static_cast<int64_t>(launches_.size()) - 1; }

  void begin(bool overlaps_previous) {
    Launch next;
    const size_t before = launches_.size();
    next.ended.assign(before, Ended::kYes);
    if (overlaps_previous && before > 1) {
      const Launch& previous = launches_.back();
      for (size_t i = 0; i + 1 < before; ++i) {
        const Ended then = previous.ended[i];
        const bool waited_for = then == Ended::kAfterWait;
        if (then == Ended::kUnknown || (waited_for && !previous.waited)) {
          next.ended[i] = Ended::kUnknown;
        } else if (waited_for && !previous.waited_before_allowing) {
          next.ended[i] = Ended::kAfterWait;
        }
      }
      next.ended[before - 1] = Ended::kAfterWait;
    }
    launches_.push_back(next);
  }

  void begin_block() { allowed_ = waited_ = false; }
  // A thread of the block allows the next launch; `waits` tells whether it has waited for the one before.
  void allow(bool has_waited) {
    if (!allowed_ && !has_waited) launches_.back().waited_before_allowing = false;
    allowed_ = true;
  }
  void wait() { waited_ = true; }
  void end_block() {
    if (waited_) return;
    launches_.back().waited = launches_.back().waited_before_allowing = false;
  }

  // Whether an earlier launch has ended: from the start of the current one, or once it has waited.
  Ended has_ended(int64_t launch) const { return launches_.back().ended[static_cast<size_t>(launch)]; }

 private:
  struct Launch {
    std::vector<Ended> ended;                           // of the launches before it
    bool waited = true, waited_before_allowing = true;  // in every block
  };
  std::vector<Launch> launches_{1};
  bool allowed_ = false, waited_ = false;  // in the current block
};

}  // namespace emulation
}  // namespace ccnet
