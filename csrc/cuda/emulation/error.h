// What a GPU would leave undefined.
#pragma once

#include <stdexcept>

namespace ccnet {
namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace emulation
}  // namespace ccnet
