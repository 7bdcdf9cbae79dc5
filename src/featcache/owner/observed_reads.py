"""Reads of other hosts that tell how long each transfer took; plain ones have no call for it."""

from typing import Protocol

from featcache.owner.far_reads import FarReads
from featcache.owner.homes import Home


class Times(Protocol):
    """What counts seconds."""

    def add(self, value: float, /) -> None:
        """Count one transfer."""


class ObservedFarReads(FarReads):
    """Those with an observer."""

    times: Times

    def _count(self, home: Home, nbytes: int, took_s: float | None) -> None:
        super()._count(home, nbytes, took_s)
        if took_s is not None:
            self.times.add(took_s)


def observe(reads: FarReads, times: Times) -> None:
    """Tell `times` from now on, in the owner's loop. Any thread."""
    vars(reads)["times"] = times  # first: the loop may be at it
    reads.__class__ = ObservedFarReads


def unobserve(reads: FarReads) -> None:
    """Tell nobody any more. Any thread."""
    reads.__class__ = FarReads
