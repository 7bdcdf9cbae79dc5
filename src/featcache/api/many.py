"""The calls that owners and clients have for others' reads, and for many members at once."""

from collections.abc import Iterable
from types import EllipsisType
from typing import Any, Literal

import torch

from featcache.api.arguments import check_ref, parse_device
from featcache.api.lifecycle import Engine, Lifecycle
from featcache.errors import FeatcacheError, of_member
from featcache.memory.pack import Feature
from featcache.ref import FeatureRef
from featcache.session.arguments import (
    TTL_DEFAULT,
    check_on_full,
    key_bytes,
    parse_keys,
    parse_many,
    parse_readers,
    parse_ttl,
)
from featcache.session.batch_staging import parse_features, stage
from featcache.session.many import Wanted, get_many
from featcache.session.single_flight import Keys
from featcache.settings import Settings, parse_timeout

OnFull = Literal["wait", "raise", "spill"]


class ManyCalls:
    """The part of `CacheBase` that looks up for others, and reads many at once."""

    _life: Lifecycle[Any]
    _settings: Settings
    _place: torch.device | None = None
    """Where a get puts its copy if the caller names no device; None is the pool's own device."""

    async def share(
        self,
        key: str | bytes,
        *,
        readers: int | Iterable[str],
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
    ) -> FeatureRef:
        """Return a ref of what is kept under a key, which owes reads: for others to read it by.

        One looks up, as a scheduler does, and the processes that it sends the ref to read without
        asking anybody. Each share is a ref of its own, also of the same feature for the same readers:
        each owes its own reads, expires by itself, can be discarded. Until its reads are paid the
        feature is neither evicted nor recycled, whatever becomes of its key. A share takes a slot of
        `Settings.slots`, and no bytes. It counts as a use of the key, and as a hit.

        Args:
            key: as in `put`.
            readers: how many reads the ref owes, each by another session, or the names of the sessions
                that owe one each.
            ttl: as in `put`.
            timeout: seconds to wait for a feature to be put under the key; None is not at all.

        Raises:
            KeyNotFound: there is no feature under the key; KeyTimeout: nor came one in time.
            PoolFull: all slots are in use, and none by a feature that can be evicted.
            SettingsError: an argument is invalid.
            OwnerLost, CacheClosed, WrongLoop: as `get` does.

        """
        wanted, settings = key_bytes(key), self._settings
        ttl_s = settings.ttl if ttl is TTL_DEFAULT else parse_ttl(ttl)
        owed, timeout_s = parse_readers(readers, settings.readers, least=1), parse_timeout(timeout)
        keys: Keys = self._life.here().keys
        return await keys.share(wanted, owed, ttl_s, timeout_s)

    async def get_many(
        self,
        members: Iterable[FeatureRef | str | bytes],
        *,
        device: Any = None,
        timeout: float | None = None,
    ) -> list[Feature]:
        """Return copies of many features, in the order of `members`, and pay this session's reads.

        At the cost of little more than their copies: keys that this session can't look up by itself are
        asked for by one message, the copies that are too long for the event loop run in one thread, and on a
        GPU the words that pay the refs are one batch.
        Either all reads of refs are paid, or none is: if one member fails, or the call is cancelled, get
        them again, or release them.

        Args:
            members: up to 1024 refs and keys, mixed as wanted. A ref that stands twice is read once, and
                each has its copy.
            device: where all copies are to be; as in `get`.
            timeout: seconds for all together; as in `get`.

        Raises:
            SettingsError: there are too many.
            FeatcacheError: as `get` does, of the first member that fails: the message says which, and so
                does the error's `member`, its index in `members`.

        """
        wanted = parse_members(members)
        place = self._place if device is None else parse_device(device)
        timeout_s = None if timeout is None else parse_timeout(timeout)
        engine: Engine = self._life.here()
        if not wanted:
            return []
        return await get_many(engine.reader, engine.keys, wanted, place, timeout_s)

    async def contains_many(self, keys: Iterable[str | bytes]) -> list[bool]:
        """Return whether a feature is kept under each of up to 1024 keys now.

        What the owner must be asked goes in one message. It does not count as a use. Raises as `contains`
        does; SettingsError says which key is none.
        """
        wanted = parse_keys(keys, "contains_many")
        directory: Keys = self._life.here().keys
        return await directory.contains_many(wanted)

    async def put_many(
        self,
        features: Iterable[torch.Tensor | dict[str, torch.Tensor]],
        *,
        readers: int | Iterable[str] | EllipsisType = ...,
        keys: Iterable[str | bytes | None] | None = None,
        ttl: float | EllipsisType | None = ...,
        timeout: float | None = None,
        on_full: OnFull = "wait",
    ) -> list[FeatureRef]:
        """Copy many features into the slab and return their refs, in their order.

        They have one place in the queue and get the room of
        all at once, so a put of many never waits for itself; a client asks for it by one message and
        publishes by another; on a GPU the words that publish are one batch. Either all are put, or none:
        if one fails, or the call is cancelled, the others are taken back.

        Args:
            features: up to 1024, each as in `put`.
            readers: as in `put`, the same for each.
            keys: a key for each, or None for one that has none.
            ttl: as in `put`.
            timeout: seconds to wait for the room of all together.
            on_full: as in `put`; with ``"spill"`` all go to the host slab if they do not all fit into
                this one.

        Raises:
            FeatureTooLarge: one can never fit, or all together can't: put fewer at a time.
            FeatcacheError: as `put` does. Where the error is of one feature the message says of which, and
                so does the error's `member`, its index in `features`.

        """
        given = parse_features(features, keys, readers, ttl)
        timeout_s = None if timeout is None else parse_timeout(timeout)
        check_on_full(on_full, given.key)
        engine: Engine = self._life.here()
        if not given.members:
            return []
        writers = engine.writers_nowait(on_full, given.key) or await engine.writers(
            on_full, given.key, timeout_s
        )
        with given.telling():
            staged = await stage(writers, given, engine.reader.turn)
            return await staged.put(timeout_s, engine.spills, wait=on_full != "raise")


def parse_members(members: Any) -> list[Wanted]:
    """Return the members of a `get_many`, or raise SettingsError, which says which is none."""
    wanted: list[Any] = parse_many(members, "get_many", "refs and keys")
    for index, member in enumerate(wanted):
        if type(member) is FeatureRef:
            continue
        try:
            wanted[index] = (
                key_bytes(member) if isinstance(member, str | bytes) else check_ref(member)
            )
        except FeatcacheError as error:
            raise of_member(error, index, len(wanted), type(member).__name__) from None
    return wanted
