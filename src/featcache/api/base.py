"""The calls that owners and clients have in common: reading, and the directory."""

import time
from typing import Any, NoReturn, Self

import torch

from featcache.api.arguments import check_ref, no_pickle, parse_device
from featcache.api.lifecycle import Engine, LifeState
from featcache.api.many import ManyCalls
from featcache.control.turns import CALL_UNITS
from featcache.errors import SettingsError, StaleRef
from featcache.memory.key_table import ABSENT, UNKNOWN
from featcache.memory.pack import Feature
from featcache.ref import FeatureRef
from featcache.session.arguments import check_make, key_bytes
from featcache.session.borrow import Borrow
from featcache.session.lease import KeyLease, MakeClaim
from featcache.session.reader import Reader
from featcache.session.single_flight import Keys, Make, find_or_claim, make_and_put, moved
from featcache.settings import parse_timeout
from featcache.statistics import Statistics


class CacheBase(ManyCalls):
    """The API that `FeatureCache` and `FeatureClient` share, over the engine of whichever it is.

    An object belongs to the event loop that opened it: WrongLoop elsewhere, but of the calls that say
    that they are safe in any thread.
    """

    # --- life -----------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and not closed, in this process. Safe in any thread."""
        return self._life.state is LifeState.OPEN

    def _opened(self) -> Engine:
        engine: Engine | None = self._life.engine
        if engine is None:
            raise self._life.closed()
        return engine

    def _forget(self) -> None:
        self._life.forget()

    async def open(self) -> Self:
        """Open it; ``async with`` does."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Close it; ``async with`` does. Idempotent; an `open` in progress is cancelled."""
        await self._life.aclose()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled; the error says how to reach the pool from another process."""
        no_pickle(self)

    def statistics(self) -> Statistics:
        """Return counters and gauges as of now.

        Safe in any thread; outside the object's loop its gauges are those that the owner last published.
        """
        engine, home = self._opened(), self._life.home
        return engine.statistics(in_loop=home is not None and home.is_here())

    # --- reading --------------------------------------------------------------------------------

    async def get(
        self,
        ref: FeatureRef | str | bytes,
        *,
        device: Any = None,
        out: Feature | None = None,
        timeout: float | None = None,
    ) -> Feature:
        """Return a copy of the feature that the caller owns, and pay this session's read.

        Args:
            ref: a ref from `put`, in this process or another; or a key, for the feature under it.
            device: where the copy is to be; None is the device this object was made with, else the
                pool's own.
            out: a tensor (or dict of them) of the feature's shapes and dtypes to copy into; it is
                also the return value. Not with `device`.
            timeout: seconds to wait for the pool to be attached and the bytes to come; None waits
                without limit. Of a key, seconds to wait for a feature to be put under it too; None is not at
                all.

        Returns:
            A contiguous tensor of the shape and dtype that were put, or a dict of them.

        Raises:
            StaleRef: recycled, expired, discarded, or paid by this session before.
            MalformedRef: the ref contradicts the pool's own table.
            UnknownPool: the ref is of a pool that this object can't reach.
            OwnerLost: the owner died or closed the pool.
            GetTimeout: not in time; the read is still owed.
            KeyNotFound: there is no feature under the key; KeyTimeout: nor came one in time.
            PoolFull: this session has `Settings.grants` reads by key out.
            CacheClosed: this object is not open.
            WrongLoop: the call came from outside the loop that opened it.
            SettingsError: `out` or `device` does not fit.

        If the call is cancelled the read is still owed: get it again, or release it.

        """
        if type(ref) is not FeatureRef:
            if isinstance(ref, str | bytes):
                plain = type(ref) is str or type(ref) is bytes
                if not plain or device is not None or out is not None or timeout is not None:
                    place, key = self._target(device, out), key_bytes(ref)
                    return await self._get_key(key, place, out, parse_timeout(timeout), None)
                engine: Engine = self._life.here()
                turn = engine.reader.turn
                turn.left -= CALL_UNITS
                if turn.left < 0:
                    # Before anything is done: a cancellation that comes here loses nothing.
                    await turn.wait()
                place, hits = self._place, engine.keys.hits
                if hits is None:
                    return await self._get_key(key_bytes(ref), place, None, None, None)
                found = hits.fetch(ref, place, engine.reader, in_loop=True)
                if isinstance(found, torch.Tensor):
                    return found
                if found == ABSENT:
                    raise hits.missed(ref)
                lease = found if type(found) is KeyLease else None
                return await self._get_key(key_bytes(ref), place, None, None, lease)
            check_ref(ref)
        reader: Reader = self._life.here().reader
        place = self._place if device is None and out is None else self._target(device, out)
        timeout_s = None if timeout is None else parse_timeout(timeout)
        return await reader.get(ref, place, out, timeout_s)

    async def _get_key(
        self,
        key: bytes,
        place: torch.device | None,
        out: Feature | None,
        timeout_s: float | None,
        lease: KeyLease | None,
    ) -> Feature:
        """Read the lease, or one that is looked up."""
        engine: Engine = self._life.here()
        keys, reader = engine.keys, engine.reader
        since_s, left_s = 0.0 if timeout_s is None else time.monotonic(), timeout_s
        while True:
            lease = lease or await keys.find(key, left_s, place)
            if timeout_s is not None:
                left_s = max(0.0, since_s + timeout_s - time.monotonic())
            try:
                return await reader.get_leased(lease, place, out, left_s)
            except StaleRef:
                lease = None  # its writer died before its bytes came, and the key went with it: look again

    def get_nowait(
        self, ref: FeatureRef | str | bytes, *, device: Any = None, out: Feature | None = None
    ) -> Feature:
        """`get` with no await, for a pool that is attached and bytes that are there.

        The copy runs in the caller's thread whatever its size. Safe in any thread. A key is looked up in
        the key table, which this process has mapped.

        Raises:
            UnknownPool: the pool is not attached yet.
            GetTimeout: the bytes are still on their way (on a GPU's stream), or the owner must be asked,
                of a key whose feature the table or this session's leases have no room for.
            KeyNotFound: there is no feature under the key.

        """
        place = self._place if device is None and out is None else self._target(device, out)
        if type(ref) is not FeatureRef:
            if isinstance(ref, str | bytes):
                plain = type(ref) is str or type(ref) is bytes
                return self._get_key_nowait(ref if plain else key_bytes(ref), place, out)
            check_ref(ref)
        engine = self._life.engine
        if engine is None:  # as `_opened`, inline
            raise self._life.closed()
        copied: Feature = engine.reader.get_nowait(ref, place, out)
        return copied

    def _get_key_nowait(
        self, key: str | bytes, place: torch.device | None, out: Feature | None
    ) -> Feature:
        engine: Engine = self._opened()
        hits, lease = engine.keys.hits, None
        if out is None and hits is not None:
            found = hits.fetch(key, place, engine.reader, in_loop=False)
            if isinstance(found, torch.Tensor):
                return found
            lease = found if type(found) is KeyLease else None
        while True:
            lease = lease or engine.keys.find_now(key_bytes(key), place)
            lease.check_at_hand(place)
            try:
                copied: Feature | None = engine.reader.get_leased_blocking(lease, place, out)
            except StaleRef:
                lease = None  # as in `_get_key`
                continue
            assert copied is not None, "it was found for this device"
            return copied

    def borrow(self, ref: FeatureRef | str | bytes, *, timeout: float | None = None) -> Borrow:
        """Return a context manager whose value is a view in the slab: no copy, whatever the size.

        ``async with`` waits for the bytes, plain ``with`` takes bytes that are there now (as `get_nowait`).
        Leaving the block pays the read and empties the view: its ``numel()`` is then 0, and whatever would
        compute with it raises StaleRef. Slices of it, and arrays over its memory, must not outlive
        the block: they are not emptied. Plain ``with``,
        and leaving, are safe in any thread; ``async with`` is entered in the object's loop. The view is
        for reading: in another
        process than the owner's its memory is mapped read-only, and a write to it ends the process.

        Of a key, `timeout` is as in `get`; it is looked up on entry.

        Raises (on entry):
            As `get` does.

        """
        if type(ref) is not FeatureRef:
            if isinstance(ref, str | bytes):
                key, plain = key_bytes(ref), type(ref) is str or type(ref) is bytes
                timeout_s = None if timeout is None else parse_timeout(timeout)
                reader = self._opened().reader
                return Borrow(reader, None, timeout_s, self._life, ref if plain else key)
            check_ref(ref)
        timeout_s = None if timeout is None else parse_timeout(timeout)
        return Borrow(self._opened().reader, ref, timeout_s)

    async def release(self, ref: FeatureRef, *, timeout: float | None = None) -> None:
        """Pay this session's read without reading. Raises as `get` does."""
        reader = self._life.here().reader
        if type(ref) is not FeatureRef:
            check_ref(ref)
        await reader.release(ref, None if timeout is None else parse_timeout(timeout))

    async def discard(self, ref: FeatureRef) -> None:
        """Take back a ref that was never sent, or whose request was cancelled.

        A reader of it may finish; its bytes are recycled after that. Every later read raises StaleRef,
        and so does this call if there is nothing left to take back. A feature under a key stays there:
        no read of it is owed any more.

        Raises:
            StaleRef: recycled, expired, or discarded before.
            MalformedRef: the ref's extent is not its slot's.
            UnknownPool: the ref is of a pool that this object can't reach.
            OwnerLost: the owner died or closed the pool.

        """
        await self._life.here().discard(check_ref(ref))

    def _target(self, device: Any, out: Feature | None) -> torch.device | None:
        """Return where a get puts its copy, None for the pool's own device or that of `out`."""
        if device is None:
            return None if out is not None else self._place
        if out is not None:
            raise SettingsError("get takes a device or an out, not both")
        return parse_device(device)

    # --- the directory --------------------------------------------------------------------------

    async def put(self, feature: Feature, *, key: str | bytes | None = None) -> FeatureRef:
        """Copy a feature into the slab and return its ref."""
        raise NotImplementedError

    async def get_or_put(
        self,
        key: str | bytes,
        make: Make,
        *,
        device: Any = None,
        timeout: float | None = None,
    ) -> Feature:
        """Return the feature under a key; if there is none, make it and put it there.

        Of all callers that want a key at once, in all processes, one runs its `make`. The others wait
        for its feature. If it raises, is cancelled or its process dies, one of the waiters runs its
        own `make` next; the error reaches only the caller whose `make` raised it. A `make` that gets
        its own key waits for itself.

        Args:
            key: as in `put`.
            make: called with no arguments, in the event loop; returns a feature, or an awaitable of
                one. A long one is to be awaitable, or to run in a thread.
            device: where the feature is to be; None is the device this object was made with, else
                the pool's own for a feature that is read, and its present one for a feature that was made.
            timeout: seconds to wait for another's `make`; None waits without limit. It does not bound this
                caller's own `make`, nor the wait for room for its feature.

        Raises:
            KeyTimeout: nothing came in time.
            FeatureTooLarge, PoolFull: the made feature can't be put.
            OwnerLost, CacheClosed, SettingsError: as `get` and `put` do.

        """
        check_make(make)
        wanted, timeout_s = key_bytes(key), parse_timeout(timeout)
        place = self._place if device is None else parse_device(device)
        # Looked up once: a lease that comes as this object is closed is still to be ended.
        engine: Engine = self._life.here()
        turn = engine.reader.turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        hits = engine.keys.hits
        at_hand = (
            UNKNOWN if hits is None else hits.fetch(wanted, place, engine.reader, in_loop=True)
        )
        if isinstance(at_hand, torch.Tensor):
            return at_hand
        lease = at_hand if type(at_hand) is KeyLease else None
        while True:
            found = lease or await find_or_claim(engine.keys, wanted, place, timeout_s)
            if isinstance(found, MakeClaim):
                made = await make_and_put(found, make, lambda made: self.put(made, key=wanted))
                return moved(made, place)
            try:
                return await engine.reader.get_leased(found, place, None, None)
            except StaleRef:
                # Its maker died before its bytes came: one of the waiters makes it.
                lease, engine = None, self._life.here()

    async def contains(self, key: str | bytes) -> bool:
        """Whether a feature is kept under a key now. It does not count as a use."""
        engine: Engine = self._life.here()
        turn = engine.reader.turn
        turn.left -= CALL_UNITS
        if turn.left < 0:
            # Before anything is done: a cancellation that comes here loses nothing.
            await turn.wait()
        plain = key if type(key) is str or type(key) is bytes else key_bytes(key)
        hits = engine.keys.hits
        there = None if hits is None else hits.contains(plain)
        return await engine.keys.command("contains", key_bytes(key)) if there is None else there

    def contains_nowait(self, key: str | bytes) -> bool | None:
        """`contains` by this process's own look at the key table: no await, no message, in any thread.

        None if the table can't tell: the owner must be asked, or the pool is not attached yet. Raises
        OwnerLost if the owner died or closed the pool.
        """
        keys: Keys = self._opened().keys
        plain, hits = key if type(key) is str or type(key) is bytes else key_bytes(key), keys.hits
        return keys.contains_now(plain) if hits is None else hits.contains(plain)

    async def evict(self, key: str | bytes) -> bool:
        """Drop a key, pinned or not; return whether it was there.

        Readers of its feature may finish, and reads that its ref owes stay owed; its bytes are
        recycled after that.
        """
        keys: Keys = self._life.here().keys
        return await keys.command("evict", key_bytes(key))

    async def pin(self, key: str | bytes) -> None:
        """Keep a feature from being evicted to make room.

        Pins are counted, and belong to the session that made them: they end with it.

        Raises:
            KeyNotFound: nothing is kept under the key.

        """
        await self._life.here().keys.command("pin", key_bytes(key))

    async def unpin(self, key: str | bytes) -> None:
        """Take back a pin: one of this session's, else the oldest of another's, if there is one.

        Raises:
            KeyNotFound: nothing is kept under the key.

        """
        await self._life.here().keys.command("unpin", key_bytes(key))
