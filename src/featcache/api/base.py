"""What owners and clients have in common: arguments made sense of, and the calls that read."""

from types import TracebackType
from typing import Any, NoReturn, Self

import torch

from featcache.api.arguments import check_ref, no_pickle, parse_device
from featcache.api.by_key import ByKey
from featcache.errors import CacheClosed, SettingsError
from featcache.memory.pack import Feature, same_layout
from featcache.ref import FeatureRef
from featcache.session.borrow import Borrow
from featcache.session.reader import Reader
from featcache.settings import parse_timeout


class CacheBase(ByKey):
    """Reading, the same for owners and clients."""

    not_opened = "not opened yet: use 'async with', or await open()"
    """What is said of it before it is opened."""
    _why_closed: str | None = None
    _reader: Reader | None = None
    """What `_reads` returns, where it is kept at hand."""
    _place: torch.device | None = None
    """What `_default_device` returns."""

    @property
    def is_open(self) -> bool:
        """Whether it can be used, in this process, now."""
        raise NotImplementedError

    def check_open(self) -> None:
        """Raise CacheClosed, saying why, if it can't be used."""
        self._reads()

    def has_attached(self, ref: FeatureRef) -> bool:
        """Whether the ref's pool is attached, so that `get_nowait` can read it. Safe in any thread."""
        return self._reads().pools.has(ref)

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
            ref: a ref from `put`, in this process or another; or a key, for what is kept under it.
            device: where the copy is to be; None is the device this object was made with, else the
                pool's own.
            out: a tensor (or dict of them) of the feature's shapes and dtypes to copy into; it is
                also what is returned. Not with `device`.
            timeout: seconds to wait for the pool to be attached and the bytes to come; None is for
                ever. Of a key, seconds to wait for something to be put under it too; None is not at
                all.

        Returns:
            A contiguous tensor of the shape and dtype that were put, or a dict of them.

        Raises:
            StaleRef: recycled, expired, discarded, or paid by this session before.
            MalformedRef: the ref contradicts the pool's own table.
            UnknownPool: the ref is of a pool that this object can't reach.
            OwnerLost: the owner died or closed the pool.
            GetTimeout: not in time; the read is still owed.
            KeyNotFound: nothing is kept under the key; KeyTimeout: nor came in time.
            PoolFull: as many reads by key are out in this session as may be (`Settings.grants`).
            CacheClosed: this object is not open.
            SettingsError: `out` or `device` does not fit.

        If the call is cancelled the read is still owed: get it again, or release it.

        """
        if type(ref) is not FeatureRef:
            if isinstance(ref, str | bytes):
                return await self._get_key(ref, self._target(device, out), out, timeout)
            check_ref(ref)
        return await self._reads().get(ref, self._target(device, out), out, parse_timeout(timeout))

    def get_nowait(
        self, ref: FeatureRef, *, device: Any = None, out: Feature | None = None
    ) -> Feature:
        """`get` with no await, for a pool that is attached and bytes that are there.

        The copy runs in the caller's thread whatever its size. Safe in any thread.

        Raises:
            UnknownPool: the pool is not attached yet.
            GetTimeout: the bytes are still on their way (on a GPU's stream).

        """
        if device is not None:
            device = self._target(device, out)
        elif out is None:
            device = self._place
        if type(ref) is not FeatureRef:
            check_ref(ref)
        reader = self._reader
        return (self._reads() if reader is None else reader).get_nowait(ref, device, out)

    async def prepare(
        self, ref: FeatureRef, place: torch.device | None, timeout: float | None, *, borrows: bool
    ) -> bool:
        """Wait until `get_nowait`, or a plain ``with borrow``, finds the bytes there.

        Returns False where it never will, because they come by way of host memory. For a caller
        whose own thread is to read, in the order of its own stream. Raises as `get` does.
        """
        return await self._reads().prepare(ref, place, parse_timeout(timeout), borrows=borrows)

    def prepare_blocking(
        self, ref: FeatureRef, place: torch.device | None, timeout: float | None, *, borrows: bool
    ) -> bool:
        """`prepare` in a thread that may block; False also where the pool is not attached yet."""
        return self._reads().prepare_blocking(ref, place, parse_timeout(timeout), borrows=borrows)

    def place_of(self, ref: FeatureRef, device: Any, out: Feature | None) -> torch.device | None:
        """Return the device that a get copies to, None for the pool's own."""
        place = self._target(device, out)
        return place if out is None else same_layout(check_ref(ref).specs, out)[0].device

    def empty(self, ref: FeatureRef, *, device: Any = None) -> Feature:
        """Return new tensors that a `get` of this ref can have as its `out`; its pool is attached."""
        return self._reads().empty(check_ref(ref), self._target(device, None))

    def borrow(self, ref: FeatureRef | str | bytes, *, timeout: float | None = None) -> Borrow:
        """Return a context manager whose value is a view in the slab: no copy, whatever the size.

        ``async with`` waits for the bytes, plain ``with`` takes what is there now (as `get_nowait`).
        Leaving the block pays the read and empties the view. The view is for reading: in another
        process than the owner's its memory is mapped read-only, and a write to it ends the process.

        Of a key, `timeout` is as in `get`; it is looked up on entry, so it takes ``async with``.

        Raises (on entry):
            As `get` does.

        """
        if type(ref) is not FeatureRef:
            if isinstance(ref, str | bytes):
                return self._borrow_key(ref, timeout)
            check_ref(ref)
        timeout_s = None if timeout is None else parse_timeout(timeout)
        reader = self._reader
        return Borrow(self._reads() if reader is None else reader, ref, timeout_s)

    async def release(self, ref: FeatureRef, *, timeout: float | None = None) -> None:
        """Pay this session's read without reading. Raises as `get` does."""
        await self._reads().release(check_ref(ref), parse_timeout(timeout))

    def _target(self, device: Any, out: Feature | None) -> torch.device | None:
        if device is None:
            return None if out is not None else self._default_device()
        if out is not None:
            raise SettingsError("get takes a device or an out, not both")
        return parse_device(device)

    def _closed(self) -> CacheClosed:
        """Return the error of who uses it while it is not open."""
        return CacheClosed(self._why_closed or self.not_opened)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, and say what is to be done."""
        no_pickle(self)

    async def open(self) -> Self:
        """Open it; ``async with`` does."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Close it; ``async with`` does. Idempotent."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()
