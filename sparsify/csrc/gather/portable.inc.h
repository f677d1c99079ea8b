// The gather form (gather/format.h) in plain C++.
#pragma once

#include "gather/plain.inc.h"

namespace {

constexpr GatherTile GATHER_TILE = GATHER_WIDE;

using Gather = GatherPlain;

}  // namespace
