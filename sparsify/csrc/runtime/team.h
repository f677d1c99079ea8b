// A team: threads that run one function together. OpenMP's where torch has the same, ours elsewhere, or none.
#pragma once

namespace sparsify {

// Runs the part of one member; 0 is the thread that called. Does not throw.
using TeamBody = void (*)(void *context, int member);

// SPARSIFY_OK, or SPARSIFY_UNKNOWN_THREADS if SPARSIFY_THREADS names no team of this library.
int team_status();

// "openmp", "pool" or "serial".
const char *team_name();

// Whether any other thread can come now: never to "serial"; to "openmp" not in the child of a fork, whose libgomp still
// believes in threads that are not there and would wait for ever.
bool team_has_others();

// Runs body(context, 0) here and body(context, i) for some i of 1 to n_threads - 1, once each and each on another
// thread. It is not said who comes: one who finds the work done, or works for another caller, does not. Returns when
// all who came are done. A body that calls run_team again, or another caller meanwhile, may be left alone.
void run_team(int n_threads, TeamBody body, void *context);

}  // namespace sparsify
