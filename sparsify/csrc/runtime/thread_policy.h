// The decision whether a call may use several threads, from stalls and from the load of the machine.
#pragma once

#include <cstdint>

namespace sparsify {

// Whether a call that begins at now_ns may use several threads, as far as stalls are known.
bool team_is_worthwhile(int64_t now_ns);

// A call by a team, in the eyes and from the thread of its caller.
struct TeamCall {
    int n_threads;
    int64_t start_ns, own_work_done_ns, end_ns;
};

void note_call(const TeamCall &call);

}  // namespace sparsify
