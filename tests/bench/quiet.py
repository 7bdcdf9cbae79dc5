"""Which processors are quiet: those of a virtual machine share cores with other machines' work.

The same piece of Python takes up to twice as long on a processor whose core somebody else is using,
and it changes by the minute. So before a system is measured its processes are given, each, one of the
processors that are quickest just then; every system alike.
"""

from __future__ import annotations

import os
from time import perf_counter_ns

_TRIES = 5


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
    took: dict[int, int] = {}
    try:
        for _ in range(2):  # what is busy for a moment only gets another chance
            for cpu in sorted(mine):
                os.sched_setaffinity(0, {cpu})
                best_ns = sorted(_work_ns() for _ in range(_TRIES))[_TRIES // 2]
                took[cpu] = min(took.get(cpu, best_ns), best_ns)
    finally:
        os.sched_setaffinity(0, mine)
    return sorted(took, key=lambda cpu: took[cpu])[:count]


def pin(cpu: int | None) -> None:
    """Keep the calling thread, not the others of its process, on one processor."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
