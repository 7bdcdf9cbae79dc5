"""Puts of many, staged: for the slab, the spill slab beside it, or either."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from featcache.control.turns import Turn
from featcache.errors import (
    FeatcacheError,
    FeatureTooLarge,
    PoolFull,
    SettingsError,
    at_member,
    of_member,
)
from featcache.ref import FeatureRef
from featcache.session.arguments import key_bytes, member_label, parse_many
from featcache.session.staging import SpillCounter, Staged, Writer, Writers


class Features(NamedTuple):
    """The arguments of a `put_many`."""

    members: list[Any]
    keys: list[bytes | None]
    readers: Any
    ttl: Any

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """If a block fails for one of them, have the error say for which."""
        try:
            yield
        except FeatcacheError as error:
            key = None if error.member is None else self.keys[error.member]
            label = "a feature" if key is None else member_label(key)
            of_member(error, error.member, len(self.members), label)
            raise

    @property
    def key(self) -> bytes | None:
        """One of the keys, if there is any."""
        return next((key for key in self.keys if key is not None), None)


class StagedMany(NamedTuple):
    """Puts staged for the slab, the spill slab, or either."""

    writers: Writers
    slab: list[Staged] | None
    spill: list[Staged] | None

    async def put(
        self, timeout_s: float | None, spills: SpillCounter, *, wait: bool
    ) -> list[FeatureRef]:
        """Put all into the slab; if they don't fit there and may spill, all into the spill slab."""
        slab, spill = self.writers
        if spill is None or self.spill is None:
            assert slab is not None, "a put goes somewhere"
            assert self.slab is not None, "a put goes somewhere"
            return await slab.put_many(self.slab, timeout_s, wait=wait)
        if slab is not None and self.slab is not None:
            with contextlib.suppress(PoolFull, FeatureTooLarge):
                return await slab.put_many(self.slab, timeout_s, wait=False)
        refs = await spill.put_many(self.spill, timeout_s, wait=True)
        for ref in refs:
            spills.add(ref)
        return refs


def parse_features(features: Any, keys: Any, readers: Any, ttl: Any) -> Features:
    """Return the arguments of a `put_many`, or raise SettingsError."""
    members = parse_many(features, "put_many", "features")
    if keys is None:
        wanted: list[Any] = [None] * len(members)
    else:
        wanted = parse_many(keys, "put_many", "keys")
        if len(wanted) != len(members):
            raise SettingsError(
                f"{len(members)} features and {len(wanted)} keys: one each, or None"
            )
    for index, key in enumerate(wanted):
        try:
            wanted[index] = None if key is None else key_bytes(key)
        except SettingsError as error:
            raise of_member(error, index, len(wanted), "a key") from None
    if isinstance(readers, Iterable) and not isinstance(readers, str | bytes):
        readers = list(readers)  # it is gone over for each
    return Features(members, wanted, readers, ttl)


def _stages(writer: Writer, features: Features) -> Iterator[Staged]:
    """Stage one after the other, in the caller's thread."""
    for index, (feature, key) in enumerate(zip(features.members, features.keys, strict=True)):
        try:
            yield writer.stage(feature, features.readers, features.ttl, key)
        except FeatcacheError as error:
            at_member(error, index)
            raise


def stage_now(writers: Writers, features: Features) -> StagedMany:
    """Stage all, in the caller's thread, however long it takes."""
    slab, spill = writers
    spilling = None if spill is None else list(_stages(spill, features))
    staged = None
    if slab is not None:
        with contextlib.suppress(FeatureTooLarge) if spill else contextlib.nullcontext():
            staged = list(_stages(slab, features))
    return StagedMany(writers, staged, spilling)


async def stage(writers: Writers, features: Features, turn: Turn) -> StagedMany:
    """Stage all, in as many turns of the loop as it takes.

    Where the features are ready on the stream that is current now, in this one.
    """
    slab, spill = writers
    turn.left -= len(features.members) // 8
    if slab is None or spill is not None or slab.stages_at_call:
        return stage_now(writers, features)
    staged: list[Staged] = []
    for one in _stages(slab, features):
        staged.append(one)
        turn.left -= 1
        if turn.left < 0:
            await turn.wait()
    return StagedMany(writers, staged, None)
