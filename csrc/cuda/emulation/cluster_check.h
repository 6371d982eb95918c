// Checks of clusters: two CTAs that pass each other what they write, and with one mistake each.
#pragma once

#include "check_source.h"

namespace ccnet {
namespace cuda {
namespace {

enum class ClusterMistake {
  kNone,
  kOddGrid,
  kNoStart,      // a barrier of the CTA instead of the cluster's
  kNoConverge,   // a lane arrives before all of its warp have written
  kOwnBarrier,   // it arrives at its own CTA's
  kNoSuchRank,
  kNoWait,
  kNarrowWait,   // for what the CTA's own threads have written
  kOtherShared,  // memory of the other CTA
  kEnded,        // the other CTA has
};

constexpr int kClusterTurns = 5;
constexpr int kClusterWarps = kThreads / kWarp;
constexpr int kClusterShared = kThreads * 4 + 2 * kClusterWarps * 8;

struct ClusterArgs {
  float* own;  // [CTA][turn][thread]
  float* sum;  // likewise
  ClusterMistake mistake;
};
// Each CTA writes numbers that its threads have from each other, and adds them to those of the other CTA.
void cluster_kernel(CCNET_CONSTANT_PARAMETER ClusterArgs a) {
  const auto wrong = [&](ClusterMistake m) { return a.mistake == m; };
  const int thread = thread_index(), rank = cluster_rank(), cta = static_cast<int>(block_index());
  char* const shared = dynamic_shared();
  const auto written = [&](int turn) {
    return reinterpret_cast<SharedBarrier*>(shared + kThreads * 4) + turn % 2 * kClusterWarps + thread / kWarp;
  };
  if (thread == 0) {
    for (int i = 0; i < 2 * kClusterWarps; ++i) {
      init_barrier(reinterpret_cast<SharedBarrier*>(shared + kThreads * 4) + i, 1);
    }
    fence_barriers();
  }
  if (wrong(ClusterMistake::kNoStart)) {
    barrier();
  } else {
    cluster_barrier();
  }
  if (wrong(ClusterMistake::kOtherShared)) store_shared<float>(shared + 2048, 0.f);
  if (wrong(ClusterMistake::kEnded) && rank == 1) return;
  for (int turn = 0; turn < kClusterTurns; ++turn) {
    store_shared<float>(shared + thread * 4, static_cast<float>(1000 * cta + 300 * turn + thread));
    barrier();
    const int64_t place = (int64_t{cta} * kClusterTurns + turn) * kThreads + thread;
    const int64_t other = (int64_t{cta ^ 1} * kClusterTurns + turn) * kThreads + thread;
    store_global(a.own + place, load_shared<float>(shared + (thread ^ 77) * 4));
    if (!wrong(ClusterMistake::kNoConverge)) converge_warp();
    if (thread % kWarp == 0) {
      const int to = wrong(ClusterMistake::kOwnBarrier) ? rank : wrong(ClusterMistake::kNoSuchRank) ? 2 : rank ^ 1;
      arrive_in_cluster(written(turn), to);
    }
    if (wrong(ClusterMistake::kNarrowWait)) {
      wait_phase(written(turn), turn / 2 % 2);
    } else if (!wrong(ClusterMistake::kNoWait)) {
      wait_phase_in_cluster(written(turn), turn / 2 % 2);
    }
    store_global(a.sum + place, load_global(a.own + place) + load_global(a.own + other));
    barrier();
  }
}

void run_cluster(const Options& options, ClusterMistake mistake) {
  const int ctas = mistake == ClusterMistake::kOddGrid ? 3 : 4;
  const size_t count = static_cast<size_t>(4 * kClusterTurns * kThreads);
  std::vector<float> own(count, NAN), sum(count, NAN);
  ClusterArgs args{own.data(), sum.data(), mistake};
  Machine machine(options);
  machine.add_region(own.data(), count * 4, true, "own");
  machine.add_region(sum.data(), count * 4, true, "sum");
  machine.run_grid(ctas, kThreads, kClusterShared, [&] { cluster_kernel(args); }, false, 2);
  machine.check_outputs_written();
  for (size_t i = 0; i < count; ++i) {
    const int thread = static_cast<int>(i) % kThreads ^ 77, turn = static_cast<int>(i) / kThreads % kClusterTurns;
    const int cta = static_cast<int>(i) / kThreads / kClusterTurns;
    const int expected = 1000 * (cta / 2 * 4 + 1) + 600 * turn + 2 * thread;
    require(sum[i] == static_cast<float>(expected), "a cluster's result differs");
  }
}

int check_clusters(const Options& options) {
  run_cluster(options, ClusterMistake::kNone);
  // What another thread has written is read before, or after without being ordered.
  const std::pair<ClusterMistake, const char*> expectations[] = {
      {ClusterMistake::kOddGrid, "no whole number of clusters"},
      {ClusterMistake::kNoStart, "barrier"},  // before it was initialised, or after without being ordered
      {ClusterMistake::kNoConverge, "own: read "},
      {ClusterMistake::kOwnBarrier, "own: read "},
      {ClusterMistake::kNoSuchRank, "no CTA of the cluster has number 2"},
      {ClusterMistake::kNoWait, "own: read "},
      {ClusterMistake::kNarrowWait, "whose work the wait leaves out"},
      {ClusterMistake::kOtherShared, "shared memory of another CTA"},
      {ClusterMistake::kEnded, "a CTA that has ended"},
  };
  int checks = 1;
  for (const auto& expectation : expectations) {
    const std::string said = said_by([&] { run_cluster(options, expectation.first); });
    require_noticed("a cluster", expectation.second, said);
    ++checks;
  }
  return checks;
}

}  // namespace
}  // namespace cuda
}  // namespace ccnet
