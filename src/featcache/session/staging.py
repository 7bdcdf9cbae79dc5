"""Puts on their way: staged in the caller's thread, then written to the slab or spilled beside it."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from featcache import events
from featcache.core.put_queue import Request
from featcache.errors import FeatureTooLarge, PoolFull
from featcache.memory.slab import Order, Parts
from featcache.ref import FeatureRef, TensorSpec

InLoop = Callable[[Callable[[], object]], object]
"""Runs something in the loop of a put's pool, and returns when that is done; called in any thread."""


class Staged(msgspec.Struct, frozen=True, gc=False):
    """A validated put with the caller's stream position."""

    request: Request
    specs: tuple[TensorSpec, ...]
    parts: Parts
    order: Order


class Writer(Protocol):
    """Puts into one pool, the owner's own or a client's."""

    def stage(self, feature: Any, readers: Any, ttl: Any, key: Any = None) -> Staged:
        """Validate a put in the caller's thread, whose current stream the feature is ready on.

        Raises:
            SettingsError: an argument is invalid.
            FeatureTooLarge: it can never fit.

        """

    async def put(self, staged: Staged, timeout_s: float | None, *, wait: bool) -> FeatureRef:
        """Copy a feature in and return its ref; without `wait`, PoolFull if there is no room."""

    @property
    def stages_at_call(self) -> bool:
        """Whether a put is to note its place on the caller's stream before it waits for anything."""

    puts_here: bool
    """Whether it has `put_here`."""

    def put_here(self, staged: Staged, in_loop: InLoop) -> FeatureRef | None:
        """Put in the caller's thread, whichever it is, where that is possible at once; else None."""

    async def put_many(
        self, staged: Sequence[Staged], timeout_s: float | None, *, wait: bool
    ) -> list[FeatureRef]:
        """As `put`, of many together: all are put, or none."""


class Writers(NamedTuple):
    """The pools that a put may go to: the slab, the spill slab beside it, or either."""

    slab: Writer | None
    spill: Writer | None = None

    def stage(self, feature: Any, readers: Any, ttl: Any, key: Any = None) -> "StagedPut":
        """Stage a put for each of them, in the caller's thread."""
        if self.spill is None:
            assert self.slab is not None, "a put goes somewhere"
            return StagedPut(self, self.slab.stage(feature, readers, ttl, key))
        spill = self.spill.stage(feature, readers, ttl)
        try:
            slab = None if self.slab is None else self.slab.stage(feature, readers, ttl)
        except FeatureTooLarge:
            slab = None
        return StagedPut(self, slab, spill)


class StagedPut(NamedTuple):
    """A put staged for the slab, the spill slab, or either."""

    writers: Writers
    slab: Staged | None
    spill: Staged | None = None

    def put_here(self, check: Callable[[], object], in_loop: InLoop) -> FeatureRef | None:
        """Put into the slab in the caller's thread if that is possible at once, else None.

        `check` raises where no call may be made; it is called where the pool's writer can put so at all.
        """
        slab = self.writers.slab
        if slab is None or self.slab is None or not slab.puts_here:
            return None
        check()
        return slab.put_here(self.slab, in_loop)

    async def put(
        self, timeout_s: float | None, spills: "SpillCounter", *, wait: bool
    ) -> FeatureRef:
        """Put into the slab; if that is full and the put may spill, into the spill slab."""
        slab, spill = self.writers
        if spill is None or self.spill is None:
            assert slab is not None, "a put goes somewhere"
            assert self.slab is not None, "a put goes somewhere"
            return await slab.put(self.slab, timeout_s, wait=wait)
        if slab is not None and self.slab is not None:
            with contextlib.suppress(PoolFull, FeatureTooLarge):
                return await slab.put(self.slab, timeout_s, wait=False)
        ref = await spill.put(self.spill, timeout_s, wait=True)
        spills.add(ref)
        return ref


class SpillCounter:
    """Puts that were spilled through one object, an owner's or a client's; told at a bounded rate."""

    def __init__(self, pool: Callable[[], str], interval_s: float) -> None:
        """`pool` returns the id, in hex, of the pool that they were meant for."""
        self.count = 0
        self._pool = pool
        self._throttle = events.Throttle(interval_s)

    def add(self, ref: FeatureRef) -> None:
        """Count a put that has this ref in the spill pool."""
        self.count += 1
        self._throttle.emit(
            time.monotonic(),
            lambda unlogged: events.PutSpilled(
                pool=self._pool(),
                spill_pool=ref.pool_id.hex(),
                nbytes=ref.nbytes,
                unlogged=unlogged,
            ),
        )
