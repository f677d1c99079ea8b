// The processors of this machine.
#pragma once

namespace sparsify {

// Those that this process may use, at least 1. Asked of the system once.
int n_processors();

}  // namespace sparsify
