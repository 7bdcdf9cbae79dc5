"""What the processes of a soak count, in shared memory, so that it outlives whoever is killed.

A row belongs to a place: one process at a time, and after its death the next. The numbers of a row
are written by that process alone, but for those that the conductor writes (`Word`).
"""

from __future__ import annotations

import enum
import mmap
import os
import time
from collections import Counter
from typing import Final

import numpy as np

from featcache import errors


class Step(enum.IntEnum):
    """Where in its work a process is: what a kill met."""

    START = 0
    ATTACH = 1
    PUT = 2
    GET = 3
    BORROW = 4
    KEY = 5
    MAKE = 6
    PAUSE = 7
    CLOSE = 8
    FORGE = 9


class Word(enum.IntEnum):
    """The columns."""

    LIMITED_NS = 0
    """Until when errors may come of a limit that was set on the process; of the conductor."""
    BEAT_NS = 1
    """When the process last made progress."""
    AT = 2
    """A `Step`."""
    BEGUN = 3
    """Operations of this process alone."""
    PUTS = 4
    GETS = 5
    BORROWS = 6
    RELEASES = 7
    KEYED = 8
    MADE = 9
    ATTACHES = 10
    CANCELLED = 11
    FORGED_REFS = 12
    FORGED_FRAMES = 13
    WRONG = 14
    OUTSIDE = 15
    """Errors that are none of featcache's tree."""
    OUTSIDE_LIMITED = 16
    """The same while a limit was on."""
    FDS_LEFT = 17
    """Descriptors that a process which is never killed has between two clients, more than at first."""
    READS = 18
    """By key, each checked; of the keyed storm, as the following."""
    MISSES = 19
    MADE_OR_FOUND = 20
    """By `get_or_put`."""
    STALE = 21
    """Reads that found a version which another had replaced before."""
    STOPPED_NS = 22
    """Until when the process has stopped itself."""
    DYING_AT = 23
    """One more than the step of a hit at which the process has killed itself."""


OPERATIONS: Final = (
    Word.PUTS,
    Word.GETS,
    Word.BORROWS,
    Word.RELEASES,
    Word.KEYED,
    Word.ATTACHES,
    Word.CANCELLED,
    Word.FORGED_REFS,
    Word.FORGED_FRAMES,
)
ERRORS: Final = {name: len(Word) + at for at, name in enumerate(errors.__all__)}
"""The column of each error of the tree."""
_DEATHS: Final = 256
"""The last deaths, whose times are kept."""
_COLUMNS: Final = len(Word) + len(ERRORS)


class Row:
    """The numbers of one place."""

    def __init__(self, words: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        self._words = words

    def __getitem__(self, word: int) -> int:
        return int(self._words[word])

    def __setitem__(self, word: int, value: int) -> None:
        self._words[word] = value

    def count(self, word: int) -> None:
        """Count one operation or fact."""
        self._words[word] += 1

    def beat(self) -> None:
        """Say that the process lives and goes on."""
        self._words[Word.BEAT_NS] = time.monotonic_ns()

    def error(self, error: errors.FeatcacheError) -> None:
        """Count an error of the tree by its name, or the nearest ancestor's that has one."""
        names = (kind.__name__ for kind in type(error).__mro__)
        at = next((ERRORS[name] for name in names if name in ERRORS), ERRORS["FeatcacheError"])
        self.count(at)

    def begin(self) -> None:
        """A new process has the place."""
        for word in (Word.LIMITED_NS, Word.AT, Word.BEGUN, Word.STOPPED_NS, Word.DYING_AT):
            self[word] = 0
        self.beat()


class Board:
    """The rows, one more word for the phase of the soak, and a file for what went wrong."""

    def __init__(self, places: int, faults: str) -> None:
        common, deaths = 8, 2 * _DEATHS
        self._memory = mmap.mmap(-1, (common + deaths + places * _COLUMNS) * 8)
        words = np.frombuffer(self._memory, np.int64)
        self._common = words[:common]
        self._deaths = words[common : common + deaths].reshape(_DEATHS, 2)
        self._words = words[common + deaths :].reshape(places, _COLUMNS)
        self.rows = [Row(row) for row in self._words]
        self._faults = os.open(faults, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    @property
    def stopping(self) -> int:
        """0 while the storm is on; 1, workers are to end; 2, owners too."""
        return int(self._common[0])

    @stopping.setter
    def stopping(self, phase: int) -> None:
        self._common[0] = phase

    @property
    def owner_stopped_ns(self) -> int:
        """Until when the lasting owner was last stopped: what it was late by then is no fault of it."""
        return int(self._common[1])

    @owner_stopped_ns.setter
    def owner_stopped_ns(self, until_ns: int) -> None:
        self._common[1] = until_ns

    @property
    def faults_fd(self) -> int:
        """The file of faults, for tracebacks of processes that hang."""
        return self._faults

    def died(self, pid: int, at_ns: int) -> None:
        """Note when a process is killed; by the conductor, before it kills."""
        killed = int(self._common[2])
        self._deaths[killed % _DEATHS] = (pid, at_ns)
        self._common[2] = killed + 1

    def death_of(self, pid: int) -> int:
        """When a process was killed; 0 of one that was not, or that died long ago."""
        return max((int(at_ns) for dead, at_ns in self._deaths if dead == pid), default=0)

    def fault(self, text: str) -> None:
        """Write down what went wrong."""
        os.write(self._faults, f"{text.rstrip()}\n".encode(errors="replace")[-4000:])

    def total(self, word: Word) -> int:
        """The sum of one column."""
        return int(self._words[:, word].sum())

    def totals(self) -> Counter[str]:
        """The sums of all rows, by the names of the columns."""
        sums = self._words.sum(axis=0)
        found = {word.name.lower(): int(sums[word]) for word in Word if word >= Word.PUTS}
        found |= {name: int(sums[at]) for name, at in ERRORS.items()}
        return Counter(found)
