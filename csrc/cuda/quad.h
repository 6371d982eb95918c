// The four lanes that share rows of a tensor-core product.
#pragma once

#include "device.h"

namespace ccnet {
namespace cuda {

// Exchanges 4x4 words within each four lanes: lane t's word j becomes lane j's word t. A collective of the warp.
CCNET_DEVICE void transpose_words(uint32_t (&w)[4]) {
  const int lane = thread_index();
  CCNET_UNROLL
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool high = (lane & bit) != 0;
    CCNET_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t kept = high ? w[i + bit] : w[i];
      const uint32_t sent = high ? w[i] : w[i + bit];
      const uint32_t got = float_to_bits(shuffle_xor(bits_to_float(sent), bit));
      w[i] = high ? got : kept;
      w[i + bit] = high ? kept : got;
    }
  }
}

}  // namespace cuda
}  // namespace ccnet
