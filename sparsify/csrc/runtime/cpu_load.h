// The load of the processors, as the system tells it.
#pragma once

#include <cstdint>

namespace sparsify {

// Seconds since some moment that this process computed, and that the processors it may use were idle.
struct Load {
    double own_s, idle_s;
    int processors;
};

// False where nobody tells.
bool look_at_load(Load &load);

// How long this thread has been ready to run while another one had the processor; 0 where nobody tells.
int64_t thread_queued_ns();

}  // namespace sparsify
