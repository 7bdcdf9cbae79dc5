"""Reading: what get, borrow and release do with the attachments of pools."""

import time
from collections.abc import Awaitable
from typing import Protocol

import anyio
import torch

from featcache.errors import GetTimeout, UnknownPool
from featcache.memory.pack import DTYPES, Feature, unpack
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment
from featcache.session.copier import Copier, Device, Readable, copy, targets_of
from featcache.session.lease import KeyLease
from featcache.session.offload import Offload

BYTES_LATE = "what is kept under the key was found, but its bytes did not come in time"
_NO_COPY = "no copy came through host memory in time; the read is still owed"


class Pools(Protocol):
    """Where a `Reader` finds the attachment of a ref's pool."""

    def peek(self, ref: FeatureRef) -> Attachment | None:
        """Return it if it is open. Raise UnknownPool if it can never be."""

    def has(self, ref: FeatureRef) -> bool:
        """Return whether it is open, changing nothing: this is asked in any thread."""

    def check(self, ref: FeatureRef) -> None:
        """Raise OwnerLost if it was open and its owner is gone."""

    def open(self, ref: FeatureRef) -> Awaitable[Attachment]:
        """Return it, attaching first."""

    def reach(self, attachment: Attachment, device: Device) -> Awaitable[bool]:
        """Open the pool for a device of this process; False where only host memory leads there."""

    def relay(self, ref: FeatureRef) -> Awaitable[FeatureRef]:
        """Have the owner copy a held ref's bytes into host memory; return the copy's ref."""


class Reader:
    """get, borrow and release over whatever pools there are."""

    def __init__(self, pools: Pools, offload: Offload, inline_bytes: int) -> None:
        self.pools = pools
        self._copier = Copier(offload, inline_bytes)
        self.gets = 0

    # --- get --------------------------------------------------------------------------------------

    def get_nowait(
        self, ref: FeatureRef, device: Device = None, out: Feature | None = None
    ) -> Feature:
        """Copy what is there now."""
        attachment = self.pools.peek(ref) or self._attached(ref)
        mapping = attachment.mapping
        targets, device = (None, device) if out is None else targets_of(ref, device, out)
        if not mapping.can_copy_to(device):
            raise GetTimeout("the bytes must come another way: await get instead")
        ready = attachment.begin(ref)
        pays, order = False, None
        try:
            if not ready:
                raise GetTimeout("the bytes are still on their way: await get instead")
            order = mapping.order(device)
            specs = ref.specs
            if targets is None and specs[0].name is None:  # as `copy`, inline
                feature: Feature = mapping.fetch(ref.offset_bytes, specs[0], device, order)
            else:
                feature = copy(attachment, ref, device, targets, order)
            pays = True
        finally:
            attachment.end(ref, pays=pays, order=order)
        self.gets += 1
        return feature if out is None else out

    async def get(
        self, ref: FeatureRef, device: Device, out: Feature | None, timeout_s: float | None
    ) -> Feature:
        """Copy; what would hold up the loop is copied in a thread. If cancelled, the read is still owed."""
        targets, device = (None, device) if out is None else targets_of(ref, device, out)
        attachment = self.pools.peek(ref)
        reached = attachment is not None and attachment.mapping.can_copy_to(device)
        if attachment is None or not reached or not attachment.begin(ref):
            begun, since_s = attachment if reached else None, time.monotonic()
            attachment, reached = await self._await_begin(begun, ref, device, timeout_s)
            timeout_s = _left(timeout_s, since_s)
        if reached:
            feature = await self._copier.copy(attachment, ref, device, targets)
        else:
            feature = await self._copy_relayed(attachment, ref, device, out, timeout_s)
        self.gets += 1
        return feature if out is None else out

    async def get_granted(
        self, read: KeyLease, device: Device, out: Feature | None, timeout_s: float | None
    ) -> Feature:
        """Copy what was granted, and pay it, whatever comes of this."""
        try:
            targets, device = targets_of(read.ref, device, out)
        except BaseException:
            read.end(read.ref, pays=False)
            raise
        if await self._await_granted(read, device, timeout_s):
            feature = await self._copier.copy(read, read.ref, device, targets)
        else:
            feature = await self._copy_relayed(read, read.ref, device, out, timeout_s)
        self.gets += 1
        return feature if out is None else out

    def get_leased_blocking(
        self, read: KeyLease, device: Device, out: Feature | None
    ) -> Feature | None:
        """As `get_granted`, in a thread that may block; None, with nothing done, if out of reach."""
        pays, order, ref, reached = False, None, read.ref, True
        try:
            targets, device = targets_of(ref, device, out)
            reached = read.mapping.can_copy_to(device)
            if not reached:
                return None
            read.wait_ready_blocking(float("inf"))
            order = read.mapping.order(device)
            feature = copy(read, ref, device, targets, order)
            pays = True
        finally:
            if reached:
                read.end(ref, pays=pays, order=order)
        self.gets += 1
        return feature if out is None else out

    async def _await_granted(self, read: KeyLease, device: Device, timeout_s: float | None) -> bool:
        """Wait for the bytes; return whether a device reaches them. If that fails the read ends."""
        reached = read.mapping.can_copy_to(device)
        if reached and read.is_there():
            return True
        try:
            with anyio.fail_after(timeout_s):
                reached = reached or await self.pools.reach(read.attachment, device)
                await read.wait_ready()
        except BaseException as error:
            read.end(read.ref, pays=False)
            if isinstance(error, TimeoutError):
                raise GetTimeout(BYTES_LATE) from None
            raise
        return reached

    async def _copy_relayed(
        self,
        attachment: Readable,
        ref: FeatureRef,
        device: Device,
        out: Feature | None,
        timeout_s: float | None,
    ) -> Feature:
        """Copy a held ref's bytes by way of host memory, and end the use."""
        if out is None and device is None:
            device = attachment.mapping.device
        pays = False
        try:
            with anyio.fail_after(timeout_s):
                there = await self.pools.relay(ref)
                feature = await self.get(there, None if out is not None else device, out, None)
            self.gets -= 1  # the copy's get is part of this one
            pays = True
        except TimeoutError:
            raise GetTimeout(_NO_COPY) from None
        finally:
            attachment.end(ref, pays=pays)
        return feature

    # --- borrow and release -------------------------------------------------------------------------

    async def release(self, ref: FeatureRef, timeout_s: float | None) -> None:
        """Pay without reading."""
        attachment = self.pools.peek(ref)
        if attachment is None:
            try:
                with anyio.fail_after(timeout_s):
                    attachment = await self.pools.open(ref)
            except TimeoutError:
                raise GetTimeout(
                    f"not attached within {timeout_s} s; the read is still owed"
                ) from None
        attachment.pay(ref)

    async def prepare(
        self, ref: FeatureRef, device: Device, timeout_s: float | None, *, borrows: bool
    ) -> bool:
        """Wait until `get_nowait`, or a plain borrow, finds the bytes; False if it never does."""
        attachment, reached = await self._await_begin(None, ref, device, timeout_s)
        attachment.end(ref, pays=False)
        return reached and (attachment.mapping.zero_copy or not borrows)

    def prepare_blocking(
        self, ref: FeatureRef, device: Device, timeout_s: float | None, *, borrows: bool
    ) -> bool:
        """As `prepare`, in a thread that may block; False also for a pool that is not attached yet."""
        attachment = self.pools.peek(ref) if self.pools.has(ref) else None
        if attachment is None or not attachment.mapping.can_copy_to(device):
            return False
        give_up_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        attachment.begin(ref)
        try:
            if not attachment.wait_ready_blocking(ref, give_up_s):
                raise GetTimeout(
                    f"the bytes did not come within {timeout_s} s; the read is still owed"
                )
        finally:
            attachment.end(ref, pays=False)
        return attachment.mapping.zero_copy or not borrows

    def empty(self, ref: FeatureRef, device: Device) -> Feature:
        """Return new tensors for a feature, where a get would put it."""
        return self.empty_like(ref, device or self._attached(ref).mapping.device)

    def empty_like(self, ref: FeatureRef, where: torch.device) -> Feature:
        """Return new tensors for a feature on a device."""
        made = [
            torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=where) for spec in ref.specs
        ]
        return unpack(ref.specs, made)

    def hold_nowait(self, ref: FeatureRef) -> Attachment:
        """Hold a ref whose bytes are there now, in a pool that is attached."""
        attachment = self.pools.peek(ref) or self._attached(ref)
        if not attachment.mapping.zero_copy:
            raise GetTimeout("the bytes must come another way: use 'async with' instead")
        if not attachment.begin(ref):
            attachment.end(ref, pays=False)
            raise GetTimeout("the bytes are still on their way: use 'async with' instead")
        return attachment

    async def hold(
        self, ref: FeatureRef, timeout_s: float | None
    ) -> tuple[Attachment, Feature | None]:
        """Hold a ref, attaching and waiting for its bytes as need be.

        Where there is no way to the slab itself, a copy comes with it.
        """
        attachment = self.pools.peek(ref)
        reached = attachment is not None and attachment.mapping.can_copy_to(None)
        if attachment is None or not reached or not attachment.begin(ref):
            begun, since_s = attachment if reached else None, time.monotonic()
            attachment, reached = await self._await_begin(begun, ref, None, timeout_s)
            timeout_s = _left(timeout_s, since_s)
        if reached and attachment.mapping.zero_copy:
            return attachment, None
        return attachment, await self._copied_in_time(attachment, ref, timeout_s, reached=reached)

    async def hold_granted(
        self, read: KeyLease, timeout_s: float | None
    ) -> tuple[KeyLease, Feature | None]:
        """As `hold`, of what was granted."""
        reached = await self._await_granted(read, None, timeout_s)
        if reached and read.mapping.zero_copy:
            return read, None
        return read, await self._copied_in_time(read, read.ref, timeout_s, reached=reached)

    async def _copied_in_time(
        self, held: Readable, ref: FeatureRef, timeout_s: float | None, *, reached: bool
    ) -> Feature:
        try:
            with anyio.fail_after(timeout_s):
                return await self._copied(held, ref, reached=reached)
        except BaseException as error:
            held.end(ref, pays=False)
            if isinstance(error, TimeoutError):
                raise GetTimeout(_NO_COPY) from None
            raise

    async def _copied(self, held: Readable, ref: FeatureRef, *, reached: bool) -> Feature:
        """Return a copy of a held ref's bytes, which stays held."""
        mapping = held.mapping
        if reached:
            # A use of its own, which ends with the copy and pays nothing.
            if isinstance(held, KeyLease):
                held.use()
            else:
                held.begin(ref)
            return await self._copier.copy(held, ref, None, None, pays=False)
        there = await self.pools.relay(ref)
        copied = await self.get(there, mapping.device, None, None)
        self.gets -= 1  # the copy's get is part of the borrow
        return copied

    # --- getting there ------------------------------------------------------------------------------

    def _attached(self, ref: FeatureRef) -> Attachment:
        attachment = self.pools.peek(ref)
        if attachment is None:
            self.pools.check(ref)
            raise UnknownPool(
                "this pool is not attached yet: await a get of it first, or connect to it"
            )
        return attachment

    async def _await_begin(
        self, begun: Attachment | None, ref: FeatureRef, device: Device, timeout_s: float | None
    ) -> tuple[Attachment, bool]:
        """Attach and open for a device if need be, hold, and wait for the bytes.

        `begun` holds the ref already. Returns whether the device reaches the bytes.
        """
        holder, reached = begun, True
        try:
            with anyio.fail_after(timeout_s):
                if holder is None:
                    attachment = await self.pools.open(ref)
                    reached = attachment.mapping.can_copy_to(device) or await self.pools.reach(
                        attachment, device
                    )
                    ready = attachment.begin(ref)
                    holder = attachment
                    if ready:
                        return holder, reached
                await holder.wait_ready(ref)
                return holder, reached
        except BaseException as error:
            if holder is not None:
                holder.end(ref, pays=False)
            if isinstance(error, TimeoutError):
                raise GetTimeout(
                    f"the bytes did not come within {timeout_s} s; the read is still owed"
                ) from None
            raise


def _left(timeout_s: float | None, since_s: float) -> float | None:
    """Return what is left of a time limit."""
    return None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - since_s))
