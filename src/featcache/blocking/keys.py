"""Reads by key for code with no event loop: looked up in the loop, copied in the caller's thread.

A copy on a GPU is ordered on the current stream of the thread that copies, so it is the caller's own.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from featcache.blocking.portal import Portal
from featcache.errors import CacheClosed, GetTimeout, StaleRef
from featcache.memory.key_table import ABSENT
from featcache.memory.pack import Feature
from featcache.session.arguments import key_bytes
from featcache.session.lease import KeyLease, MakeClaim
from featcache.session.reader import BYTES_LATE
from featcache.session.single_flight import find_or_claim, moved
from featcache.session.waiting import wait_ready_blocking


def get_by_key(
    portal: Portal[Any],
    key: str | bytes,
    device: Any,
    out: Feature | None,
    timeout_s: float | None,
) -> Feature:
    """Return a copy of the feature under a key, as `featcache.FeatureClient.get`."""
    engine, place = portal.engine, portal.place(device, out)
    keys, hits = engine.keys, engine.keys.hits
    if hits is None or out is not None:
        lease = keys.at_hand(key, place)
    else:
        found = hits.fetch(key, place, engine.reader, in_loop=False)
        if isinstance(found, torch.Tensor):
            return found
        if found == ABSENT and timeout_s is None:
            raise hits.missed(key)
        lease = found if type(found) is KeyLease else None
    wanted = key_bytes(key)
    give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        lease = lease or portal.call(
            lambda: keys.find(wanted, timeout_s, place),  # noqa: B023 - called here
            _undo,
        )
        try:
            return _copy(portal, lease, place, out, give_up_s)
        except StaleRef:  # its writer died before its bytes came, and the key went with it
            lease = None
            if give_up_s is not None:
                timeout_s = max(0.0, give_up_s - time.monotonic())


def get_or_put(
    portal: Portal[Any],
    key: bytes,
    make: Callable[[], Feature],
    put: Callable[[Feature], object],
    device: Any,
    timeout_s: float | None,
) -> Feature:
    """As `featcache.FeatureCache.get_or_put`; `make` and `put` run in the caller's thread."""
    keys, place = portal.engine.keys, portal.place(device, None)
    while True:
        found: KeyLease | MakeClaim | None = None
        try:  # around the call too: an interrupt may come as it returns
            found = keys.at_hand(key, place) or portal.call(
                lambda: find_or_claim(keys, key, place, timeout_s), _undo
            )
            if isinstance(found, MakeClaim):
                feature = make()
                put(feature)
        finally:
            if isinstance(found, MakeClaim):
                _release(portal, found)
        if isinstance(found, MakeClaim):
            return moved(feature, place)
        with contextlib.suppress(StaleRef):  # as above
            return _copy(portal, found, place, None, None)


def _copy(
    portal: Portal[Any],
    lease: KeyLease,
    place: torch.device | None,
    out: Feature | None,
    give_up_s: float | None,
) -> Feature:
    ready = False
    try:
        ready = wait_ready_blocking(
            lease.attachment, lease.ref, float("inf") if give_up_s is None else give_up_s
        )
    finally:
        if not ready:
            lease.return_lease()
    if not ready:
        raise GetTimeout(BYTES_LATE)
    reader = portal.engine.reader
    copied = reader.get_leased_blocking(lease, place, out)
    if copied is not None:
        return copied
    # Staged through host memory; the tensors that it ends in are this thread's.
    target = reader.empty_on(lease.ref, place or lease.mapping.device) if out is None else out
    return portal.call(lambda: reader.get_leased(lease, None, target, None))


def _release(portal: Portal[Any], claim: MakeClaim) -> None:
    async def end() -> None:
        claim.end()

    with contextlib.suppress(CacheClosed):  # closing ended the claim
        portal.call(end)


def _undo(found: KeyLease | MakeClaim) -> None:
    """Give back, in the loop, the find of a caller that was interrupted before it had it."""
    if isinstance(found, MakeClaim):
        found.end()
    else:
        found.return_lease()
