"""Reads and claims of keys, held apart from any copy: for a scheduler that decides and others who act.

`lease_now` keeps a feature where it is while other sessions read it. `claim` says which of all sessions
that miss a key is to make it, as `get_or_put` does, and leaves the making, and the put, to whoever the
caller has for it.
"""

from collections.abc import Callable
from typing import Any, Final

from featcache.api.lifecycle import Engine
from featcache.session.arguments import key_bytes
from featcache.session.lease import KeyLease, MakeClaim
from featcache.session.single_flight import find_or_claim

__all__ = ["Claim", "Lease", "claim", "lease_now"]


class Lease:
    """A read of a key that keeps its bytes, and the key from eviction, until `end`. Copies nothing."""

    __slots__ = ("_end", "nbytes")

    def __init__(self, nbytes: int, end: Callable[[], None]) -> None:
        self.nbytes: Final = nbytes
        """Bytes of the feature."""
        self._end: Callable[[], None] | None = end

    def end(self) -> None:
        """End the read. Idempotent, and safe in any thread."""
        end, self._end = self._end, None
        if end is not None:
            end()


class Claim:
    """The right and duty to make the feature of one key, for all sessions, until `release`."""

    __slots__ = ("_end",)

    def __init__(self, end: Callable[[], None]) -> None:
        self._end: Callable[[], None] | None = end

    def release(self) -> None:
        """End the claim, in the loop of the client. Idempotent.

        If no feature is under the key by then, the claim passes to the next session that waits for it.
        """
        end, self._end = self._end, None
        if end is not None:
            end()


def lease_now(client: Any, key: str | bytes) -> Lease | None:
    """Take a lease of a key by the key table alone: no message, no await, in any thread.

    Args:
        client: an open `featcache.FeatureClient`. Its device need not reach the slab.
        key: as in `put`.

    Returns:
        None if there is no feature under the key, or the table can't tell, or this session has
        `Settings.grants` leases out.

    Raises:
        OwnerLost: the owner died or closed the pool.
        CacheClosed: the client is not open.

    """
    engine: Engine = client._opened()  # noqa: SLF001 - one object in two modules
    hits = engine.keys.hits
    if hits is None:
        engine.keys.contains_now(key)  # raises if the owner is gone
        return None
    found = hits.find(key, None, copies=False)
    return Lease(found.ref.nbytes, found.return_lease) if type(found) is KeyLease else None


async def claim(client: Any, key: str | bytes, *, timeout: float | None = None) -> Claim | None:
    """Return the claim to make the feature of a key, or None once there is one.

    While another session holds the claim, it is awaited, and passes to this caller if that session gives
    it up or dies. A claim must be released, after the put or without one; it ends with its session.

    Args:
        client: an open `featcache.FeatureClient`.
        key: as in `put`.
        timeout: seconds to wait for another's feature; 0 is not at all, None without limit.

    Raises:
        KeyTimeout: another session holds the claim, and nothing came in time.
        PoolFull: too many wait, or claims are out, already.
        OwnerLost, CacheClosed, SettingsError: as of `get_or_put`.

    """
    engine: Engine = client._life.here()  # noqa: SLF001 - one object in two modules
    found: KeyLease | MakeClaim = await find_or_claim(engine.keys, key_bytes(key), None, timeout)
    if isinstance(found, MakeClaim):
        return Claim(found.end)
    found.return_lease()
    return None
