"""Reading: what get, borrow and release do with the attachments of pools."""

from collections.abc import Awaitable
from types import TracebackType
from typing import Protocol

import anyio
import torch

from featcache._offload import Offload
from featcache.attachment import Attachment
from featcache.errors import GetTimeout, UnknownPool
from featcache.memory.pack import Feature, same_layout, unpack
from featcache.ref import FeatureRef

__all__ = ["Borrow", "Pools", "Reader"]


class Pools(Protocol):
    """Where a `Reader` finds the attachment of a ref's pool."""

    def peek(self, ref: FeatureRef) -> Attachment | None:
        """Return it if it is open. Raise UnknownPool if it can never be."""

    def has(self, ref: FeatureRef) -> bool:
        """Return whether it is open, changing nothing: this is asked in any thread."""

    def open(self, ref: FeatureRef) -> Awaitable[Attachment]:
        """Return it, attaching first."""


class Reader:
    """get, borrow and release over whatever pools there are."""

    def __init__(self, pools: Pools, offload: Offload, inline_bytes: int) -> None:
        self.pools = pools
        self._offload = offload
        self._inline_bytes = inline_bytes
        self.gets = 0

    def get_nowait(
        self, ref: FeatureRef, device: torch.device | None = None, out: Feature | None = None
    ) -> Feature:
        """Copy what is there now."""
        attachment = self._attached(ref)
        ready = attachment.begin(ref)
        pays = False
        try:
            if not ready:
                raise GetTimeout("the bytes are still on their way: await get instead")
            feature = _copy(attachment, ref, device, out)
            pays = True
        finally:
            attachment.end(ref, pays=pays)
        self.gets += 1
        return feature

    async def get(
        self,
        ref: FeatureRef,
        device: torch.device | None,
        out: Feature | None,
        timeout_s: float | None,
    ) -> Feature:
        """Copy; large copies leave the loop for a thread. If cancelled, the read is still owed."""
        attachment = self.pools.peek(ref)
        if attachment is None or not attachment.begin(ref):
            attachment = await self._await_begin(attachment, ref, timeout_s)
        pays = handed_over = False
        try:
            if ref.nbytes <= self._inline_bytes:
                feature = _copy(attachment, ref, device, out)
            else:
                holder = attachment
                targets = _targets(attachment, ref, device, out)
                handed_over = True
                await self._offload.run(
                    lambda: _fill(holder, ref, targets), lambda: holder.end(ref, pays=False)
                )
                handed_over = False
                feature = unpack(ref.specs, targets) if out is None else out
            pays = True
        except Exception:
            handed_over = False  # the copy itself failed: nobody else ends this use
            raise
        finally:
            if not handed_over:
                attachment.end(ref, pays=pays)
        self.gets += 1
        return feature

    def borrow(self, ref: FeatureRef, timeout_s: float | None) -> "Borrow":
        """Return the context manager of one borrow."""
        return Borrow(self, ref, timeout_s)

    async def release(self, ref: FeatureRef, timeout_s: float | None) -> None:
        """Pay without reading."""
        attachment = self.pools.peek(ref)
        if attachment is None:
            attachment = await self._open(ref, timeout_s)
        attachment.pay(ref)

    def hold_nowait(self, ref: FeatureRef) -> Attachment:
        """Hold a ref whose bytes are there now, in a pool that is attached."""
        attachment = self._attached(ref)
        if not attachment.begin(ref):
            attachment.end(ref, pays=False)
            raise GetTimeout("the bytes are still on their way: use 'async with' instead")
        return attachment

    async def hold(self, ref: FeatureRef, timeout_s: float | None) -> Attachment:
        """Hold a ref, attaching and waiting for its bytes as need be."""
        attachment = self.pools.peek(ref)
        if attachment is None or not attachment.begin(ref):
            attachment = await self._await_begin(attachment, ref, timeout_s)
        return attachment

    def _attached(self, ref: FeatureRef) -> Attachment:
        attachment = self.pools.peek(ref)
        if attachment is None:
            raise UnknownPool(
                "this pool is not attached yet: await a get of it first, or connect to it"
            )
        return attachment

    async def _open(self, ref: FeatureRef, timeout_s: float | None) -> Attachment:
        try:
            with anyio.fail_after(timeout_s):
                return await self.pools.open(ref)
        except TimeoutError:
            raise GetTimeout(f"not attached within {timeout_s} s; the read is still owed") from None

    async def _await_begin(
        self, begun: Attachment | None, ref: FeatureRef, timeout_s: float | None
    ) -> Attachment:
        """Attach if need be, hold, and wait for the bytes. `begun` holds the ref already."""
        holder = begun
        try:
            with anyio.fail_after(timeout_s):
                if holder is None:
                    attachment = await self.pools.open(ref)
                    ready = attachment.begin(ref)
                    holder = attachment
                    if ready:
                        return holder
                await holder.arrival(ref)
                return holder
        except BaseException as error:
            if holder is not None:
                holder.end(ref, pays=False)
            if isinstance(error, TimeoutError):
                raise GetTimeout(
                    f"the bytes did not come within {timeout_s} s; the read is still owed"
                ) from None
            raise


def _targets(
    attachment: Attachment, ref: FeatureRef, device: torch.device | None, out: Feature | None
) -> list[torch.Tensor]:
    """Return the tensors to copy into, one for each spec."""
    if out is not None:
        return same_layout(ref.specs, out)
    empty = attachment.mapping.empty
    return [empty(spec, device) for spec in ref.specs]


def _fill(attachment: Attachment, ref: FeatureRef, targets: list[torch.Tensor]) -> None:
    read, offset_bytes = attachment.mapping.read, ref.offset_bytes
    for spec, target in zip(ref.specs, targets, strict=True):
        read(offset_bytes, spec, target)


def _copy(
    attachment: Attachment, ref: FeatureRef, device: torch.device | None, out: Feature | None
) -> Feature:
    """Copy here and now."""
    specs = ref.specs
    if out is None and len(specs) == 1 and specs[0].name is None:  # what most features are
        mapping = attachment.mapping
        tensor = mapping.empty(specs[0], device)
        mapping.read(ref.offset_bytes, specs[0], tensor)
        return tensor
    targets = _targets(attachment, ref, device, out)
    _fill(attachment, ref, targets)
    return unpack(specs, targets) if out is None else out


class Borrow:
    """One borrow: ``async with`` waits for the bytes, plain ``with`` takes what is there now.

    Leaving the block pays the read and empties the view (its ``numel()`` is then 0), so that it can't
    be read by mistake when the bytes are another feature's. Slices made of it are not emptied.
    """

    __slots__ = ("_attachment", "_reader", "_ref", "_tensors", "_timeout_s")

    def __init__(self, reader: Reader, ref: FeatureRef, timeout_s: float | None) -> None:
        self._reader = reader
        self._ref = ref
        self._timeout_s = timeout_s
        self._attachment: Attachment | None = None
        self._tensors: list[torch.Tensor] = []

    def _enter(self, attachment: Attachment) -> Feature:
        ref = self._ref
        try:
            view = attachment.mapping.view
            self._tensors = [view(ref.offset_bytes, spec) for spec in ref.specs]
        except BaseException:
            attachment.end(ref, pays=False)
            raise
        self._attachment = attachment
        self._reader.gets += 1
        return unpack(ref.specs, self._tensors)

    def _exit(self) -> None:
        attachment, self._attachment = self._attachment, None
        if attachment is None:
            return
        for tensor in self._tensors:
            tensor.set_()  # type: ignore[call-overload]  # the stub lacks the form without a source
        self._tensors = []
        attachment.end(self._ref, pays=True)

    def _check_unused(self) -> None:
        if self._attachment is not None:
            raise RuntimeError("this borrow is entered already; call borrow() for another")

    async def __aenter__(self) -> Feature:
        """Return the view, once its bytes are there."""
        self._check_unused()
        return self._enter(await self._reader.hold(self._ref, self._timeout_s))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Empty the view and pay the read."""
        self._exit()

    def __enter__(self) -> Feature:
        """Return the view of bytes that are there now."""
        self._check_unused()
        return self._enter(self._reader.hold_nowait(self._ref))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Empty the view and pay the read."""
        self._exit()
