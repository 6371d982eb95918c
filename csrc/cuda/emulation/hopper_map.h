// Tensor maps of the emulated machine.
#pragma once

#include "../hopper_lines.h"

namespace ccnet {
namespace cuda {

// Returns 0; throws where the driver would refuse the map.
inline int make_map(TensorMap* map, const BoxSource& source) {
  TensorMap m{};
  m.data = static_cast<const char*>(source.data);
  m.element_bytes = source.element_bytes;
  for (int d = 0; d < 5; ++d) {
    m.size[d] = source.size[d];
    m.stride[d] = source.stride[d] * source.element_bytes;
    m.box[d] = source.box[d];
  }
  m.check();
  m.made = TensorMap::kMade;
  *map = m;
  return 0;
}

}  // namespace cuda
}  // namespace ccnet
