"""Puts that went to the host slab: counted, and told of at a bounded rate."""

import time

import msgspec

from featcache import events
from featcache.core.put_queue import Request
from featcache.memory.slab import Order, Parts
from featcache.ref import FeatureRef, TensorSpec


class Staged(msgspec.Struct, frozen=True, gc=False):
    """A put as it came in, with the caller's place in the order of its stream."""

    request: Request
    specs: tuple[TensorSpec, ...]
    parts: Parts
    order: Order


class SpillCounter:
    """Those through one object, an owner's or a client's."""

    def __init__(self, interval_s: float) -> None:
        self.count = 0
        self._throttle = events.Throttle(interval_s)

    def add(self, pool: str, ref: FeatureRef) -> None:
        """Count a put that was for a pool, by its id in hex, and has this ref in another."""
        self.count += 1
        unlogged = self._throttle.pass_(time.monotonic())
        if unlogged is not None:
            events.emit(
                events.PutSpilled(
                    pool=pool, spill_pool=ref.pool_id.hex(), nbytes=ref.nbytes, unlogged=unlogged
                )
            )
