#include "common.h"
namespace ccnet {
namespace cpu {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace cpu
}  // namespace ccnet
