// Threads of our own, as a team (runtime/team.h).
#pragma once

#include "runtime/team.h"

namespace sparsify {

void run_pool(int n_threads, TeamBody body, void *context);

}  // namespace sparsify
