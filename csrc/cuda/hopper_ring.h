// Rings of panels in shared memory, through which one thread moves what the warps of a CTA compute with.
#pragma once

#include "hopper_lines.h"

namespace ccnet {
namespace cuda {

// Stages that one thread fills and all warps consume in turn.
template <int Stages, int StageBytes, int Arrivals>
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
  CCNET_DEVICE char* stage(int s) const { return stages + s * StageBytes; }

  // The loader's next stage, once everyone has released it: the caller brings `bytes` bytes into it, on full[it].
  CCNET_DEVICE int acquire(int bytes) {
    if (!first_round) wait_phase(full + Stages + slot, parity ^ 1);
    arrive_and_expect(full + slot, bytes);
    return step();
  }
  // A consumer's next stage, filled.
  CCNET_DEVICE int take() {
    wait_phase(full + slot, parity);
    return step();
  }
  // By one lane of each warp, when the warp's products have read the stage.
  CCNET_DEVICE void release(int s) { arrive(full + Stages + s); }

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

// Panels that leave by the TMA: the thread that moves panels hands one out, empty or with what the warps add to; they
// write it and hand it back; the thread stores it.
template <int Panels, int PanelBytes, int Arrivals>
struct OutputRing {
  char* panels;
  SharedBarrier* ready;  // Panels of them, and as many more, `written`
  int slot = 0, parity = 0;  // of the next panel, of the warp, or to be stored

  CCNET_DEVICE OutputRing(char* memory, char* barriers)
      : panels(memory), ready(reinterpret_cast<SharedBarrier*>(barriers)) {}

  // By one thread.
  CCNET_DEVICE void init() {
    for (int s = 0; s < Panels; ++s) {
      init_barrier(ready + s, 1);
      init_barrier(ready + Panels + s, Arrivals);
    }
    fence_barriers();
  }
  CCNET_DEVICE char* panel(int s) const { return panels + s * PanelBytes; }

  // The warps' next panel. When all its lanes' writes are there and fenced, one lane of each warp hands it back.
  CCNET_DEVICE int take() {
    wait_phase(ready + slot, parity);
    return step();
  }
  CCNET_DEVICE void hand_back(int s) { arrive(ready + Panels + s); }

  // The next panel to be stored, once all warps have handed it back.
  CCNET_DEVICE int written() {
    wait_phase(ready + Panels + slot, parity);
    return step();
  }

 private:
  CCNET_DEVICE int step() {
    const int s = slot;
    if (++slot == Panels) {
      slot = 0;
      parity ^= 1;
    }
    return s;
  }
};

}  // namespace cuda
}  // namespace ccnet
