// What the threads of a CTA know of each other's work: vector clocks. An access is ordered before another if the thread
// of the second knows of the first by way of barriers; that it merely ran earlier does not count.
//
// Work is counted for agents: each thread; each thread again for those of its writes that fence_shared_for_async() has
// made visible to wgmma and the TMA; each barrier in shared memory (its phases, for the boxes that end with them); each
// warpgroup (its groups of products); each warp (its groups of boxes that are stored).
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace ccnet {
namespace emulation {

using Clock = std::vector<uint32_t>;  // for each agent, up to which time its work is known

class Clocks {
 public:
  static constexpr int kMostBarriers = 64;
  static constexpr int kWarpgroup = 128;
  static constexpr int kWarp = 32;

  void start(int threads) {
    threads_ = threads;
    agents_ = 2 * threads + kMostBarriers + threads / kWarpgroup + threads / kWarp;
    epoch_ = 1;
    const size_t count = static_cast<size_t>(threads);
    common_.assign(static_cast<size_t>(agents_), 0);
    own_.assign(count, 1);
    fenced_.assign(count, 0);
    learned_.resize(count);
    learned_in_.assign(count, 0);
    least_.assign(static_cast<size_t>(threads / kWarpgroup), Clock());
  }

  int fenced_writes(int thread) const { return threads_ + thread; }
  int phases(int barrier) const { return 2 * threads_ + barrier; }
  int products(int warpgroup) const { return 2 * threads_ + kMostBarriers + warpgroup; }
  int stores(int thread) const { return products(threads_ / kWarpgroup) + thread / kWarp; }
  int threads() const { return threads_; }
  bool is_thread(int agent) const { return agent < threads_; }
  bool is_phase(int agent) const { return agent >= 2 * threads_ && agent < 2 * threads_ + kMostBarriers; }
  bool is_store(int agent) const { return agent >= stores(0); }
  int barrier_of(int agent) const { return agent - 2 * threads_; }

  // The time of what a thread does now.
  uint32_t now(int thread) const { return own_[static_cast<size_t>(thread)]; }
  // Barriers of the whole CTA so far.
  int64_t epoch() const { return epoch_; }

  bool knows(int thread, int agent, uint32_t time) const {
    const size_t t = static_cast<size_t>(thread), a = static_cast<size_t>(agent);
    if (agent == thread) return true;
    if (agent == fenced_writes(thread)) return fenced_[t] >= time;
    return common_[a] >= time || (learned_in_[t] == epoch_ && learned_[t][a] >= time);
  }
  // Whether every thread of a warpgroup does.
  bool all_know(int warpgroup, int agent, uint32_t time) { return least(warpgroup)[static_cast<size_t>(agent)] >= time; }

  void learn(int thread, int agent, uint32_t time) {
    uint32_t& known = learned(thread)[static_cast<size_t>(agent)];
    known = std::max(known, time);
  }
  // The thread's writes so far become visible to asynchronous work, to whoever is ordered after it from now on.
  void fence(int thread) {
    const size_t t = static_cast<size_t>(thread);
    fenced_[t] = own_[t]++;
    if (learned_in_[t] == epoch_) learned_[t][static_cast<size_t>(fenced_writes(thread))] = fenced_[t];
    forget_least(thread);
  }
  // What a thread knows goes to whoever acquires `to` later.
  void release(int thread, Clock& to) {
    const size_t t = static_cast<size_t>(thread);
    if (to.empty()) to.assign(static_cast<size_t>(agents_), 0);
    if (learned_in_[t] == epoch_) join(to, learned_[t]);
    to[t] = own_[t]++;
    to[static_cast<size_t>(fenced_writes(thread))] = fenced_[t];
  }
  void acquire(int thread, const Clock& from) {
    if (!from.empty()) join(learned(thread), from);
  }
  void synchronize(const std::vector<int>& threads) {
    Clock all;
    for (int t : threads) release(t, all);
    for (int t : threads) acquire(t, all);
  }
  void synchronize_all() {
    for (int t = 0; t < threads_; ++t) release(t, common_);
    ++epoch_;
    for (Clock& least : least_) least.clear();
  }

 private:
  static void join(Clock& to, const Clock& from) {
    for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
  }
  void forget_least(int thread) {
    const size_t w = static_cast<size_t>(thread / kWarpgroup);
    if (w < least_.size()) least_[w].clear();
  }
  // What the thread has learned since the last barrier of the whole CTA.
  Clock& learned(int thread) {
    const size_t t = static_cast<size_t>(thread);
    if (learned_in_[t] != epoch_) {
      learned_in_[t] = epoch_;
      learned_[t].assign(static_cast<size_t>(agents_), 0);
      learned_[t][t] = UINT32_MAX;  // of itself it knows everything
      learned_[t][static_cast<size_t>(fenced_writes(thread))] = fenced_[t];
    }
    forget_least(thread);
    return learned_[t];
  }
  // What all threads of a warpgroup know.
  const Clock& least(int warpgroup) {
    Clock& least = least_[static_cast<size_t>(warpgroup)];
    if (!least.empty()) return least;
    Clock all(static_cast<size_t>(agents_), UINT32_MAX);
    for (int t = warpgroup * kWarpgroup; t < (warpgroup + 1) * kWarpgroup; ++t) {
      const Clock& own = learned(t);
      for (size_t i = 0; i < all.size(); ++i) all[i] = std::min(all[i], std::max(own[i], common_[i]));
    }
    least = std::move(all);
    return least;
  }

  int threads_ = 0, agents_ = 0;
  int64_t epoch_ = 0;
  Clock common_;  // known to all since the last barrier of the whole CTA
  std::vector<uint32_t> own_, fenced_;
  std::vector<Clock> learned_;
  std::vector<int64_t> learned_in_;  // epochs
  std::vector<Clock> least_;         // empty: to be computed
};

}  // namespace emulation
}  // namespace ccnet
