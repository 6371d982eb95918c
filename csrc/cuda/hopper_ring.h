// The ring of panels through which a CTA of the compute-capability-9.0 kernels streams its operands.
//
// Thread 0 fills slots in the order in which all warps consume them. A slot is refilled one step after it was released,
// so that thread 0, which computes like the others, seldom has to wait for them.
#pragma once

#include "hopper_lines.h"

namespace ccnet {
namespace cuda {

constexpr int kRingSlotBytes = panel_bytes(kTileRows);

// `Extra` panels that are no slots follow them: panel(Slots), ...
template <int Slots, int Warps, int Extra = 0>
struct Ring {
  static constexpr int kBarrierBytes = 2 * Slots * static_cast<int>(sizeof(SharedBarrier));
  static constexpr int kPlaceBytes = 4 * static_cast<int>(sizeof(int));
  static constexpr int kPanelBytes = (Slots + Extra) * kRingSlotBytes;
  static constexpr int kBytes = kPanelBytes + kBarrierBytes + kPlaceBytes;

  char* base;
  int slot = 0, phase = 0;  // of the next item to take

  CCNET_DEVICE explicit Ring(char* shared) : base(shared) {}

  CCNET_DEVICE char* panel(int slot) const { return base + slot * kRingSlotBytes; }
  CCNET_DEVICE SharedBarrier* full(int slot) const {
    return reinterpret_cast<SharedBarrier*>(base + kPanelBytes) + slot;
  }
  CCNET_DEVICE SharedBarrier* empty(int slot) const { return full(Slots + slot); }

  // By all threads, before anything else; a barrier() must follow, also before the place is read.
  CCNET_DEVICE void start() {
    if (thread_index() == 0) {
      CCNET_UNROLL
      for (int s = 0; s < Slots; ++s) {
        init_barrier(full(s), 1);
        init_barrier(empty(s), Warps);
      }
      fence_barriers();
    }
  }
  // Zeroes what boxes of `rows` rows leave of the panels; before the barrier() that follows start().
  CCNET_DEVICE void clear_tails(int rows) {
    if (rows == kTileRows) return;
    const int tail = (kTileRows - rows) * kRowSegments;
    for (int s = 0; s < Slots; ++s) {
      for (int i = thread_index(); i < tail; i += Warps * kWarp) {
        store_shared<Segment>(panel(s) + rows * kRowBytes + i * kSegmentBytes, Segment{{0, 0, 0, 0}});
      }
    }
    fence_shared_for_async();
  }

  // The next item's panel, once it is there.
  CCNET_DEVICE char* take() {
    char* const p = panel(slot);
    wait_phase(full(slot), phase);
    if (++slot == Slots) {
      slot = 0;
      phase ^= 1;
    }
    return p;
  }
  // This warp reads the last `Count` taken items no more.
  template <int Count>
  CCNET_DEVICE void release() {
    CCNET_UNROLL
    for (int i = Count; i > 0; --i) {
      if (thread_index() % kWarp == 0) arrive(empty(slot >= i ? slot - i : slot - i + Slots));
    }
  }

  // By thread 0: fills slots with the items before `end` that are not there yet; an item has `bytes` bytes, and
  // `load(item, panel, full)` brings it.
  template <typename Load>
  CCNET_DEVICE void fill(int end, int bytes, Load load) {
    int item = load_shared<int>(place_address(kFilled));
    if (item >= end) return;
    CCNET_UNROLL_BY(1)
    for (; item < end; ++item) {
      const int to = item % Slots;
      // The wait for the phase before a barrier's first ends at once.
      wait_phase(empty(to), (item / Slots & 1) ^ 1);
      arrive_and_expect(full(to), bytes);
      load(item, panel(to), full(to));
    }
    store_shared<int>(place_address(kFilled), item);
  }

  // Where the CTA's lines lie, and how many items were loaded, kept out of registers: its coordinates as load_box() takes them.
  CCNET_DEVICE void keep_place(const Line& group) {
    if (thread_index() != 0) return;
    store_shared<int>(place_address(0), static_cast<int>(group.at[1]));
    store_shared<int>(place_address(1), static_cast<int>(group.at[0]));
    store_shared<int>(place_address(2), static_cast<int>(group.batch));
    store_shared<int>(place_address(kFilled), 0);
  }
  CCNET_DEVICE int place(int i) const { return load_shared<int>(place_address(i)); }
  CCNET_DEVICE Line group() const { return {place(2), {place(1), place(0)}}; }

 private:
  static constexpr int kFilled = 3;
  CCNET_DEVICE char* place_address(int i) const {
    return base + kPanelBytes + kBarrierBytes + i * static_cast<int>(sizeof(int));
  }
};

}  // namespace cuda
}  // namespace ccnet
