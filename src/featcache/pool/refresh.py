"""Figures of now: what was released is looked at before they are told."""

import asyncio
import time
from typing import TYPE_CHECKING

from featcache import events

if TYPE_CHECKING:
    from featcache.pool.pool import Pool


def refresh(pool: "Pool") -> None:
    """Count the reads paid until now, recycle what they kept and follow the pressure, in the pool's loop.

    Not from another thread; nor in a hook, which may be called in the midst of a decision.
    """
    if pool.closed or events.is_emitting():
        return
    try:
        here = asyncio.get_running_loop() is pool.loop
    except RuntimeError:
        return
    if here:
        pool.collect()
        pool.is_held.count_leased(pool.store)
        pool.pressure.report(time.monotonic())
