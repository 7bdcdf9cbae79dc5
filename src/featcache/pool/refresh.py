"""Figures of now: what was released is looked at before they are told."""

import asyncio
import time
from typing import TYPE_CHECKING

from featcache import events
from featcache.control.turns import TURN_UNITS

if TYPE_CHECKING:
    from featcache.pool.pool import Pool


def _is_here(pool: "Pool") -> bool:
    try:
        return asyncio.get_running_loop() is pool.loop
    except RuntimeError:
        return False


def comes(pool: "Pool", index: int, generation: int) -> bool | None:
    """Whether the publish of a ref may be on its way, as `RoomsAhead.is_coming`; None in another thread."""
    return pool.ahead.is_coming(index, generation) if _is_here(pool) else None


def hear(pool: "Pool") -> None:
    """Handle what sessions that may write have told by now: a publish that has not been read yet, say.

    As `refresh`, in the pool's loop, in a call of the owner's own.
    """
    server = pool.growth.server
    if server is None or pool.closed or events.is_emitting() or not _is_here(pool):
        return
    until = min(0, pool.turn.left) - TURN_UNITS  # as much as another turn would
    for number in [number for number, page in pool.pages.items() if page.reserved or page.ahead]:
        if (peer := server.sessions.get(number)) is not None:
            server.posts.hear(peer)
            peer.channel.read_rest(until)


def refresh(pool: "Pool") -> None:
    """Count the reads paid until now, recycle what they kept and follow the pressure, in the pool's loop.

    Not from another thread; nor in a hook, which may be called in the midst of a decision.
    """
    if not pool.closed and not events.is_emitting() and _is_here(pool):
        hear(pool)
        pool.collect()
        pool.is_held.count_leased(pool.store)
        pool.pressure.report(time.monotonic())
