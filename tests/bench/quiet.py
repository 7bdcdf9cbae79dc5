"""Which processors are quiet: those of a virtual machine share cores with other machines' work.

The same piece of Python takes up to twice as long on a processor whose core somebody else is using,
and it changes by the minute. So before a system is measured its processes are given, each, one of the
processors that are quickest just then; every system alike. Two that share a core are each quick while
the other is idle, and this is not always said: so those that were chosen are kept busy meanwhile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from time import perf_counter_ns, sleep

_TRIES = 5
_START_S = 0.05


def _work_ns() -> int:
    began_ns = perf_counter_ns()
    table: dict[int, tuple[int, str]] = {}
    for number in range(4000):
        table[number & 255] = (number, str(number))
    return perf_counter_ns() - began_ns


def quickest(count: int) -> list[int]:
    """Return `count` processors, the quickest first; none where there are not twice as many."""
    mine = os.sched_getaffinity(0)
    if len(mine) < 2 * count:
        return []
    chosen: list[int] = []
    busy: list[subprocess.Popen[bytes]] = []
    try:
        while len(chosen) < count:
            chosen.append(_quickest_of(mine.difference(chosen)))
            os.sched_setaffinity(0, {chosen[-1]})  # which the child inherits
            busy.append(subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]))
            sleep(_START_S)
    finally:
        os.sched_setaffinity(0, mine)
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()
    return chosen


def _quickest_of(cpus: set[int]) -> int:
    took: dict[int, int] = {}
    for _ in range(2):  # what is busy for a moment only gets another chance
        for cpu in sorted(cpus):
            os.sched_setaffinity(0, {cpu})
            best_ns = sorted(_work_ns() for _ in range(_TRIES))[_TRIES // 2]
            took[cpu] = min(took.get(cpu, best_ns), best_ns)
    return min(took, key=lambda cpu: took[cpu])


def pin(cpu: int | None) -> None:
    """Keep the calling thread, not the others of its process, on one processor."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
