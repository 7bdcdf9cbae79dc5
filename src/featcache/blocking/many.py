"""Many members at once for code with no event loop: copied in the caller's thread."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from featcache.blocking.portal import Portal
from featcache.errors import FeatcacheError
from featcache.memory.pack import Feature
from featcache.ref import FeatureRef
from featcache.session.arguments import check_on_full
from featcache.session.batch_staging import Features, stage_now
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

    try:  # around the calls: an interrupt may come as one returns
        if not many.pin_blocking(timeout_s):
            portal.call(pin, Many.abandon)
        return many.copy_blocking(portal.call)
    except BaseException:
        many.abandon()
        raise


def put_many(
    portal: Portal[Any], given: Features, timeout_s: float | None, on_full: str
) -> list[FeatureRef]:
    """Copy features in, staged in the caller's thread, as `featcache.FeatureClient.put_many`."""
    check_on_full(on_full, given.key)
    engine = portal.engine
    if not given.members:
        return []
    writers = engine.writers_nowait(on_full, given.key) or portal.call(
        lambda: engine.writers(on_full, given.key, timeout_s)
    )

    async def take_back(refs: list[FeatureRef]) -> None:
        for ref in refs:
            with contextlib.suppress(FeatcacheError):
                await portal.inner.discard(ref)

    with given.telling():
        staged = stage_now(writers, given)
        return portal.call(
            lambda: staged.put(timeout_s, engine.spills, wait=on_full != "raise"), take_back
        )
