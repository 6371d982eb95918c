// What a GPU would leave undefined, and what a program that checks says of it.
#pragma once

#include <stdio.h>

#include <stdexcept>

namespace ccnet {
namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A program's exit status: 1 where its checks end in an error, which is printed.
template <typename Checks>
int status_of(const Checks& checks) {
  try {
    checks();
  } catch (const std::exception& e) {
    printf("FAILED: %s\n", e.what());
    return 1;
  }
  return 0;
}

}  // namespace emulation
}  // namespace ccnet
