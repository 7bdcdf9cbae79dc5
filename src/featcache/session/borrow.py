"""Borrowing: views in the slab for the length of a block."""

import time
from collections.abc import Awaitable, Callable
from types import TracebackType

import torch

from featcache.errors import SettingsError, StaleRef
from featcache.memory.pack import Feature, unpack
from featcache.memory.views import invalidate
from featcache.ref import FeatureRef
from featcache.session.copier import Readable
from featcache.session.lease import KeyLease
from featcache.session.reader import Reader

Find = Callable[[], Awaitable[KeyLease]]


class Borrow:
    """One borrow: ``async with`` waits for the bytes, plain ``with`` takes what is there now.

    Leaving the block pays the read, behind what was asked of the GPU on the stream that is then
    current, and empties the view (its ``numel()`` is then 0), so that it can't be read by mistake when
    the bytes are another feature's. Slices made of it are not emptied.
    """

    __slots__ = ("_attachment", "_copied", "_find", "_reader", "_ref", "_tensors", "timeout_s")

    def __init__(self, reader: Reader, what: FeatureRef | Find, timeout_s: float | None) -> None:
        """Borrow a ref, or what is found on entry under a key."""
        self._reader = reader
        self._ref: FeatureRef | None = None
        self._find: Find | None = None
        if type(what) is FeatureRef or isinstance(what, FeatureRef):
            self._ref = what
        else:
            self._find = what
        self.timeout_s = timeout_s
        self._attachment: Readable | None = None
        self._tensors: list[torch.Tensor] = []
        self._copied = False

    @property
    def by_key(self) -> bool:
        """Whether it is looked up on entry."""
        return self._find is not None

    @property
    def ref(self) -> FeatureRef | None:
        """The ref that is borrowed; None of a key's, before it is found."""
        return self._ref

    def _enter(
        self, ref: FeatureRef, attachment: Readable, copied: Feature | None = None
    ) -> Feature:
        self._copied = copied is not None
        if copied is None:
            try:
                view, specs, offset_bytes = attachment.mapping.view, ref.specs, ref.offset_bytes
                if specs[0].name is None:  # one bare tensor, as most features are
                    copied = view(offset_bytes, specs[0])
                    self._tensors = [copied]
                else:
                    self._tensors = [view(offset_bytes, spec) for spec in specs]
                    copied = unpack(specs, self._tensors)
            except BaseException:
                attachment.end(ref, pays=False)
                raise
        self._attachment = attachment
        self._reader.gets += 1
        return copied

    def close(self) -> None:
        """Empty the view and pay the read; what leaving the block does."""
        self.__exit__(None, None, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Empty the view and pay the read."""
        attachment, self._attachment = self._attachment, None
        if attachment is None or self._ref is None:
            return
        for tensor in self._tensors:
            invalidate(tensor)
        self._tensors = []
        order = None if self._copied else attachment.mapping.order()
        attachment.end(self._ref, pays=True, order=order)

    def _check_unused(self) -> None:
        if self._attachment is not None:
            raise RuntimeError("this borrow is entered already; call borrow() for another")

    async def __aenter__(self) -> Feature:
        """Return the view, once its bytes are there."""
        self._check_unused()
        if self._find is None:
            assert self._ref is not None, "a ref or a key"
            return self._enter(self._ref, *await self._reader.hold(self._ref, self.timeout_s))
        give_up_s = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        while True:
            read = await self._find()
            left_s = None if give_up_s is None else max(0.0, give_up_s - time.monotonic())
            self._ref = read.ref
            try:
                held = await self._reader.hold_granted(read, left_s)
            except StaleRef:
                continue  # its writer died before its bytes came, and the key went with it
            return self._enter(read.ref, *held)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Empty the view and pay the read."""
        self.close()

    def __enter__(self) -> Feature:
        """Return the view of bytes that are there now."""
        if self._attachment is not None:
            self._check_unused()
        if self._find is not None or self._ref is None:
            raise SettingsError("a key is looked up first, which takes a while: use 'async with'")
        return self._enter(self._ref, self._reader.hold_nowait(self._ref))
