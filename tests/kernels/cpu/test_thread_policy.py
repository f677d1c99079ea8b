"""Teams: after a wait for a core that another process holds, calls stay alone until it is free again."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[3] / "sparsify" / "csrc"
COMPILER = os.environ.get("CXX", "g++")

# The decisions of thread_policy.cpp, event after event. Each is followed by the ms at which it ends and by the
# processors left to this process since the last look. `stall` and other kinds of calls take 8 ms, a quick one 0.1;
# `at` asks.
DECIDE = r"""
#include <cstdio>
#include <cstring>
#include "runtime/cpu_load.h"
#include "runtime/thread_policy.h"
#include "sparsify.h"
namespace sparsify {
double now_s, free_processors, idle_s;
int processors = 2;
bool known = true;
int64_t queued_ns;
int64_t thread_queued_ns() { return queued_ns; }
bool look_at_load(Load &load) {
    static double last_s;
    idle_s += free_processors * (now_s - last_s);
    last_s = now_s;
    load = {0, idle_s, processors};
    return known;
}
}
int main() {
    using namespace sparsify;
    char what[16];
    double ms;
    while (scanf("%15s %lf %lf", what, &ms, &free_processors) == 3) {
        now_s = ms / 1e3;
        const int64_t now_ns = int64_t(ms * 1e6);
        if (!strcmp(what, "stall")) note_call({2, now_ns - 8000000, now_ns - 7900000, now_ns});
        if (!strcmp(what, "short")) note_call({2, now_ns - 8000000, now_ns - 2000000, now_ns});
        if (!strcmp(what, "quick")) note_call({2, now_ns - 100000, now_ns - 50000, now_ns});
        if (!strcmp(what, "queued")) {
            queued_ns += 4000000;
            note_call({2, now_ns - 8000000, now_ns, now_ns});
        }
        if (!strcmp(what, "forget")) sparsify_forget_stalls();
        if (!strcmp(what, "blind")) known = false;
        if (!strcmp(what, "single")) processors = 1;
        if (!strcmp(what, "at")) putchar(team_is_worthwhile(now_ns) ? 'T' : '-');
    }
}
"""
LOOK = r"""
#include <chrono>
#include <cstdio>
#include "runtime/cpu_load.h"
#include "runtime/thread_policy.h"
int main() {
    using namespace sparsify;
    const auto now = std::chrono::steady_clock::now;
    Load from, to;
    const auto start = now();
    if (!look_at_load(from)) return 1;
    do look_at_load(to); while (now() - start < std::chrono::milliseconds(300));
    const std::chrono::duration<double> wall = now() - start;
    printf("%f %f %f", wall.count(), to.own_s - from.own_s, to.idle_s - from.idle_s);
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    if not shutil.which(COMPILER):
        pytest.skip(f"no C++ compiler {COMPILER}")
    folder = tmp_path_factory.mktemp("team")

    def build(source, main):
        (folder / "main.cpp").write_text(main)
        program = folder / Path(source).stem
        command = [COMPILER, "-std=c++17", f"-I{SOURCES}", str(SOURCES / source), str(folder / "main.cpp"), "-o"]
        subprocess.run([*command, str(program)], check=True)
        return program

    return build


@pytest.fixture(scope="module")
def decide(build):
    program = build("runtime/thread_policy.cpp", DECIDE)
    return lambda events: subprocess.run([program], input=events, capture_output=True, text=True, check=True).stdout


def every_100_ms(first, n, free):
    return " ".join(f"at {ms} {free}" for ms in range(first, first + 100 * n, 100))


STALLS = "stall 1000 2 stall 1070 1"  # the first one is a hiccup


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        pytest.param("at 1 0 at 2 0", "TT", id="nothing has stalled"),
        pytest.param("short 1000 0 short 1070 0 at 1071 0", "T", id="waits no longer than the work"),
        pytest.param("stall 1000 0 at 1010 2 stall 1070 2 at 1071 2", "TT", id="hiccups on a machine with room"),
        pytest.param("stall 1000 2 stall 1010 0 at 1011 0", "T", id="too soon to tell"),
        pytest.param("stall 1000 2 stall 1070 1.5 at 1071 2", "-", id="no room since the last one"),
        pytest.param(
            "stall 1000 2 stall 1008 2 stall 1016 2 stall 1070 2 at 1071 2", "-", id="room, but always stalls"
        ),
        pytest.param("stall 1000 2 stall 1008 2 stall 1016 2 stall 1200 2 at 1201 2", "T", id="room, and many stalls"),
        pytest.param(f"{STALLS} at 1080 2 at 1171 2 at 1172 2", "-TT", id="a stall costs a window"),
        pytest.param(
            "stall 1000 2 queued 1010 1 queued 1020 1 queued 1070 1 at 1071 2", "T", id="in no queue for long"
        ),
        pytest.param("stall 1000 2 queued 1060 1 queued 1070 1 at 1071 2", "-", id="half of the time in the queue"),
        pytest.param("stall 1000 2 queued 1060 1 quick 1069 1 queued 1070 1 at 1071 2", "-", id="between quick calls"),
        pytest.param(f"{STALLS} at 1080 2 forget 1081 2 at 1082 2", "-T", id="whoever measures forgets"),
        pytest.param(f"{STALLS} {every_100_ms(1171, 9, 1)}", "-" * 9, id="the other process stays"),
        pytest.param(f"{STALLS} {every_100_ms(1171, 5, 1)} at 1680 1.5 at 1810 1.8", "-" * 6 + "T", id="and goes"),
        pytest.param(f"{STALLS} at 1171 2 stall 1240 1 {every_100_ms(1341, 3, 2)}", "T-TT", id="it is back"),
        pytest.param(
            f"{STALLS} at 1171 2 stall 1240 1 at 1341 2 at 1442 1 {every_100_ms(1543, 3, 2)}", "T---TT", id="in a row"
        ),
        pytest.param(f"{STALLS} at 1171 2 stall 1240 1 at 1500 2", "TT", id="many may go by between calls"),
        pytest.param(f"{STALLS} at 1171 2 stall 2500 1 at 2601 2", "TT", id="much later it is one again"),
        pytest.param("single 0 1 stall 1000 1 stall 1200 1 at 1201 1", "T", id="more threads than processors"),
        pytest.param("blind 0 0 stall 1000 0 stall 1030 0 stall 1060 0 at 1100 0 at 1161 0", "-T", id="load unknown"),
    ],
)
def test_whether_calls_use_a_team(decide, events, expected):
    assert decide(events) == expected


def test_stalls_that_come_back_are_waited_out_longer_but_not_for_ever(decide):
    """Each stall comes half a second after calls are together again."""
    events, expected, now = "stall 930 2 ", "", 1000
    for windows in (1, 2, 4, 8, 8, 8):
        events += f"stall {now} 1 {every_100_ms(now + 101, windows, 2)} "
        expected += "-" * (windows - 1) + "T"
        now += 101 + 100 * windows + 500
    assert decide(events) == expected


def test_the_load_is_that_of_the_machine(build):
    if not Path("/proc/stat").exists():
        pytest.skip("no /proc/stat here")
    program = build("runtime/cpu_load.cpp", LOOK)
    before = time.monotonic()
    wall, own, idle = map(float, subprocess.check_output([program], text=True).split())
    assert 0.3 <= wall <= time.monotonic() - before
    assert 0 < own <= wall + 0.01
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert -tick <= idle <= len(os.sched_getaffinity(0)) * (wall + 2 * tick)
