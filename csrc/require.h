// Errors for whoever calls the operators: a sentence alone. STD_TORCH_CHECK puts the function, the path that this code
// was compiled at and the line before it.
#pragma once

#include <sstream>
#include <stdexcept>

namespace ccnet {

// A RuntimeError in Python; the parts are written one after the other.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) refuse(parts...);
}

}  // namespace ccnet
