// Checks of the emulated machine itself, for what hopper_device.h asks of it: boxes and products against plain matrix
// arithmetic on the tensors, and small kernels with one mistake each, which the machine must notice.
//
//   hopper_check
//
// Prints how many checks passed and exits with 0, or says what is wrong and exits with 1.
#include <stdio.h>

#include <cmath>

#include "cluster_check.h"
#include "store_check.h"

namespace ccnet {
namespace cuda {
namespace {

// A box into shared memory and out again, element by element.
template <typename T>
struct BoxArgs {
  TensorMap map;
  int at[5];
  float* out;  // [kTileRows][64]
};
template <typename T>
void box_kernel(CCNET_CONSTANT_PARAMETER BoxArgs<T> a) {
  SharedBarrier* const full = barrier_at(1, 0);
  if (thread_index() == 0) {
    init_barrier(full, 1);
    fence_barriers();
  }
  barrier();
  if (thread_index() == 0) {
    arrive_and_expect(full, a.map.bytes());
    load_box(dynamic_shared(), &a.map, a.at[0], a.at[1], a.at[2], a.at[3], a.at[4], full);
  }
  wait_phase(full, 0);
  const Panels panel{dynamic_shared(), kTileRows};
  for (int i = thread_index(); i < a.map.rows() * kPanelWidth<T>; i += kThreads) {
    store_global(a.out + i, to_float<T>(load_shared<T>(panel.template element<T>(i / kPanelWidth<T>, i % kPanelWidth<T>))));
  }
}

template <typename T>
int check_boxes(const Options& options, std::mt19937& random) {
  const Source<T> x(72, 21, 5, 3, 2, random);
  struct Place {
    int positions, group;
    int at[5];
  };
  const Place places[] = {{21, 6, {0, 0, 0, 1, 1}}, {21, 6, {64, 0, 3, 2, 0}}, {128, 1, {64, 5, 4, 0, 1}},
                          {16, 3, {0, 16, 4, 2, 1}}, {128, 1, {0, -3, 2, 1, 0}}, {8, 5, {-5, 0, 0, 0, 1}}};
  int checks = 0;
  for (const Place& place : places) {
    BoxArgs<T> args{x.map(place.positions, place.group), {}, nullptr};
    for (int d = 0; d < 5; ++d) args.at[d] = place.at[d];
    std::vector<float> out(static_cast<size_t>(args.map.rows() * kPanelWidth<T>), NAN);
    args.out = out.data();
    Machine machine(options);
    x.add_to(machine, "x");
    machine.add_region(out.data(), out.size() * 4, true, "out");
    machine.run_grid(1, kThreads, kBytes + 8, [&] { box_kernel<T>(args); });
    machine.check_outputs_written();
    for (size_t i = 0; i < out.size(); ++i) {
      const int row = static_cast<int>(i) / kPanelWidth<T>, channel = static_cast<int>(i) % kPanelWidth<T>;
      const float expected = x.value(place.at[0] + channel, place.at[1] + row % place.positions,
                                     place.at[2] + row / place.positions, place.at[3], place.at[4]);
      require(out[i] == expected, "a box's element differs");
    }
    ++checks;
  }
  return checks;
}

// How an operand reaches a product.
enum class Form { kDepth, kOuter, kRegisters };

constexpr int kDepth = 64;

template <typename T>
struct ProductArgs {
  TensorMap a, b;
  const T* a_data;  // position (0, 0, 0, 0)
  int64_t a_step;   // to the next position
  float* out;       // [128][N]
};
// Out = A B of 128 x kDepth and kDepth x N, added to itself once. A's rows, or its depth, are positions; likewise B's
// columns.
template <typename T, int N, Form A, Form B>
void product_kernel(CCNET_CONSTANT_PARAMETER ProductArgs<T> a) {
  const int thread = thread_index(), group = thread / kWarpgroup, lane = thread % kWarp;
  const int row = group * 64 + thread % kWarpgroup / kWarp * 16 + lane / 4, column = lane % 4 * 2;
  SharedBarrier* const full = barrier_at(4, 0);
  if (thread == 0) {
    init_barrier(full, 1);
    fence_barriers();
  }
  barrier();
  char* const panel_a = dynamic_shared();
  char* const panel_b = panel_a + 2 * kBytes;
  if (thread == 0) {
    arrive_and_expect(full, 4 * kBytes);
    for (int p = 0; p < 2; ++p) {
      load_box(panel_a + p * kBytes, &a.a, 64 * p, 0, 0, 0, 0, full);
      load_box(panel_b + p * kBytes, &a.b, 64 * p, 0, 0, 0, 0, full);
    }
  }
  uint32_t registers[kDepth / 16][4];
  for (int k = 0; k < kDepth / 16; ++k) {
    for (int r = 0; r < 4; ++r) {
      const T* const at = a.a_data + (row + r % 2 * 8) * a.a_step + 16 * k + column + r / 2 * 8;
      registers[k][r] = load_global(at).bits | static_cast<uint32_t>(load_global(at + 1).bits) << 16;
    }
  }
  wait_phase(full, 0);
  float d[N / 2];
  for (int turn = 0; turn < 2; ++turn) {
    begin_products();
    for (int k = 0; k < kDepth / 16; ++k) {
      constexpr Major major_b = B == Form::kDepth ? Major::kDepth : Major::kOuter;
      uint64_t b = panel_descriptor(panel_b) + static_cast<uint64_t>(B == Form::kDepth ? 32 * k : 16 * kRowBytes * k) / 16;
      if (B == Form::kOuter && N > 64) b += uint64_t{kBytes / 16 - 1} << 16;  // the next 64 columns are the next panel
      const bool add = turn > 0 || k > 0;
      if constexpr (A == Form::kRegisters) {
        WarpgroupProduct<T, N>::template multiply<major_b>(d, registers[k], b, add);
      } else if constexpr (A == Form::kDepth) {
        const uint64_t m = panel_descriptor(panel_a + group * 64 * kRowBytes) + static_cast<uint64_t>(2 * k);
        WarpgroupProduct<T, N>::template multiply<Major::kDepth, major_b>(d, m, b, add);
      } else {
        const uint64_t m = panel_descriptor(panel_a + group * kBytes + 16 * k * kRowBytes);
        WarpgroupProduct<T, N>::template multiply<Major::kOuter, major_b>(d, m, b, add);
      }
    }
    commit_products();
    wait_products<0>();
  }
  for (int i = 0; i < N / 2; ++i) {
    store_global(a.out + (row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2, d[i]);
  }
}

template <typename T, int N, Form A, Form B>
int check_product(const Options& options, std::mt19937& random) {
  // Beyond 100 positions and 120 channels there are zeros; registers want whole fragments.
  const Source<T> a(A == Form::kRegisters ? 128 : 120, A == Form::kRegisters ? 128 : 100, 2, 1, 1, random);
  const Source<T> b(120, 100, 1, 2, 2, random);
  std::vector<float> out(128 * N, NAN);
  const ProductArgs<T> args{a.map(128, 1), b.map(128, 1), a.data, a.stride[1], out.data()};
  Machine machine(options);
  a.add_to(machine, "a");
  b.add_to(machine, "b");
  machine.add_region(out.data(), out.size() * 4, true, "out");
  machine.run_grid(1, kThreads, 4 * kBytes + 8, [&] { product_kernel<T, N, A, B>(args); });
  machine.check_outputs_written();
  for (int r = 0; r < 128; ++r) {
    for (int c = 0; c < N; ++c) {
      double sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        sum += 2.0 * (A == Form::kOuter ? a.value(r, k, 0, 0, 0) : a.value(k, r, 0, 0, 0)) *
               (B == Form::kOuter ? b.value(c, k, 0, 0, 0) : b.value(k, c, 0, 0, 0));
      }
      require(fabs(out[static_cast<size_t>(r * N + c)] - sum) < 1e-4, "a product's element differs");
    }
  }
  return 1;
}
template <typename T, int N>
int check_products(const Options& options, std::mt19937& random) {
  return check_product<T, N, Form::kDepth, Form::kDepth>(options, random) +
         check_product<T, N, Form::kDepth, Form::kOuter>(options, random) +
         check_product<T, N, Form::kOuter, Form::kDepth>(options, random) +
         check_product<T, N, Form::kOuter, Form::kOuter>(options, random) +
         check_product<T, N, Form::kRegisters, Form::kDepth>(options, random) +
         check_product<T, N, Form::kRegisters, Form::kOuter>(options, random);
}

// What a kernel may do wrong.
enum class Mistake {
  kNone,
  kRefillEarly,          // a slot is filled without waiting for its release
  kReleaseEarly,         // a slot is released while products read it
  kWaitByOneThread,      // one thread waits for a box, a barrier follows
  kWaitTooLittle,        // the last group of products is not waited for before its slot is released
  kExpectTooMuch,        // bytes
  kExpectTooLittle,
  kNoInitFence,
  kNoInitBarrier,
  kInitTwice,
  kMisalignedBox,
  kNoBegin,
  kNoCommit,
  kOneWarpgroupOnly,     // half a warpgroup does not issue a product
  kDifferentMatrices,    // ... or issues it for another matrix
  kReadAccumulator,      // before the wait
  kWriteAccumulator,     // between the first product and the wait
  kAccumulatorAfterBegin,
  kOperandAfterBegin,    // registers of A change between begin_products() and the product
  kOverwriteOperand,     // ... between the product and the wait
  kNoFence,              // ordinary writes, read by products
  kNoBarrier,
  kLaneAlone,            // at a barrier of its own
  kLateFence,            // after the barrier
  kBoxOverWrites,        // ordinary writes, overwritten by a box, without a fence
  kWriteUnderProducts,   // ordinary writes to what products read
  kNamedBarrierOfHalf,   // in place of the whole CTA's
  kNamedBarrierCounts,   // threads disagree
  kBarrierAsData,
  kTouchBox,             // before it has landed
  kNoLaunchWait,
  kNoWaitLater,          // two launches later: the one between does not keep the order
};
struct Expectation {
  Mistake mistake;
  const char* message;
};
const Expectation kExpectations[] = {
    {Mistake::kRefillEarly, "written while a product that reads it may be under way"},
    {Mistake::kReleaseEarly, "written while a product that reads it may be under way"},
    {Mistake::kWaitByOneThread, "have waited for"},
    {Mistake::kWaitTooLittle, "written while a product that reads it may be under way"},
    {Mistake::kExpectTooMuch, "lacks 0 arrivals and 16 bytes"},
    {Mistake::kExpectTooLittle, ""},
    {Mistake::kNoInitFence, "fence_barriers() "},
    {Mistake::kNoInitBarrier, "barrier"},
    {Mistake::kInitTwice, "is initialised twice"},
    {Mistake::kMisalignedBox, "no multiple of 1024"},
    {Mistake::kNoBegin, "without begin_products()"},
    {Mistake::kNoCommit, "under way"},
    {Mistake::kOneWarpgroupOnly, "deadlock"},
    {Mistake::kDifferentMatrices, "products of different matrices"},
    {Mistake::kReadAccumulator, "result"},
    {Mistake::kWriteAccumulator, "was written while a product used it"},
    {Mistake::kAccumulatorAfterBegin, "changed after begin_products()"},
    {Mistake::kOperandAfterBegin, "changed after begin_products()"},
    {Mistake::kOverwriteOperand, "a register of A changed"},
    {Mistake::kNoFence, "without a fence between"},
    {Mistake::kNoBarrier, "without a barrier after another thread's write"},
    {Mistake::kLaneAlone, "lanes of one warp wait at different barriers"},
    {Mistake::kLateFence, "without a fence between"},
    {Mistake::kBoxOverWrites, "over ordinary writes without a fence"},
    {Mistake::kWriteUnderProducts, "written while a product that reads it may be under way"},
    {Mistake::kNamedBarrierOfHalf, "without a barrier after another thread's write"},
    {Mistake::kNamedBarrierCounts, "different counts"},
    {Mistake::kBarrierAsData, "touched like data"},
    {Mistake::kTouchBox, "while a copy into it is under way"},
    {Mistake::kNoLaunchWait, "an earlier launch that writes it may be under way"},
    {Mistake::kNoWaitLater, "an earlier launch that"},
};

// A pipeline as the kernels have it: out += A B^T over panels of channels that pass through a ring of two slots. Then
// the result, rounded, is written to shared memory as the left operand of one more product with B's first panel.
struct PipelineArgs {
  TensorMap a, b;
  int items;
  float* out;        // [128][64]
  bool add;          // to out
  Mistake mistake;
};
constexpr int kSlots = 2, kSlotBytes = 2 * kBytes;
constexpr int kPipelinePanels = 2 * kSlots + 1;
constexpr int kPipelineShared = kPipelinePanels * kBytes + 8 * 2 * kSlots;
void pipeline_kernel(CCNET_CONSTANT_PARAMETER PipelineArgs a) {
  using T = BFloat16;
  const auto wrong = [&](Mistake m) { return a.mistake == m; };
  const int thread = thread_index(), group = thread / kWarpgroup, lane = thread % kWarp;
  const int row = group * 64 + thread % kWarpgroup / kWarp * 16 + lane / 4, column = lane % 4 * 2;
  allow_next_launch();
  wait_for_previous_launch();
  const auto full = [](int slot) { return barrier_at(kPipelinePanels, slot); };
  const auto empty = [](int slot) { return barrier_at(kPipelinePanels, kSlots + slot); };
  if (thread == 0) {
    for (int s = 0; s < kSlots; ++s) {
      init_barrier(full(s), 1);
      init_barrier(empty(s), kThreads / kWarp);
    }
    if (wrong(Mistake::kInitTwice)) init_barrier(full(0), 1);
    if (!wrong(Mistake::kNoInitFence)) fence_barriers();
  }
  if (wrong(Mistake::kLaneAlone) && thread == 0) {
    barrier();
  } else if (!wrong(Mistake::kNoInitBarrier)) {
    barrier();
  }
  if (wrong(Mistake::kBarrierAsData)) load_shared<uint32_t>(reinterpret_cast<char*>(full(0)));

  int filled = 0;
  const auto fill = [&](int end) {
    if (thread == 0) {
      for (; filled < end && filled < a.items; ++filled) {
        const int slot = filled % kSlots;
        if (!wrong(Mistake::kRefillEarly)) wait_phase(empty(slot), filled / kSlots % 2 ^ 1);
        char* const panel = dynamic_shared() + slot * kSlotBytes;
        const int bytes = kSlotBytes + (wrong(Mistake::kExpectTooMuch) ? 16 : 0);
        arrive_and_expect(full(slot), wrong(Mistake::kExpectTooLittle) ? kBytes : bytes);
        load_box(panel + (wrong(Mistake::kMisalignedBox) ? 128 : 0), &a.a, 64 * filled, 0, 0, 0, 0, full(slot));
        load_box(panel + kBytes, &a.b, 64 * filled, 0, 0, 0, 0, full(slot));
      }
    }
    converge_warp();
  };
  fill(kSlots);
  float d[32];
  for (int item = 0; item < a.items; ++item) {
    const int slot = item % kSlots;
    char* const panel = dynamic_shared() + slot * kSlotBytes;
    if (wrong(Mistake::kTouchBox) && thread == 40 && item == 1) store_shared<float>(panel, 0.f);
    if (wrong(Mistake::kWaitByOneThread)) {
      if (thread == 0) wait_phase(full(slot), item / kSlots % 2);
      barrier();
    } else {
      wait_phase(full(slot), item / kSlots % 2);
    }
    if (!wrong(Mistake::kNoBegin)) begin_products();
    if (wrong(Mistake::kAccumulatorAfterBegin) && item > 0) d[3] += 1.f;
    if (wrong(Mistake::kOneWarpgroupOnly) && thread % kWarpgroup >= 64) return;
    for (int k = 0; k < 4; ++k) {
      const bool other = wrong(Mistake::kDifferentMatrices) && thread % kWarpgroup >= 64;
      WarpgroupProduct<T, 64>::multiply<Major::kDepth, Major::kDepth>(
          d, panel_descriptor(panel + (other ? 1 - group : group) * 64 * kRowBytes) + static_cast<uint64_t>(2 * k),
          panel_descriptor(panel + kBytes) + static_cast<uint64_t>(2 * k), item > 0 || k > 0);
    }
    if (!wrong(Mistake::kNoCommit)) commit_products();
    if (wrong(Mistake::kReleaseEarly) && lane == 0) arrive(empty(slot));
    if (wrong(Mistake::kWaitTooLittle)) {
      wait_products<1>();
    } else {
      wait_products<0>();
    }
    if (!wrong(Mistake::kReleaseEarly) && lane == 0) arrive(empty(slot));
    fill(item + 1 + kSlots);
  }
  wait_products<0>();

  const Panels tile{dynamic_shared() + 2 * kSlots * kBytes, kTileRows};
  float e[32];
  for (int turn = 0; turn < 2; ++turn) {
    for (int i = 0; i < 32; i += 2) {
      store_shared<uint32_t>(tile.element<T>(row + i / 2 % 2 * 8, i / 4 * 8 + column), pack<T>(d[i], d[i + 1]));
    }
    const bool fence = !wrong(Mistake::kNoFence) && !wrong(Mistake::kLateFence) && !wrong(Mistake::kBoxOverWrites);
    if (fence) fence_shared_for_async();
    if (wrong(Mistake::kNamedBarrierOfHalf)) {
      named_barrier(1 + thread / 64, 64);
    } else if (wrong(Mistake::kNamedBarrierCounts)) {
      named_barrier(1, thread < 128 ? 128 : 256);
    } else if (!wrong(Mistake::kNoBarrier)) {
      named_barrier(1 + group, kWarpgroup);  // each warpgroup reads its own rows
    }
    if (wrong(Mistake::kLateFence)) fence_shared_for_async();
    const int again = (a.items - 1) % kSlots;  // its B is still there
    char* const b = dynamic_shared() + again * kSlotBytes + kBytes;
    if (wrong(Mistake::kBoxOverWrites)) {
      barrier();
      if (thread == 0) load_box(tile.base, &a.a, 0, 0, 0, 0, 0, full(0));
      barrier();
    }

    float early = 0.f;
    uint32_t words[4] = {};
    begin_products();
    for (int k = 0; k < 4; ++k) {
      WarpgroupProduct<T, 64>::multiply<Major::kDepth, Major::kDepth>(
          e, panel_descriptor(tile.base + group * 64 * kRowBytes) + static_cast<uint64_t>(2 * k),
          panel_descriptor(b) + static_cast<uint64_t>(2 * k), k > 0);
    }
    if (wrong(Mistake::kOperandAfterBegin)) words[2] = 0x3f803f80;
    WarpgroupProduct<T, 64>::multiply<Major::kDepth>(e, words, panel_descriptor(b), true);  // adds zeros
    commit_products();
    if (wrong(Mistake::kReadAccumulator)) early = e[0];
    if (wrong(Mistake::kWriteAccumulator)) e[7] = 0.f;
    if (wrong(Mistake::kOverwriteOperand)) words[1] = 7;
    if (wrong(Mistake::kWriteUnderProducts)) store_shared<uint32_t>(tile.element<T>(row, column), 0);
    wait_products<0>();
    if (wrong(Mistake::kReadAccumulator)) e[0] = early;
  }
  for (int i = 0; i < 32; ++i) {
    float* const at = a.out + (row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2;
    store_global(at, e[i] + (a.add ? load_global(at) : 0.f));
  }
}

// Adds a launch to the first, one that overlaps with it.
void run_pipeline(const Options& options, Mistake mistake) {
  std::mt19937 random(3);
  const Source<BFloat16> a(280, 128, 1, 1, 1, random), b(280, 60, 1, 1, 1, random);
  const int items = 5;
  std::vector<float> out(128 * 64, NAN), other(128 * 64, NAN);
  PipelineArgs args{a.map(128, 1), b.map(128, 1), items, out.data(), false, mistake};
  Machine machine(options);
  a.add_to(machine, "a");
  b.add_to(machine, "b");
  machine.add_region(out.data(), out.size() * 4, true, "out");
  machine.add_region(other.data(), other.size() * 4, true, "other");
  const auto launch = [&](bool overlaps) {
    machine.run_grid(1, kThreads, kPipelineShared, [&] { pipeline_kernel(args); }, overlaps);
  };
  const auto plain = [&](float* to, const float* from, bool wait) {
    machine.run_grid(
        1, kThreads, 16,
        [&] {
          allow_next_launch();
          if (wait) wait_for_previous_launch();
          for (int i = thread_index(); i < 128 * 64; i += kThreads) store_global(to + i, from == nullptr ? 1.f : load_global(from + i));
        },
        true);
  };
  launch(false);
  args.add = true;
  launch(true);
  plain(other.data(), out.data(), mistake != Mistake::kNoLaunchWait);
  if (mistake == Mistake::kNoWaitLater) {
    plain(other.data(), nullptr, true);
    plain(out.data(), nullptr, false);  // the launch before has only just begun, and the one before it reads out
  }
  machine.check_outputs_written();
  std::vector<double> product(128 * 64);
  for (int r = 0; r < 128; ++r) {
    for (int c = 0; c < 64; ++c) {
      for (int k = 0; k < 280; ++k) product[static_cast<size_t>(r * 64 + c)] += a.value(k, r, 0, 0, 0) * b.value(k, c, 0, 0, 0);
    }
  }
  for (int r = 0; r < 128; ++r) {
    for (int c = 0; c < 64; ++c) {
      double sum = 0, scale = 0;
      for (int k = 0; k < 64; ++k) {
        const double term = 2 * product[static_cast<size_t>(r * 64 + k)] * b.value((items - 1) * 64 + k, c, 0, 0, 0);
        sum += term;
        scale += fabs(term);
      }
      require(fabs(other[static_cast<size_t>(r * 64 + c)] - sum) <= scale * 0.01, "the pipeline's result differs");
    }
  }
}

// Whether it fails, and its message says so.
bool fails(const Options& options, Mistake mistake, const char* message, std::string& said) {
  said = said_by([&] { run_pipeline(options, mistake); });
  return said != "nothing" && said.find(message) != std::string::npos;
}

int check_mistakes() {
  int checks = 0;
  for (const Expectation& e : kExpectations) {
    for (const emulation::Order order :
         {emulation::Order::kAscending, emulation::Order::kDescending, emulation::Order::kRandom}) {
      for (const bool late : {false, true}) {
        // What lies in registers shows only where products take their time.
        const bool in_registers = e.mistake >= Mistake::kReadAccumulator && e.mistake <= Mistake::kWriteAccumulator;
        if (in_registers && !late) continue;
        Options options;
        options.order = order;
        options.copies_land_late = late;
        std::string said;
        const bool noticed = fails(options, e.mistake, e.message, said);
        require(noticed,
                "mistake " + std::to_string(static_cast<int>(e.mistake)) + (late ? ", late" : ", at once") +
                    " should be noticed (" + e.message + "), but the machine said " + said);
        ++checks;
      }
    }
  }
  return checks;
}

int check_faults() {
  const Expectation any{Mistake::kNone, ""};
  const std::pair<Fault, const char*> faults[] = {
      {Fault::kSkipPhase, "wait"},
      {Fault::kWrongParity, ""},
      {Fault::kRefillEarly, "written while a product that reads it may be under way"},
      {Fault::kLoseArrival, "deadlock"},
      {Fault::kSkipFence, "without a fence between"},
      {Fault::kPlainBox, "result differs"},
      {Fault::kKeepOutside, "result differs"},
      {Fault::kTransposeDescriptor, ""},
      {Fault::kWaitTooLittle, "product"},
      {Fault::kSkipBarrier, ""},
      {Fault::kSkipLaunchWait, "an earlier launch"},
  };
  int checks = 0;
  for (const auto& fault : faults) {
    Options options;
    options.fault = fault.first;
    options.order = emulation::Order::kRandom;
    std::string said;
    const bool noticed = fails(options, any.mistake, fault.second, said);
    require(noticed,
            "fault " + std::to_string(static_cast<int>(fault.first)) + " should be noticed (" + fault.second +
                "), but the machine said " + said);
    ++checks;
  }
  return checks;
}

int check_maps(std::mt19937& random) {
  const Source<Half> x(64, 8, 1, 1, 1, random);
  const auto refused = [&](const std::function<void(BoxSource&)>& change) {
    BoxSource source = x.source(8, 1);
    change(source);
    TensorMap map;
    try {
      make_map(&map, source);
    } catch (const Error&) {
      return;
    }
    throw Error("a tensor map should have been refused");
  };
  refused([](BoxSource& s) { s.data = static_cast<const char*>(s.data) + 8; });
  refused([](BoxSource& s) { s.stride[2] = 12; });
  refused([](BoxSource& s) { s.stride[3] = int64_t{1} << 39; });
  refused([](BoxSource& s) { s.stride[4] = 0; });
  refused([](BoxSource& s) { s.box[1] = 257; });
  refused([](BoxSource& s) { s.box[2] = 0; });
  refused([](BoxSource& s) { s.box[0] = 32; });
  refused([](BoxSource& s) { s.size[1] = 0; });
  refused([](BoxSource& s) { s.size[1] = (int64_t{1} << 32) + 1; });
  return 9;
}

int run() {
  return emulation::status_of([] {
    int checks = 0;
    std::mt19937 random(1);
    for (int order = 0; order < 3; ++order) {
      for (const bool late : {false, true}) {
        Options options;
        options.order = static_cast<emulation::Order>(order);
        options.copies_land_late = late;
        checks += check_boxes<Half>(options, random) + check_stores(options, random) + check_clusters(options);
        checks += check_products<Half, 64>(options, random) + check_products<Half, 128>(options, random);
        checks += check_products<BFloat16, 64>(options, random) + check_products<BFloat16, 128>(options, random);
        run_pipeline(options, Mistake::kNone);
        ++checks;
      }
    }
    checks += check_maps(random) + check_mistakes() + check_faults() + check_store_mistakes();
    printf("%d checks passed\n", checks);
  });
}

}  // namespace
}  // namespace cuda
}  // namespace ccnet

int main() { return ccnet::cuda::run(); }
