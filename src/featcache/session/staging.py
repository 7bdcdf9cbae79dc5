"""Puts that went to the host slab: counted, and told of at a bounded rate."""

import time

from featcache import events
from featcache.ref import FeatureRef


class Spills:
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
