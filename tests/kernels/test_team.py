"""Teams: after a wait for a core that another process holds, calls stay alone until it is free again."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parent.parent.parent / "sparsify" / "csrc"
COMPILER = os.environ.get("CXX", "g++")

# What team.cpp decides, event after event. Each is followed by the ms at which it ends and by the processors left to
# this process since the last look. `stall` and other kinds of calls take 8 ms, a quick one 0.1; `at` asks.
DECIDE = r"""
#include <cstdio>
#include <cstring>
#include "common.h"
namespace sparsify {
double now_s, free_processors, idle_s;
bool known = true;
int64_t queued_ns;
int64_t thread_queued_ns() { return queued_ns; }
bool look_at_load(Load &load) {
    static double last_s;
    idle_s += free_processors * (now_s - last_s);
    last_s = now_s;
    load = {now_s, 0, idle_s};
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
        if (!strcmp(what, "at")) putchar(team_is_worthwhile(now_ns) ? 'T' : '-');
    }
}
"""
LOOK = r"""
#include <cstdio>
#include "common.h"
int main() {
    using namespace sparsify;
    Load from, to;
    if (!look_at_load(from)) return 1;
    do look_at_load(to); while (to.wall_s - from.wall_s < 0.3);
    printf("%f %f %f", to.wall_s - from.wall_s, to.own_s - from.own_s, to.idle_s - from.idle_s);
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    if not shutil.which(COMPILER):
        pytest.skip(f"no C++ compiler {COMPILER}")
    folder = tmp_path_factory.mktemp("team")

    def build(source, main):
        (folder / "main.cpp").write_text(main)
        program = folder / source.removesuffix(".cpp")
        command = [COMPILER, "-std=c++17", f"-I{SOURCES}", str(SOURCES / source), str(folder / "main.cpp"), "-o"]
        subprocess.run([*command, str(program)], check=True)
        return program

    return build


@pytest.fixture(scope="module")
def decide(build):
    program = build("team.cpp", DECIDE)
    return lambda events: subprocess.run([program], input=events, capture_output=True, text=True, check=True).stdout


def every_100_ms(first, n, free):
    return " ".join(f"at {ms} {free}" for ms in range(first, first + 100 * n, 100))


STALLS = "stall 1000 2 stall 1010 2"  # the first one is a hiccup


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        pytest.param("at 1 0 at 2 0", "TT", id="nothing has stalled"),
        pytest.param("short 1000 0 at 1010 0 short 1020 0 at 1030 0", "TT", id="waits no longer than the work"),
        pytest.param("stall 1000 0 at 1010 2 stall 1200 2 at 1210 2", "TT", id="hiccups on a machine with room"),
        pytest.param("stall 1000 2 stall 1200 1.5 at 1210 2", "-", id="no room since the last one"),
        pytest.param(f"{STALLS} at 1020 2 at 1111 2 at 1112 2", "-TT", id="two in a row cost a window"),
        pytest.param("stall 900 2 at 901 2 queued 910 2 at 911 2", "T-", id="in the queue half of the time"),
        pytest.param("stall 900 2 quick 909 2 queued 910 2 at 911 2", "-", id="quick calls between or not"),
        pytest.param("stall 900 2 queued 920 2 at 921 2", "T", id="in the queue a fifth of the time"),
        pytest.param(f"{STALLS} at 1020 2 forget 1021 2 at 1022 2", "-T", id="whoever measures forgets"),
        pytest.param(f"{STALLS} {every_100_ms(1111, 9, 1)}", "-" * 9, id="the other process stays"),
        pytest.param(f"{STALLS} {every_100_ms(1111, 5, 1)} at 1620 1.5 at 1750 1.8", "-" * 6 + "T", id="and goes"),
        pytest.param(f"{STALLS} at 1111 2 stall 1120 2 {every_100_ms(1221, 3, 2)}", "T-TT", id="it is back"),
        pytest.param(
            f"{STALLS} at 1111 2 stall 1120 2 at 1221 2 at 1322 1 {every_100_ms(1423, 3, 2)}", "T---TT", id="in a row"
        ),
        pytest.param(f"{STALLS} at 1111 2 stall 1120 2 at 1500 2", "TT", id="many may go by between calls"),
        pytest.param(f"{STALLS} at 1111 2 stall 2500 1 at 2601 2", "TT", id="much later it is one again"),
        pytest.param("blind 0 0 stall 1000 0 stall 1010 0 at 1100 0 at 1111 0", "-T", id="load unknown: by the clock"),
    ],
)
def test_whether_calls_use_a_team(decide, events, expected):
    assert decide(events) == expected


def test_stalls_that_come_back_are_waited_out_longer_but_not_for_ever(decide):
    """Each stall comes half a second after calls are together again."""
    events, expected, now = "stall 1000 2 ", "", 1010
    for windows in (1, 2, 4, 8, 8, 8):
        events += f"stall {now} 1 {every_100_ms(now + 101, windows, 2)} "
        expected += "-" * (windows - 1) + "T"
        now += 101 + 100 * windows + 500
    assert decide(events) == expected


def test_the_load_is_that_of_the_machine(build):
    if not Path("/proc/stat").exists():
        pytest.skip("no /proc/stat here")
    program = build("load.cpp", LOOK)
    before = time.monotonic()
    wall, own, idle = map(float, subprocess.check_output([program], text=True).split())
    assert 0.3 <= wall <= time.monotonic() - before
    assert 0 < own <= wall + 0.01
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert -tick <= idle <= len(os.sched_getaffinity(0)) * (wall + 2 * tick)
