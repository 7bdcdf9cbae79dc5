"""Many members at once for code with no event loop: copied in the caller's thread."""

from collections.abc import Sequence
from typing import Any

import torch

from featcache.blocking.portal import Portal
from featcache.memory.pack import Feature
from featcache.session.many import Many, Wanted


def get_many(
    portal: Portal[Any],
    wanted: Sequence[Wanted],
    place: torch.device | None,
    timeout_s: float | None,
) -> list[Feature]:
    """Return copies of all members, as `featcache.FeatureClient.get_many`."""
    if not wanted:
        return []
    engine = portal.engine
    portal.check_thread()
    many = Many(engine.reader, engine.keys, wanted, place)

    async def pin() -> Many:
        await many.pin(timeout_s, follows=False)  # it is this thread's stream whose order counts
        return many

    if not many.pin_blocking(timeout_s):
        portal.call(pin, Many.abandon)
    return many.copy_blocking(portal.call)
