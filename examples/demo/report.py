"""What is shown: progress while the demo runs, and the tables and the verdict at its end."""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import TextIO

from featcache import Statistics
from rank import Way

LEVELS = ("normal", "elevated", "high", "exhausted")


class Progress:
    """A line that is written over on a terminal; elsewhere plain lines, one a second at most."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self.out = out
        self.over = out.isatty()
        self.next = 0.0

    def show(
        self, stage: str, done: int, total: int, note: str = "", *, last: bool = False
    ) -> None:
        if not last and time.monotonic() < self.next:
            return
        self.next = time.monotonic() + (0.05 if self.over else 1)
        line = f"{stage} {done}/{total}{note and ', ' + note}"
        self.out.write(f"\r\x1b[2K{line}" if self.over else f"{line}\n")
        self.out.flush()

    def clear(self) -> None:
        """Leave a terminal's line empty for the next output."""
        if self.over:
            self.out.write("\r\x1b[2K")
            self.out.flush()


@dataclass
class Row:
    """What was measured for one picture; times are host time in seconds."""

    name: str
    size: str
    grid: tuple[int, int, int]
    bytes: int
    puts: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # the puts that had to wait
    reads: dict[Way, list[float]] = field(default_factory=lambda: {"borrow": [], "get": []})
    error: float = 0.0
    wrong: int = 0  # products that differ from the one computed in one process


@dataclass
class Outcome:
    """What was measured for the whole run."""

    rows: list[Row]
    devices: str = ""
    hosts: str = ""
    capacity: int = 0
    level: str = LEVELS[0]
    used: int = 0
    waited: int = 0
    recycled: int = 0
    reads_owed: int = 0
    reads_paid: int = 0
    left: int = 0

    def sample(self, level: str, now: Statistics) -> None:
        """Keep the highest pressure that was seen, and the counters as they are."""
        self.level = max(self.level, level, key=LEVELS.index)
        self.used = max(self.used, now.used_bytes)
        self.capacity, self.left = now.capacity_bytes, now.used_bytes
        self.waited, self.recycled = now.waited, now.recycled

    def faults(self) -> list[str]:
        """What went wrong, in words; empty if all is well."""
        puts = sum(len(row.puts) + len(row.waits) for row in self.rows)
        checks = {
            "wrong product": sum(row.wrong for row in self.rows),
            "read not paid": self.reads_owed - self.reads_paid,
            "put not recycled": puts - self.recycled,
            "byte left in the pool": self.left,
        }
        return [f"{what}: {count}" for what, count in checks.items() if count]


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def micros(seconds: Iterable[float]) -> str:
    """The median in microseconds, or a dash where nothing was measured."""
    values = list(seconds)
    return f"{median(values) * 1e6:,.0f}" if values else "-"


def table(rows: Iterable[Row]) -> str:
    """One line for each picture."""
    lines = [
        ("picture", "size", "patches", "bytes", "put µs", "waited", "borrow µs", "get µs", "error")
    ]
    lines += [
        (
            row.name,
            row.size,
            "x".join(map(str, row.grid)),
            mebibytes(row.bytes),
            micros(row.puts + row.waits),
            str(len(row.waits) or ""),
            micros(row.reads["borrow"]),
            micros(row.reads["get"]),
            f"{row.error:.1e}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def summary(outcome: Outcome) -> str:
    """The run as a whole, and whether it was right."""
    rows = outcome.rows
    free = [seconds for row in rows for seconds in row.puts]
    waits = [seconds for row in rows for seconds in row.waits]
    puts = len(free) + len(waits)
    total = sum(row.bytes * (len(row.puts) + len(row.waits)) for row in rows)
    reads: dict[Way, list[float]] = {
        "borrow": [seconds for row in rows for seconds in row.reads["borrow"]],
        "get": [seconds for row in rows for seconds in row.reads["get"]],
    }
    error = max((row.error for row in rows), default=0.0)
    facts = {
        "images": f"{len(rows)}, {puts} puts with 4 named readers each",
        "devices": outcome.devices,
        "hosts": outcome.hosts,
        "bytes": f"{mebibytes(total)} through a pool of {mebibytes(outcome.capacity)}",
        "put": f"{micros(free)} µs, median of the {len(free)} that found room",
        "put that waited": f"{micros(waits)} µs, median of {len(waits)}",
        "borrow": f"{micros(reads['borrow'])} µs, median of {len(reads['borrow'])}",
        "get": f"{micros(reads['get'])} µs, median of {len(reads['get'])}",
        "pressure": f"{outcome.level}, {mebibytes(outcome.used)} used at the highest",
        "puts waited": f"{outcome.waited}",
        "max abs error": f"{error:.1e} against the product of one process",
        "reads paid": f"{outcome.reads_paid} of {outcome.reads_owed}",
        "bytes left": f"{outcome.left}",
        "result": "; ".join(outcome.faults()) or "right",
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {fact}" for name, fact in facts.items())
