"""Reads of other hosts that tell how long each transfer took; plain ones have no call for it."""

from typing import Protocol

from featcache.owner.landing import Giver, Landing


class Times(Protocol):
    """What counts seconds."""

    def add(self, value: float, /) -> None:
        """Count one transfer."""


class ObservedLanding(Landing):
    """Those with an observer."""

    times: Times

    def _count(self, giver: Giver, nbytes: int, took_s: float | None) -> None:
        super()._count(giver, nbytes, took_s)
        if took_s is not None:
            self.times.add(took_s)


def observe(landing: Landing, times: Times) -> None:
    """Tell `times` from now on, in the owner's loop. Any thread."""
    vars(landing)["times"] = times  # first: the loop may be at it
    landing.__class__ = ObservedLanding


def unobserve(landing: Landing) -> None:
    """Tell nobody any more. Any thread."""
    landing.__class__ = Landing
