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

  void begin_cluster(int blocks) { blocks_.assign(static_cast<size_t>(blocks), {}); }
  // A thread of the cluster's block `b` allows the next launch; `has_waited` tells whether it has waited for the one before.
  void allow(int b, bool has_waited) {
    Block& block = blocks_[static_cast<size_t>(b)];
    if (!block.allowed && !has_waited) launches_.back().waited_before_allowing = false;
    block.allowed = true;
  }
  void wait(int b) { blocks_[static_cast<size_t>(b)].waited = true; }
  void end_cluster() {
    for (const Block& block : blocks_) {
      if (!block.waited) launches_.back().waited = launches_.back().waited_before_allowing = false;
    }
  }

  // Whether an earlier launch has ended: from the start of the current one, or once it has waited.
  Ended has_ended(int64_t launch) const { return launches_.back().ended[static_cast<size_t>(launch)]; }

 private:
  struct Launch {
    std::vector<Ended> ended;                           // of the launches before it
    bool waited = true, waited_before_allowing = true;  // in every block
  };
  std::vector<Launch> launches_{1};
  struct Block {
    bool allowed = false, waited = false;
  };
  std::vector<Block> blocks_;  // of the current cluster
};

}  // namespace emulation
}  // namespace ccnet
