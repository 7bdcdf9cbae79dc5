"""What engines encode now: who misses a key either has the claim to encode it, or awaits who has.

Nothing here waits. The scheduler asks at each of its passes; the claim is asked for, and awaited, in the
link's event loop.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Final

import attrs

import featcache
from featcache import FeatcacheError, KeyTimeout
from featcache.api.claiming import Claim, claim
from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.link import LoopLink

MAX_FLIGHTS: Final = 1024
"""Keys at once that are claimed or awaited; beyond, inputs are encoded without asking."""
_KEEP_S: Final = 15.0
"""How long a claim is kept that nobody was told of the end of."""
_LOOK_S: Final = 0.25
"""How often a claim looks whether its feature was put: an idle engine's workers tell nothing."""
_ANSWER_S: Final = 0.5
"""How long the owner may take to say whether a key is claimed."""
_UNUSED_S: Final = 0.1
"""How long a claim is kept by an engine whose request waits for a key that comes before."""


@attrs.define(eq=False)
class Flight:
    """One key that was missing: asked for, then claimed, awaited, or there."""

    key: str
    began_s: float
    asked_s: float | None = None
    """When the owner was asked who makes it."""
    claim: Claim | None = None
    claimed_s: float = 0.0
    """When the claim was granted."""
    answered: bool = False
    """Whether the owner said, within its time, that another has the claim."""
    decided: bool = False
    """Whether this engine need wait no more: it has the claim, or the feature is there, or it gave up."""
    there: bool = False
    """Whether the owner said that there is a feature, which the key table may not tell."""
    encodes: bool = False
    """Whether a step was told to encode it."""
    ended: bool = False


class Flights:
    """The keys that an engine's scheduler misses, or waits for."""

    def __init__(
        self,
        link: LoopLink,
        wait_s: float,
        counts: Counts,
        *,
        keeps_claims: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link, self._wait_s, self._counts = link, wait_s, counts
        self._keeps_claims = keeps_claims
        """Whether this engine saves what it encodes: if not, a claim is only the news that nobody does."""
        self._clock = clock
        self._flights: dict[str, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def may_encode(self, key: str, client: featcache.FeatureClient) -> bool:
        """Whether a missing key is to be encoded here and now; False is to ask again at the next pass."""
        flight = self._flights.get(key)
        now_s = self._clock()
        if flight is None:
            if self._wait_s <= 0 or len(self._flights) >= MAX_FLIGHTS:
                return True
            flight = self._flights[key] = Flight(key, now_s)
        if flight.decided:
            return True
        if now_s - flight.began_s < self._wait_s:
            if flight.asked_s is None:
                flight.asked_s = now_s
                self._link.spawn(lambda: self._ask(flight, client))
            if flight.answered or now_s - flight.asked_s < _ANSWER_S:
                return False
        flight.decided = True
        self._counts.add("wait_timeouts")
        return True

    def missing(self, keys: Iterable[str], client: featcache.FeatureClient) -> set[str]:
        """Return those keys of one request, none of which is there, that are to be awaited still.

        Two engines whose requests want the same keys must not each claim one and await the other. So all
        engines ask in one order: while a key is awaited, those behind it are not asked for, and a claim of
        one that was granted before is given up.
        """
        awaited = set[str]()
        blocked = False
        for key in sorted(keys):
            if blocked and self._yields(key):
                awaited.add(key)
            elif not self.may_encode(key, client):
                awaited.add(key)
                blocked = blocked or self._flights[key].answered
        return awaited

    def _yields(self, key: str) -> bool:
        """Whether a key is to be asked for later: it was not yet, or its claim is given up here."""
        flight = self._flights.get(key)
        if flight is None or flight.asked_s is None:
            return True
        if flight.claim is None or flight.encodes:
            return False
        # Others of this engine that want the key alone have had their pass to encode it.
        if self._clock() - flight.claimed_s < _UNUSED_S:
            return False
        # The wait goes on from where it began; in the same place, as `expire` looks at the oldest first.
        self._flights[key] = Flight(key, flight.began_s)
        flight.ended = flight.decided = True
        self._link.post(lambda: _release(flight))
        return True

    def arrived(self, key: str) -> None:
        """Take note that a key is there."""
        if key in self._flights and not self._flights[key].encodes:
            self.end(key)

    def found(self, key: str) -> bool:
        """Whether the owner said that the key is there."""
        flight = self._flights.get(key)
        return flight is not None and flight.there

    def encoding(self, key: str) -> None:
        """Take note that a step encodes it: the claim stays until the save has ended."""
        flight = self._flights.get(key)
        if flight is not None:
            flight.encodes = True

    def abandon(self, key: str) -> None:
        """Take note that a request of it has ended; what a step encodes goes on."""
        flight = self._flights.get(key)
        if flight is not None and not flight.encodes:
            self.end(key)

    def end(self, key: str) -> None:
        """Forget a key, and release its claim."""
        flight = self._flights.pop(key, None)
        if flight is None:
            return
        flight.ended = flight.decided = True
        if flight.claim is not None:
            self._link.post(lambda: _release(flight))

    def claimed_unused(self, key: str) -> bool:
        """Whether this engine has the claim, and no step was told to encode it."""
        flight = self._flights.get(key)
        return flight is not None and flight.claim is not None and not flight.encodes

    def expire(self) -> None:
        """Forget what nobody asked of any more, or was told of the end of: at each step."""
        if not self._flights:
            return
        before_s = self._clock() - self._wait_s - _KEEP_S
        for key, flight in list(self._flights.items()):  # oldest first
            if flight.began_s > before_s:
                break
            self.end(key)

    async def _ask(self, flight: Flight, client: featcache.FeatureClient) -> None:
        """Ask the owner who makes it, and wait for that. In the link's loop."""
        try:
            granted = await self._claimed(flight, client)
            flight.claimed_s = self._clock()  # before the claim: the scheduler's thread reads both
            flight.claim, flight.there = granted, granted is None
        except FeatcacheError:  # in vain, or the owner is gone: it is encoded here
            pass
        finally:
            flight.decided = True
        if flight.claim is None:
            return
        try:
            if self._keeps_claims:
                await self._put_or_ended(flight, client)
        finally:
            _release(flight)

    async def _claimed(self, flight: Flight, client: featcache.FeatureClient) -> Claim | None:
        try:
            return await claim(client, flight.key, timeout=0)
        except KeyTimeout:
            flight.answered = True
            self._counts.add("waits")
        return await claim(client, flight.key, timeout=self._wait_s)

    async def _put_or_ended(self, flight: Flight, client: featcache.FeatureClient) -> None:
        """Return once the feature of a claim is there, or nobody makes it any more."""
        give_up_s = self._clock() + self._wait_s + _KEEP_S
        with contextlib.suppress(FeatcacheError):  # the owner is gone, and the claim with it
            while not flight.ended and self._clock() < give_up_s:
                if client.contains_nowait(flight.key):
                    return
                await asyncio.sleep(_LOOK_S)


def _release(flight: Flight) -> None:
    taken, flight.claim = flight.claim, None
    if taken is not None:
        with contextlib.suppress(FeatcacheError):
            taken.release()
