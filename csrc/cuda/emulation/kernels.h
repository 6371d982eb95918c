// The kernels' sources as the emulated machine runs them.
#pragma once

#include "../plan.h"
#include "hopper_map.h"
// after make_map()
#include "../hopper_plan.h"
