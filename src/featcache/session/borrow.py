"""Borrowing: views in the slab for the length of a block."""

import time
from typing import Protocol

import torch

from featcache.control.turns import CALL_UNITS
from featcache.errors import GetTimeout, SettingsError, StaleRef
from featcache.memory.key_table import UNKNOWN
from featcache.memory.pack import Feature, unpack
from featcache.memory.views import invalidate
from featcache.ref import FeatureRef
from featcache.session.arguments import key_bytes
from featcache.session.copier import Readable
from featcache.session.far import Elsewhere
from featcache.session.lease import KeyLease
from featcache.session.reader import Reader
from featcache.session.single_flight import Keys


class Opened(Protocol):
    """The open half of the object that a borrow is of."""

    @property
    def reader(self) -> Reader:
        """get, borrow and release."""

    @property
    def keys(self) -> Keys:
        """The directory."""


class Life(Protocol):
    """The life of that object, which may have ended when its borrow is entered."""

    @property
    def engine(self) -> Opened | None:
        """Its open half; None while it is not open."""

    def here(self) -> Opened:
        """Return its open half, for a call in its loop; or raise CacheClosed or WrongLoop."""

    def closed(self) -> Exception:
        """Return the error of a call while it is not open."""


class Borrow:
    """One borrow: ``async with`` waits for the bytes, plain ``with`` takes those that are there now.

    Leaving the block pays the read, behind the work that the GPU was given on the stream that is then
    current, and empties the view: its ``numel()`` is then 0, and whatever would compute with it raises
    StaleRef, so that it can't be read by mistake when the bytes are another feature's. What was made of
    it is beyond reach: slices, other tensors over its memory, NumPy arrays and DLPack exports still
    point into the slab. Each view would need a storage of its own to end those, at half the price of a
    borrow again.

    ``async with`` enters it in the loop of the object that it is of; plain ``with``, and the end of the
    block, are safe in any thread.
    """

    __slots__ = (
        "_copied",
        "_key",
        "_life",
        "_reader",
        "_source",
        "_tensors",
        "ref",
        "timeout_s",
    )

    def __init__(
        self,
        reader: Reader,
        ref: FeatureRef | None,
        timeout_s: float | None,
        life: Life | None = None,
        key: str | bytes | None = None,
    ) -> None:
        """Borrow a ref, or the feature under a key, which is looked up on entry."""
        self._reader = reader
        self.ref = ref
        """The borrowed ref; None of a key's, before it is found."""
        self._life = life
        self._key = key
        self.timeout_s = timeout_s
        self._source: Readable | None = None
        self._tensors: list[torch.Tensor] = []
        self._copied = False

    def _enter(self, ref: FeatureRef, source: Readable, copied: Feature | None = None) -> Feature:
        self._copied = copied is not None
        if copied is None:
            try:
                view, specs, offset_bytes = source.mapping.view, ref.specs, ref.offset_bytes
                if specs[0].name is None:  # one bare tensor, as most features are
                    copied = view(offset_bytes, specs[0])
                    self._tensors = [copied]
                else:
                    self._tensors = [view(offset_bytes, spec) for spec in specs]
                    copied = unpack(specs, self._tensors)
            except BaseException:
                source.unpin(ref, pays=False)
                raise
        self._source = source
        self._reader.gets += 1
        return copied

    def close(self, *, pays: bool = True) -> None:
        """Empty the view and pay the read; leaving the block does. In any thread."""
        source, self._source = self._source, None
        if source is None or self.ref is None:
            return
        # Emptied before the read is paid: afterwards the bytes may be the next tenant's.
        for tensor in self._tensors:
            invalidate(tensor)
        self._tensors = []
        order = None if self._copied else source.mapping.order()
        source.unpin(self.ref, pays=pays, order=order)

    def _check_unused(self) -> None:
        if self._source is not None:
            raise SettingsError("this borrow is entered already; call borrow() for another")

    async def __aenter__(self) -> Feature:
        """Return the view, once its bytes are there."""
        if self._source is not None:
            self._check_unused()
        key = self._key
        if key is None:
            assert self.ref is not None, "a ref or a key"
            try:
                held = await self._reader.hold(self.ref, self.timeout_s)
            except Elsewhere as here:
                self.ref = here.ref
                held = await self._reader.hold(here.ref, here.left_s)
            return self._enter(self.ref, *held)
        assert self._life is not None, "of a key"
        engine = self._life.here()
        turn = engine.reader.turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        hits = engine.keys.hits
        found = UNKNOWN if hits is None else hits.find(key, None)
        if type(found) is not KeyLease:
            return await self._enter_key(None)
        attachment = found.attachment
        if not attachment.mapping.zero_copy or not attachment.is_ready(found.ref):
            return await self._enter_key(found)
        self.ref = found.ref
        return self._enter(found.ref, found)

    async def _enter_key(self, lease: KeyLease | None) -> Feature:
        """Return the view of a lease, or of one that is looked up."""
        assert self._life is not None, "of a key"
        assert self._key is not None, "of a key"
        give_up_s = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        while True:
            if lease is None:
                keys = self._life.here().keys
                lease = await keys.find(key_bytes(self._key), self.timeout_s, None)
            left_s = None if give_up_s is None else max(0.0, give_up_s - time.monotonic())
            self.ref = lease.ref
            try:
                held = await self._reader.hold_leased(lease, left_s)
            except StaleRef:
                lease = None  # its writer died before its bytes came, and the key went with it
                continue
            return self._enter(lease.ref, *held)

    async def __aexit__(self, *_: object) -> None:
        """Empty the view and pay the read."""
        self.close()

    def __enter__(self) -> Feature:
        """Return the view of bytes that are there now."""
        if self._source is not None:
            self._check_unused()
        if self._key is not None:
            keys = self._opened().keys
            hits = keys.hits
            found = UNKNOWN if hits is None else hits.find(self._key, None)
            return self._enter_leased(
                found if type(found) is KeyLease else keys.find_now(self._key, None)
            )
        assert self.ref is not None, "a ref or a key"
        return self._enter(self.ref, self._reader.hold_nowait(self.ref))

    def enter_at_hand(self) -> Feature | None:
        """As plain ``with`` of a key, but return None if the owner must be asked."""
        if self._source is not None:
            self._check_unused()
        assert self._key is not None, "of a key"
        lease = self._opened().keys.at_hand(self._key, None)
        return None if lease is None else self._enter_leased(lease)

    def _opened(self) -> Opened:
        assert self._life is not None, "of a key"
        engine = self._life.engine
        if engine is None:
            raise self._life.closed()
        return engine

    def _enter_leased(self, lease: KeyLease) -> Feature:
        lease.check_at_hand(None)
        if not lease.mapping.zero_copy:
            lease.return_lease()
            raise GetTimeout("no view can be lent on this device: use 'async with' instead")
        self.ref = lease.ref
        return self._enter(lease.ref, lease)

    def __exit__(self, *_: object) -> None:
        """Empty the view and pay the read."""
        self.close()
