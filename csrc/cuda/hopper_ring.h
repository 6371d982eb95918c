// Rings of panels in shared memory, through which one thread moves what the warps of a CTA compute with.
#pragma once

#include "hopper_lines.h"

namespace ccnet {
namespace cuda {

// Stages of `Bytes` bytes, each with a barrier `full`, at which one thread hands it to the warps, and a barrier `empty`,
// at which all warps give it back: operands that the thread loads, or panels of an output, handed out empty or with what
// the warps add to, which the thread stores by the TMA.
template <int Stages, int Bytes, int Arrivals>
struct StageRing {
  char* stages;
  SharedBarrier* full;  // Stages of them, and as many more, `empty`
  int slot = 0, parity = 0;  // of the next stage
  bool first_round = true;

  CCNET_DEVICE StageRing(char* memory, char* barriers)
      : stages(memory), full(reinterpret_cast<SharedBarrier*>(barriers)) {}

  // By one thread.
  CCNET_DEVICE void init() {
    for (int s = 0; s < Stages; ++s) {
      init_barrier(full + s, 1);
      init_barrier(full + Stages + s, Arrivals);
    }
    fence_barriers();
  }
  CCNET_DEVICE char* stage(int s) const { return stages + s * Bytes; }

  // The loader's next stage, once everyone has released it: the caller brings `bytes` bytes into it, on full[it].
  CCNET_DEVICE int acquire(int bytes) {
    if (!first_round) wait_phase(full + Stages + slot, parity ^ 1);
    arrive_and_expect(full + slot, bytes);
    return step();
  }
  // A warp's next stage, once it was handed out.
  CCNET_DEVICE int take() {
    wait_phase(full + slot, parity);
    return step();
  }
  // By one lane of each warp: of operands, when the warp's products have read them; of an output, when all its lanes'
  // writes are there and fenced.
  CCNET_DEVICE void release(int s) { arrive(full + Stages + s); }
  // The next panel of the output to be stored, once everyone has released it.
  CCNET_DEVICE int written() {
    wait_phase(full + Stages + slot, parity);
    return step();
  }

 private:
  CCNET_DEVICE int step() {
    const int s = slot;
    if (++slot == Stages) {
      slot = 0;
      parity ^= 1;
      first_round = false;
    }
    return s;
  }
};

// Zeroes the rows that boxes of `rows` rows leave of `count` panels: nothing but finite numbers may be multiplied with
// weights of zero. By `threads` threads, of which `thread` is one; a barrier must follow.
CCNET_DEVICE void clear_tails(char* panels, int count, int rows, int thread, int threads) {
  for (int row = rows + thread / kRowSegments; row < kTileRows; row += threads / kRowSegments) {
    CCNET_UNROLL_BY(1)
    for (int panel = 0; panel < count; ++panel) {
      char* const panel_row = panels + panel * panel_bytes(kTileRows) + row * kRowBytes;
      store_shared<Segment>(panel_row + thread % kRowSegments * kSegmentBytes, {{0, 0, 0, 0}});
    }
  }
  fence_shared_for_async();
}

}  // namespace cuda
}  // namespace ccnet
