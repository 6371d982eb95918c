// Checks of boxes that are stored: through shared memory from one tensor to another, and with one mistake each.
#pragma once

#include "check_source.h"

namespace ccnet {
namespace cuda {
namespace {

enum class StoreMistake {
  kNone,
  kNoFence,       // of the threads' writes
  kNoBarrier,     // after them
  kNoWait,        // before the panel is written again
  kNoCommit,      // the wait is for committed groups
  kEndUnread,     // the thread ends before the panel was read
  kUnwritten,     // the panel never was
  kReadBack,      // in the same launch
  kMisaligned,    // the panel
  kNotAnOutput,   // the tensor
};

struct StoreArgs {
  TensorMap from, to;
  int at[5];
  const uint16_t* stored;  // some element of `to`
  StoreMistake mistake;
};
// Loads a box, doubles it, stores it, and does so once more further on along the positions.
void store_kernel(CCNET_CONSTANT_PARAMETER StoreArgs a) {
  using T = Half;
  const auto wrong = [&](StoreMistake m) { return a.mistake == m; };
  SharedBarrier* const full = barrier_at(1, 0);
  const Panels panel{dynamic_shared(), kTileRows};
  const bool leads = thread_index() == 0;
  if (leads) {
    init_barrier(full, 1);
    fence_barriers();
  }
  barrier();
  for (int turn = 0; turn < 2; ++turn) {
    const int position = a.at[1] + turn * a.from.box[1];
    if (!wrong(StoreMistake::kUnwritten)) {
      if (leads) {
        arrive_and_expect(full, a.from.bytes());
        load_box(panel.base, &a.from, a.at[0], position, a.at[2], a.at[3], a.at[4], full);
      }
      wait_phase(full, turn);
      for (int i = thread_index(); i < a.from.rows() * kPanelWidth<T>; i += kThreads) {
        char* const element = panel.template element<T>(i / kPanelWidth<T>, i % kPanelWidth<T>);
        store_shared<T>(element, from_float<T>(2.f * to_float<T>(load_shared<T>(element))));
      }
    }
    if (!wrong(StoreMistake::kNoFence)) fence_shared_for_async();
    if (!wrong(StoreMistake::kNoBarrier)) barrier();
    if (leads) {
      store_box(&a.to, panel.base + (wrong(StoreMistake::kMisaligned) ? 128 : 0), a.at[0], position, a.at[2], a.at[3],
                a.at[4]);
      if (!wrong(StoreMistake::kNoCommit)) commit_stores();
      const bool waits = !wrong(StoreMistake::kNoWait) && !(wrong(StoreMistake::kEndUnread) && turn == 1);
      if (waits) wait_stores_read();
      if (wrong(StoreMistake::kReadBack)) load_global(a.stored);
    }
    barrier();
  }
}

void run_stores(const Options& options, const int (&at)[5], int positions, int group, StoreMistake mistake,
                std::mt19937& random) {
  const Source<Half> from(72, 21, 5, 3, 2, random);
  Source<Half> to(72, 21, 5, 3, 2, random);
  const std::vector<Half> before = to.memory;
  StoreArgs args{from.map(positions, group), to.map(positions, group), {}, nullptr, mistake};
  for (int d = 0; d < 5; ++d) args.at[d] = at[d];
  const auto offset_of = [&](int64_t channel, int64_t p, int64_t other1, int64_t other0, int64_t batch) {
    return channel + p * to.stride[1] + other1 * to.stride[2] + other0 * to.stride[3] + batch * to.stride[4];
  };
  args.stored = &to.data[offset_of(at[0], at[1], at[2], at[3], at[4])].bits;
  Machine machine(options);
  from.add_to(machine, "from");
  machine.add_region(to.data, static_cast<size_t>(to.memory.data() + to.memory.size() - to.data) * sizeof(Half),
                     mistake != StoreMistake::kNotAnOutput, "to");
  machine.run_grid(1, kThreads, kBytes + 8, [&] { store_kernel(args); });
  for (int64_t batch = 0; batch < 2; ++batch) {
    for (int64_t o0 = 0; o0 < 3; ++o0) {
      for (int64_t o1 = 0; o1 < 5; ++o1) {
        for (int64_t p = 0; p < 21; ++p) {
          for (int64_t channel = 0; channel < 72; ++channel) {
            const int64_t offset = offset_of(channel, p, o1, o0, batch);
            const bool stored = batch == at[4] && o0 == at[3] && o1 >= at[2] && o1 < at[2] + group && p >= at[1] &&
                                p < at[1] + 2 * positions && channel >= at[0] && channel < at[0] + kPanelWidth<Half>;
            const float old = to_float<Half>(before[static_cast<size_t>(to.data - to.memory.data() + offset)]);
            const float expected = stored ? 2.f * from.value(channel, p, o1, o0, batch) : old;
            require(to_float<Half>(to.data[offset]) == expected, "an element of a stored box differs");
          }
        }
      }
    }
  }
}

int check_stores(const Options& options, std::mt19937& random) {
  run_stores(options, {0, 0, 0, 1, 1}, 21, 6, StoreMistake::kNone, random);
  run_stores(options, {64, 4, 3, 2, 0}, 8, 3, StoreMistake::kNone, random);
  run_stores(options, {8, 5, 4, 0, 1}, 128, 1, StoreMistake::kNone, random);
  return 3;
}

int check_store_mistakes() {
  const std::pair<StoreMistake, const char*> expectations[] = {
      {StoreMistake::kNoFence, "without a fence between"},
      {StoreMistake::kNoBarrier, "stored"},  // before or after the other threads' writes
      {StoreMistake::kNoWait, "while a box that is stored of it may be under way"},
      {StoreMistake::kNoCommit, "while a box that is stored of it may be under way"},
      {StoreMistake::kEndUnread, "may still be read from shared memory"},
      {StoreMistake::kUnwritten, "what was not written"},
      {StoreMistake::kReadBack, "read after a write in one launch"},
      {StoreMistake::kMisaligned, "no multiple of 1024"},
      {StoreMistake::kNotAnOutput, "is not an output"},
  };
  int checks = 0;
  for (const auto& expectation : expectations) {
    for (const bool late : {false, true}) {
      Options options;
      options.copies_land_late = late;
      std::mt19937 random(5);
      const std::string said =
          said_by([&] { run_stores(options, {0, 0, 0, 1, 1}, 8, 3, expectation.first, random); });
      require_noticed("a stored box", expectation.second, said);
      ++checks;
    }
  }
  return checks;
}

}  // namespace
}  // namespace cuda
}  // namespace ccnet
