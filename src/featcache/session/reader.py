"""Reading: get, borrow and release over the attachments of pools."""

import asyncio
import threading
import time

import anyio
import torch

from featcache.control.turns import CALL_UNITS, turn_of
from featcache.errors import GetTimeout, UnknownPool
from featcache.memory.pack import DTYPES, Feature, unpack
from featcache.memory.slab import uncopied
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment
from featcache.session.copier import Copier, Device, Readable, Targets, copy, targets_of
from featcache.session.far import Elsewhere
from featcache.session.home import Home
from featcache.session.lease import KeyLease
from featcache.session.offload import Offload
from featcache.session.pools import Pools
from featcache.session.waiting import wait_ready, wait_ready_blocking

BYTES_LATE = "what is kept under the key was found, but its bytes did not come in time"
_NO_COPY = "no copy came through host memory in time; the read is still owed"


class Reader:
    """get, borrow and release over the pools that there are."""

    def __init__(self, pools: Pools, offload: Offload, inline_bytes: int) -> None:
        self.pools = pools
        self.turn = turn_of(asyncio.get_running_loop())
        self.offload, self.inline_bytes = offload, inline_bytes
        self._copier = Copier(offload, inline_bytes, self.turn)
        self.gets = 0
        self._home = Home()
        self._runs = self._home.runs

    # --- get --------------------------------------------------------------------------------------

    def get_nowait(
        self, ref: FeatureRef, device: Device = None, out: Feature | None = None
    ) -> Feature:
        """Copy bytes that are there now."""
        attachment = self.pools.peek(ref) or self._attached(ref)
        mapping = attachment.mapping
        targets, device = (None, device) if out is None else targets_of(ref, device, out)
        if not mapping.can_copy_to(device):
            raise GetTimeout("the bytes must come another way: await get instead")
        ready = attachment.pin(ref)
        pays, order = False, None
        try:
            if not ready and not attachment.follow_write(ref, device):
                raise GetTimeout("the bytes are still on their way: await get instead")
            order = mapping.order(device)
            specs = ref.specs
            if targets is None and specs[0].name is None:  # as `copy`, inline
                feature: Feature = mapping.fetch(ref.offset_bytes, specs[0], device, order)
            else:
                feature = copy(attachment, ref, device, targets, order)
            pays = True
        finally:
            attachment.unpin(ref, pays=pays, order=order)
        self.gets += 1
        return feature if out is None else out

    async def get(
        self, ref: FeatureRef, device: Device, out: Feature | None, timeout_s: float | None
    ) -> Feature:
        """Copy; a copy that would hold up the loop runs in a thread. If cancelled, the read is owed."""
        turn = self.turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        targets, device = (None, device) if out is None else targets_of(ref, device, out)
        source: Readable | None = self.pools.peek(ref)
        reached = source is not None and source.mapping.can_copy_to(device)
        if source is None or not reached or not (source.pin(ref) or _follows(source, ref, device)):
            pinned, since_s = source if reached else None, time.monotonic()
            try:
                source, reached = await self._await_ready(pinned, ref, device, timeout_s)
            except Elsewhere as here:
                wanted = device if out is None else None
                return await self.get(here.ref, wanted, out, here.left_s)
            timeout_s = _left(timeout_s, since_s)
        if reached:
            feature = await self._copier.copy(source, ref, device, targets)
        else:
            feature = await self._copy_relayed(source, ref, device, out, timeout_s)
        self.gets += 1
        return feature if out is None else out

    async def get_leased(
        self, lease: KeyLease, device: Device, out: Feature | None, timeout_s: float | None
    ) -> Feature:
        """As `get`, of a read granted by key, which is paid however this ends."""
        ref, attachment, targets = lease.ref, lease.attachment, None
        if out is not None:
            targets, device = self._leased_targets(lease, device, out)
        reached = attachment.mapping.can_copy_to(device)
        if not reached or not (attachment.is_ready(ref) or _follows(lease, ref, device)):
            _, reached = await self._await_ready(lease, ref, device, timeout_s)
        if reached:
            feature = await self._copier.copy(lease, ref, device, targets)
        else:
            feature = await self._copy_relayed(lease, ref, device, out, timeout_s)
        self.gets += 1
        return feature if out is None else out

    def get_leased_blocking(
        self, lease: KeyLease, device: Device, out: Feature | None
    ) -> Feature | None:
        """As `get_leased`, in a thread that may block; None, with nothing done, if out of reach."""
        ref, mapping, targets = lease.ref, lease.attachment.mapping, None
        if out is not None:
            targets, device = self._leased_targets(lease, device, out)
        if not mapping.can_copy_to(device):
            return None
        pays, order = False, None
        try:
            attachment = lease.attachment
            if not (attachment.is_ready(ref) or attachment.follow_write(ref, device)):
                wait_ready_blocking(attachment, ref, float("inf"))
            order = mapping.order(device)
            if targets is None and ref.specs[0].name is None:  # as `copy`, inline
                feature: Feature = mapping.fetch(ref.offset_bytes, ref.specs[0], device, order)
            else:
                feature = copy(lease, ref, device, targets, order)
            pays = True
        finally:
            lease.unpin(ref, pays=pays, order=order)
        self.gets += 1
        return feature if out is None else out

    def _leased_targets(
        self, lease: KeyLease, device: Device, out: Feature | None
    ) -> tuple[Targets, Device]:
        try:
            return targets_of(lease.ref, device, out)
        except BaseException:
            lease.return_lease()
            raise

    async def _copy_relayed(
        self,
        source: Readable,
        ref: FeatureRef,
        device: Device,
        out: Feature | None,
        timeout_s: float | None,
    ) -> Feature:
        """Copy a pinned ref's bytes through host memory, and end the use."""
        if out is None and device is None:
            device = source.mapping.device
        pays = False
        try:
            with anyio.fail_after(timeout_s):
                feature = await self._get_copy(ref, None if out is not None else device, out)
            pays = True
        except TimeoutError:
            raise GetTimeout(_NO_COPY) from None
        finally:
            source.unpin(ref, pays=pays)
        return feature

    async def _get_copy(self, ref: FeatureRef, device: Device, out: Feature | None) -> Feature:
        """Get the copy in host memory that the owner makes of a pinned ref's bytes for this call alone.

        If it can't be got it is paid all the same: nobody else knows of it, and it takes room there.
        """
        there = await self.pools.relay(ref)
        try:
            feature = await self.get(there, device, out, None)
        except BaseException:
            self.pools.pay_copy(there)
            raise
        self.gets -= 1  # the copy's get is part of the read
        return feature

    # --- release and borrow -------------------------------------------------------------------------

    async def release(self, ref: FeatureRef, timeout_s: float | None) -> None:
        """Pay without reading."""
        turn = self.turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        attachment = self.pools.peek(ref)
        if attachment is None:
            try:
                with anyio.fail_after(timeout_s):
                    if self.pools.is_far(ref):
                        here = await self.pools.end_far(ref, "release")
                        if here is None:
                            return
                        ref = here
                    attachment = await self.pools.open(ref)
            except TimeoutError:
                raise GetTimeout(
                    f"not attached within {timeout_s} s; the read is still owed"
                ) from None
        attachment.pay(ref)

    def hold_nowait(self, ref: FeatureRef) -> Attachment:
        """Pin a ref whose bytes are there now, in a pool that is attached."""
        attachment = self.pools.peek(ref) or self._attached(ref)
        if not attachment.mapping.zero_copy:
            raise GetTimeout("the bytes must come another way: use 'async with' instead")
        if not attachment.pin(ref) and not _follows(attachment, ref, None):
            attachment.unpin(ref, pays=False)
            raise GetTimeout("the bytes are still on their way: use 'async with' instead")
        return attachment

    async def hold(
        self, ref: FeatureRef, timeout_s: float | None
    ) -> tuple[Readable, Feature | None]:
        """Pin a ref for a borrow, attaching and waiting for its bytes as need be.

        Where the slab itself can't be lent, a copy comes with it. WrongLoop outside the loop: a
        borrow is made in any thread, so it is asked as it is entered.
        """
        if self._runs._thread_id != threading.get_ident():  # noqa: SLF001 - see `Runs`
            raise self._home.refusal("borrow")
        turn = self.turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        source: Readable | None = self.pools.peek(ref)
        reached = source is not None and source.mapping.can_copy_to(None)
        if source is None or not reached or not (source.pin(ref) or _follows(source, ref, None)):
            pinned, since_s = source if reached else None, time.monotonic()
            source, reached = await self._await_ready(pinned, ref, None, timeout_s)
            timeout_s = _left(timeout_s, since_s)
        if reached and source.mapping.zero_copy:
            return source, None
        return source, await self._copied_in_time(source, ref, timeout_s, reached=reached)

    async def hold_leased(
        self, lease: KeyLease, timeout_s: float | None
    ) -> tuple[Readable, Feature | None]:
        """As `hold`, of a read granted by key."""
        ref, attachment = lease.ref, lease.attachment
        reached = attachment.mapping.can_copy_to(None)
        if not reached or not (attachment.is_ready(ref) or _follows(lease, ref, None)):
            _, reached = await self._await_ready(lease, ref, None, timeout_s)
        if reached and attachment.mapping.zero_copy:
            return lease, None
        return lease, await self._copied_in_time(lease, ref, timeout_s, reached=reached)

    async def _copied_in_time(
        self, source: Readable, ref: FeatureRef, timeout_s: float | None, *, reached: bool
    ) -> Feature:
        try:
            with anyio.fail_after(timeout_s):
                return await self._copied(source, ref, reached=reached)
        except BaseException as error:
            source.unpin(ref, pays=False)
            if isinstance(error, TimeoutError):
                raise GetTimeout(_NO_COPY) from None
            raise

    async def _copied(self, source: Readable, ref: FeatureRef, *, reached: bool) -> Feature:
        """Return a copy of a pinned ref's bytes, which stays pinned."""
        if reached:
            source.pin(ref)  # a use of its own, which ends with the copy and pays nothing
            return await self._copier.copy(source, ref, None, None, pays=False)
        return await self._get_copy(ref, source.mapping.device, None)

    # --- for callers with no event loop ---------------------------------------------------------------

    async def prepare(
        self, ref: FeatureRef, device: Device, timeout_s: float | None, *, borrows: bool
    ) -> bool:
        """Wait until `get_nowait`, or a plain borrow, finds the bytes; False if it never will.

        For a caller whose own thread is to read, in the order of its own stream.
        """
        try:
            source, reached = await self._await_ready(None, ref, device, timeout_s)
        except Elsewhere:
            return False  # under another ref: the loop reads it
        source.unpin(ref, pays=False)
        return reached and (source.mapping.zero_copy or not borrows)

    def prepare_blocking(
        self, ref: FeatureRef, device: Device, timeout_s: float | None, *, borrows: bool
    ) -> bool:
        """As `prepare`, in a thread that may block; False also for a pool that is not attached yet."""
        attachment = self.pools.peek(ref) if self.pools.has(ref) else None
        if attachment is None or not attachment.mapping.can_copy_to(device):
            return False
        give_up_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        attachment.pin(ref)
        try:
            if not wait_ready_blocking(attachment, ref, give_up_s):
                raise _late(timeout_s)
        finally:
            attachment.unpin(ref, pays=False)
        return attachment.mapping.zero_copy or not borrows

    def empty(self, ref: FeatureRef, device: Device) -> Feature:
        """Return new tensors for a feature, where a get would put it; its pool is attached."""
        return self.empty_on(ref, device or self._attached(ref).mapping.device)

    def empty_on(self, ref: FeatureRef, device: torch.device) -> Feature:
        """Return new tensors for a feature on a device."""
        try:
            made = [
                torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device)
                for spec in ref.specs
            ]
        except RuntimeError as error:
            raise uncopied(ref.nbytes, error) from error
        return unpack(ref.specs, made)

    # --- getting there ------------------------------------------------------------------------------

    def _attached(self, ref: FeatureRef) -> Attachment:
        attachment = self.pools.peek(ref)
        if attachment is None:
            self.pools.check(ref)
            raise UnknownPool(
                "this pool is not attached yet: await a get of it first, or connect to it"
            )
        return attachment

    async def _await_ready(
        self, pinned: Readable | None, ref: FeatureRef, device: Device, timeout_s: float | None
    ) -> tuple[Readable, bool]:
        """Attach, pin, enable a device and wait for the bytes, as need be.

        `pinned` is the source if the ref is pinned already. Returns the source and whether the
        device reaches the bytes; if this fails the ref is not pinned any more.
        """
        try:
            with anyio.fail_after(timeout_s):
                if pinned is None:
                    if self.pools.is_far(ref):
                        since_s = time.monotonic()
                        raise Elsewhere(await self.pools.bring(ref), _left(timeout_s, since_s))
                    attachment = await self.pools.open(ref)
                elif isinstance(pinned, KeyLease):
                    attachment = pinned.attachment
                else:
                    attachment = pinned
                reached = attachment.mapping.can_copy_to(device) or await self.pools.reach(
                    attachment, device
                )
                if pinned is None:
                    ready = attachment.pin(ref)
                    pinned = attachment
                    if ready:
                        return pinned, reached
                await wait_ready(attachment, ref)
                return pinned, reached
        except BaseException as error:
            if pinned is not None:
                pinned.unpin(ref, pays=False)
            if isinstance(error, TimeoutError):
                late = GetTimeout(BYTES_LATE) if isinstance(pinned, KeyLease) else _late(timeout_s)
                raise late from None
            raise


def _follows(source: Readable, ref: FeatureRef, device: Device) -> bool:
    """Whether the caller's stream now comes behind this process's own write of a pinned ref."""
    attachment = source.attachment if isinstance(source, KeyLease) else source
    try:
        return attachment.follow_write(ref, device)
    except BaseException:
        source.unpin(ref, pays=False)
        raise


def _late(timeout_s: float | None) -> GetTimeout:
    return GetTimeout(f"the bytes did not come within {timeout_s} s; the read is still owed")


def _left(timeout_s: float | None, since_s: float) -> float | None:
    """Return the rest of a time limit."""
    return None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - since_s))
