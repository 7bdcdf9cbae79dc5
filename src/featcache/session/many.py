"""`get_many`: all members pinned first, then all copied, then all paid, in few words."""

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import anyio

from featcache.control.turns import BYTES_SHIFT, TURN_UNITS
from featcache.core.keyed_store import key_label
from featcache.errors import FeatcacheError, GetTimeout, StaleRef, of_member
from featcache.memory.pack import Feature, unpack
from featcache.memory.slab import Order
from featcache.ref import FeatureRef
from featcache.session.arguments import key_timeout, member_label, not_found, rpc_timeout
from featcache.session.attachment import Attachment
from featcache.session.copier import Device, Readable, copy
from featcache.session.lease import KeyLease
from featcache.session.reader import BYTES_LATE, Reader
from featcache.session.single_flight import Keys
from featcache.session.waiting import wait_ready, wait_ready_blocking

Wanted = FeatureRef | bytes
"""A ref, or a key as the directory has it."""


class Many:
    """The members of one call: pinned together, and paid together or not at all.

    A ref that stands twice is read once: each has its copy, and the last use pays. A key that stands
    twice is looked up twice.
    """

    def __init__(
        self, reader: Reader, keys: Keys, wanted: Sequence[Wanted], device: Device
    ) -> None:
        self._reader = reader
        self._keys = keys
        self._wanted = list(wanted)
        self._device = device
        self._sources: list[Readable | None] = [None] * len(wanted)
        """Of those that are pinned."""
        self._orders: list[Order] = [None] * len(wanted)
        self._awaited: list[int] = []
        """Those whose bytes were not there as they were pinned, and the keys."""
        self._at = 0
        """The member that something is done for."""
        self._give_up_s: float | None = None
        """When (by `time.monotonic`) the call is late."""
        self._timeout_s: float | None = None
        self._copies_behind = False
        """Whether copies were given to streams that have no word behind them yet."""

    def _source(self, index: int) -> Readable:
        source = self._sources[index]
        assert source is not None, "it is pinned"
        return source

    def _ref(self, index: int) -> FeatureRef:
        wanted, source = self._wanted[index], self._sources[index]
        if isinstance(source, KeyLease):
            return source.ref
        assert isinstance(wanted, FeatureRef), "a key has a lease"
        return wanted

    @contextlib.contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """If a block fails, unpin all, and say of which member the error is."""
        try:
            yield
        except BaseException as error:
            self.abandon()
            wanted = self._wanted
            of_member(error, self._at, len(wanted), member_label(wanted[self._at]))
            raise

    # --- pinned -----------------------------------------------------------------------------------

    async def pin(self, timeout_s: float | None, *, follows: bool) -> None:
        """Pin all members and wait for their bytes; if one fails, none stays pinned.

        Where it `follows`, this process's own writes need not have landed: the copies come behind them.
        """
        self._begin(timeout_s)
        with self._all_or_none():
            await self._look_up(timeout_s)
            try:
                with anyio.fail_after(rpc_timeout(timeout_s)):
                    await self._pin_refs()
                with anyio.fail_after(self._left_s()):
                    await self._wait_for_bytes(follows=follows)
            except TimeoutError as error:
                if isinstance(error, FeatcacheError):
                    raise
                raise self._late() from None

    def _begin(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._give_up_s = None if timeout_s is None else time.monotonic() + timeout_s

    def _left_s(self) -> float | None:
        return None if self._give_up_s is None else max(0.0, self._give_up_s - time.monotonic())

    def _late(self) -> GetTimeout:
        if isinstance(self._wanted[self._at], bytes):
            return GetTimeout(BYTES_LATE)
        return GetTimeout(f"the bytes did not come within {self._timeout_s} s; no read is paid")

    async def _look_up(self, timeout_s: float | None) -> None:
        """Take a lease of every key; with a timeout, wait for those that are not there."""
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        members = [n for n, wanted in enumerate(self._wanted) if isinstance(wanted, bytes)]
        if not members:
            return
        keys = [wanted for wanted in self._wanted if isinstance(wanted, bytes)]
        try:
            with anyio.fail_after(rpc_timeout(timeout_s)):
                leases = await self._keys.find_many(keys, self._device)
        except TimeoutError:
            self._at = members[0]
            raise key_timeout(key_label(keys[0]), timeout_s or 0.0) from None
        except BaseException as error:
            if isinstance(error, FeatcacheError):
                self._at = members[error.member or 0]
            raise
        for member, lease in zip(members, leases, strict=True):
            self._sources[member] = lease
        for member in members:
            if self._sources[member] is None:
                self._at = member
                await self._find(give_up_s, timeout_s)

    async def _find(self, give_up_s: float | None, timeout_s: float | None) -> None:
        """Take a lease of a key that was not there, or raise KeyNotFound."""
        key = self._wanted[self._at]
        assert isinstance(key, bytes), "a key"
        if give_up_s is None:
            raise not_found(key)
        try:
            self._sources[self._at] = await self._keys.find(
                *(key, _rest_s(give_up_s, timeout_s), self._device), counted=True
            )
        except TimeoutError:
            raise key_timeout(key_label(key), timeout_s or 0.0) from None

    async def _pin_refs(self) -> None:
        turn, pools, device = self._reader.turn, self._reader.pools, self._device
        for member, wanted in enumerate(self._wanted):
            self._at = member
            turn.left -= 1
            if turn.left < 0:
                await turn.wait()
            if isinstance(wanted, FeatureRef):
                if (attachment := pools.peek(wanted)) is None and pools.is_far(wanted):
                    wanted = self._wanted[member] = await pools.bring(wanted)  # noqa: PLW2901 - it is here now
                attachment = attachment or await pools.open(wanted)
                ready, self._sources[member] = attachment.pin(wanted), attachment
                if not ready:
                    self._awaited.append(member)
            else:
                self._awaited.append(member)
            mapping = self._source(member).mapping
            if not mapping.can_copy_to(device):
                await pools.reach(_attachment(self._source(member)), device)

    async def _wait_for_bytes(self, *, follows: bool) -> None:
        """Return when all are there; a key whose writer died before is looked up again."""
        for member in self._awaited:
            wanted, self._at = self._wanted[member], member
            while True:
                source, ref = self._source(member), self._ref(member)
                attachment = _attachment(source)
                if attachment.is_ready(ref):
                    break
                reached = source.mapping.can_copy_to(self._device)
                if follows and reached and attachment.follow_write(ref, self._device):
                    break
                try:
                    await wait_ready(attachment, ref)
                    break
                except StaleRef:
                    if not isinstance(wanted, bytes):
                        raise
                    self._sources[member] = None
                    source.unpin(ref, pays=False)
                    self._sources[member] = await self._keys.find(wanted, None, self._device)

    # --- copied -----------------------------------------------------------------------------------

    async def copy(self) -> list[Feature]:
        """Return the copies of all, and pay: here what is soon copied, all else in one run of a thread.

        If this fails, or is cancelled, no read of a ref is paid.
        """
        turn, device = self._reader.turn, self._device
        features: list[Feature | None] = [None] * len(self._wanted)
        large: list[tuple[int, Callable[[], Feature]]] = []
        with self._all_or_none():
            inline_bytes = self._reader.inline_bytes
            for member, source in enumerate(self._sources):
                self._at = member
                turn.left -= 1
                if turn.left < 0:
                    await turn.wait()
                assert source is not None, "it is pinned"
                mapping, ref = source.mapping, self._ref(member)
                if not mapping.can_copy_to(device):
                    features[member] = await self._relayed(member, None)
                    continue
                blocking_bytes = mapping.blocking_read_bytes(ref.nbytes, device)
                if blocking_bytes > inline_bytes:
                    large.append((member, self._later(member)))
                    continue
                turn.left -= blocking_bytes >> BYTES_SHIFT
                order = self._orders[member] = mapping.order(device)
                if order is not None:
                    self._copies_behind = True
                if ref.specs[0].name is None:  # as `copy`, inline
                    features[member] = mapping.fetch(ref.offset_bytes, ref.specs[0], device, order)
                else:
                    features[member] = copy(source, ref, device, None, order)
            if large:
                await self._copy_large(large, features)
            if turn.left < min(TURN_UNITS // 2, len(features) // 8):
                await turn.wait()  # the payments are one piece of work: in a turn of their own
        turn.left -= min(TURN_UNITS, len(features) // 8)
        self.pay()
        return [feature for feature in features if feature is not None]

    def _copy(self, member: int) -> Feature:
        """Copy in the caller's thread, in the order of its stream."""
        source = self._source(member)
        order = self._orders[member] = source.mapping.order(self._device)
        self._copies_behind = self._copies_behind or order is not None
        return copy(source, self._ref(member), self._device, None, order)

    def _later(self, member: int) -> Callable[[], Feature]:
        """Return the copy of a member as work for a thread, into tensors that are made now."""
        source, ref, device = self._source(member), self._ref(member), self._device
        mapping = source.mapping
        order = self._orders[member] = mapping.order(device)
        self._copies_behind = self._copies_behind or order is not None
        targets = [mapping.empty(spec, device) for spec in ref.specs]

        def fill() -> Feature:
            for spec, target in zip(ref.specs, targets, strict=True):
                mapping.read(ref.offset_bytes, spec, target, order)
            return unpack(ref.specs, targets)

        return fill

    async def _copy_large(
        self, large: list[tuple[int, Callable[[], Feature]]], features: list[Feature | None]
    ) -> None:
        at = [large[0][0]]

        def run() -> list[Feature]:
            copies = []
            for member, fill in large:
                at[0] = member
                copies.append(fill())
            return copies

        # The pins of these stay with the thread: if nobody awaits it any more they end with it.
        kept = {member: self._sources[member] for member, _ in large}
        for member in kept:
            self._sources[member] = None

        def unpin(_: object) -> None:
            for member, source in kept.items():
                self._sources[member] = source
            self.abandon()

        try:
            copies = await self._reader.offload.run(run, unpin)
        except Exception:
            self._at = at[0]
            self._sources = [kept.get(n, source) for n, source in enumerate(self._sources)]
            raise
        for (member, _), feature in zip(large, copies, strict=True):
            features[member], self._sources[member] = feature, kept[member]

    async def _relayed(self, member: int, out: Feature | None) -> Feature:
        """Return the copy of a pinned member that comes through host memory."""
        reader, ref, there = self._reader, self._ref(member), None
        device = None if out is not None else self._device or self._source(member).mapping.device
        try:
            with anyio.fail_after(self._left_s()):
                there = await reader.pools.relay(ref)
                feature = await reader.get(there, device, out, None)
        except BaseException as error:
            if there is not None:
                reader.pools.pay_copy(there)
            if isinstance(error, TimeoutError) and not isinstance(error, FeatcacheError):
                raise self._late() from None
            raise
        reader.gets -= 1  # the copy's get is part of the read
        return feature

    # --- the end ----------------------------------------------------------------------------------

    def pay(self) -> None:
        """End the uses of all and pay them, behind their copies."""
        reads: dict[Attachment, list[tuple[FeatureRef, Order]]] = {}
        for member, source in enumerate(self._sources):
            assert source is not None, "all are pinned"
            if isinstance(source, KeyLease):
                source.unpin(source.ref, pays=True, order=self._orders[member])
            else:
                reads.setdefault(source, []).append((self._ref(member), self._orders[member]))
        self._sources = [None] * len(self._sources)
        for attachment, paid in reads.items():
            attachment.pay_many(paid)
        self._reader.gets += len(self._wanted)

    def abandon(self) -> None:
        """End the uses of those that are pinned, and pay none of the refs."""
        pinned = [(self._ref(n), source) for n, source in enumerate(self._sources) if source]
        self._sources = [None] * len(self._sources)
        if not pinned:
            return

        def unpin() -> None:
            for ref, source in pinned:
                source.unpin(ref, pays=False)

        if not self._copies_behind:
            unpin()
            return
        # Streams may still read the bytes, with no word behind that would say when they have.
        mappings = {id(source.mapping): source.mapping for _, source in pinned}

        def finish() -> None:
            for mapping in mappings.values():
                with contextlib.suppress(Exception):  # a broken context: nothing is read any more
                    mapping.finish()
            unpin()

        self._reader.offload.spawn(finish)

    # --- for callers with no event loop -------------------------------------------------------------

    def pin_blocking(self, timeout_s: float | None) -> bool:
        """As `pin`, in a thread that may block; False, with nothing done, if the loop is to do it."""
        pools, device = self._reader.pools, self._device
        refs = [wanted for wanted in self._wanted if isinstance(wanted, FeatureRef)]
        if len(refs) < len(self._wanted) or not all(pools.has(ref) for ref in refs):
            return False
        self._begin(timeout_s)
        give_up_s = float("inf") if self._give_up_s is None else self._give_up_s
        with self._all_or_none():
            for member, ref in enumerate(refs):
                self._at = member
                attachment = pools.peek(ref)
                if attachment is None or not attachment.mapping.can_copy_to(device):
                    self.abandon()
                    return False
                attachment.pin(ref)
                self._sources[member] = attachment
            for member, ref in enumerate(refs):
                self._at = member
                if not wait_ready_blocking(_attachment(self._source(member)), ref, give_up_s):
                    raise self._late()
        return True

    def copy_blocking(
        self, run: "Callable[[Callable[[], Awaitable[Feature]]], Feature]"
    ) -> list[Feature]:
        """As `copy`, in the caller's thread; `run` awaits in the loop what comes through host memory."""
        features: list[Feature] = []
        reader = self._reader
        with self._all_or_none():
            for member in range(len(self._wanted)):
                self._at = member
                mapping, ref = self._source(member).mapping, self._ref(member)
                if mapping.can_copy_to(self._device):
                    features.append(self._copy(member))
                    continue
                out = reader.empty_on(ref, self._device or mapping.device)  # this thread's
                features.append(run(lambda: self._relayed(member, out)))  # noqa: B023 - awaited now
        self.pay()
        return features


def _rest_s(give_up_s: float, timeout_s: float | None) -> float:
    """Return the rest of a time, more than 0: 0 has a time of its own (`rpc_timeout`)."""
    return max(0.001, give_up_s - time.monotonic()) if timeout_s else 0.0


def _attachment(source: Readable) -> Attachment:
    return source.attachment if isinstance(source, KeyLease) else source


async def get_many(
    reader: Reader, keys: Keys, wanted: Sequence[Wanted], device: Device, timeout_s: float | None
) -> list[Feature]:
    """Return copies of all members, in their order."""
    many = Many(reader, keys, wanted, device)
    await many.pin(timeout_s, follows=True)
    return await many.copy()
