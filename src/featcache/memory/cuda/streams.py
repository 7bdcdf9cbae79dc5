"""The streams of one device of this process: copies and control words are enqueued on them.

Work that is enqueued on a stream runs later, in that stream's order. A `StreamOrder` is a position in
it: the stream that was torch's current one at the user's call, whichever thread then enqueues. Where
the CPU does the work itself, at once, None stands in its place.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch

from featcache.errors import CacheClosed
from featcache.memory.cuda.driver import Driver
from featcache.memory.pack import DTYPES, contiguous_strides
from featcache.memory.views import view_over
from featcache.memory.words import store_words
from featcache.ref import TensorSpec

_MAX_VIEWS: Final = 4096
_SLOWDOWN: Final = 16
"""A copy over PCIe from pageable memory, waited for, takes so many times a copy in host memory."""
_LATE_S: Final = 1e-3
"""A copy that is waited for so much longer than its bytes take stood behind others' work on the device."""
_LATE_S_A_BYTE: Final = 1e-9
_BUSY_S: Final = 1.0
_now: Final = time.monotonic
_MAX_WORDS: Final = 128
"""Words of one call, of which the driver takes less than 256."""
_FEW_WORDS: Final = 3
"""So few are written one by one."""
_MAX_ORDERS: Final = 256  # torch has 32 streams to a device and priority; others come and go


class StreamOrder:
    """One of a device's streams, as the driver takes it."""

    __slots__ = ("lasts", "raw", "stream", "streams")

    def __init__(self, streams: "DeviceStreams", raw: int, *, lasts: bool) -> None:
        self.streams = streams
        self.raw = raw
        self.stream = streams.driver.api.CUstream(raw)
        self.lasts = lasts
        """Whether it lives as long as the process: another's stream may be gone, its handle a new one's."""


class Words(NamedTuple):
    """Control words that a stream writes."""

    here: memoryview
    """The words as the CPU sees them."""
    address: int
    """The first word's address on the devices."""


def signal_many(words: Words, values: Sequence[tuple[int, int]], order: StreamOrder | None) -> None:
    """As `Mapping.signal_many`: a stream stores the words in batches, or the CPU does now."""
    if order is None:
        store_words(words.here, values)
    else:
        address = words.address
        at = [(address + 8 * index, value) for index, value in values]
        order.streams.write_words(at, order.stream)


class DeviceStreams:
    """One device: its context, its streams, and the slab's address on it."""

    def __init__(self, driver: Driver, ordinal: int, device: torch.device) -> None:
        self.driver = driver
        self.ordinal = ordinal
        self.device = device
        self.address = 0
        """The slab's start, once this device can access it."""
        self.storage: torch.UntypedStorage | None = None
        self._orders: dict[int, StreamOrder] = {}
        self._views: dict[tuple[int, TensorSpec], torch.Tensor] = {}
        self._stream_now = driver.current_stream
        self._context = int(driver.context(ordinal))
        self._current = driver.api.cuCtxGetCurrent
        self._memcpy = driver.api.cuMemcpyAsync
        self._write = driver.api.cuStreamWriteValue64
        self._own: Any = None
        """A stream for copies to and from the host, created by the first of them."""
        self._busy_until_s = 0.0
        """Until then the next such copy may be late too."""
        self._lock = threading.Lock()
        self._batch: list[Any] = []
        """The driver's records of the words of one call, used again and again: to make one takes longer
        than to write a word."""
        self._batch_lock = threading.Lock()

    def order(self) -> StreamOrder:
        """Return the caller's position: torch's current stream of this device."""
        raw = self._stream_now(self.ordinal)
        try:
            return self._orders[raw]
        except KeyError:
            if len(self._orders) >= _MAX_ORDERS:
                self._orders.clear()
            lasts = self.driver.lasts(self.ordinal)
            order = self._orders[raw] = StreamOrder(self, raw, lasts=lasts)
            return order

    def view(self, offset_bytes: int, spec: TensorSpec) -> torch.Tensor:
        storage = self.storage
        if storage is None:
            raise CacheClosed("this mapping of the slab is closed")
        # Features of one shape get the same few offsets again and again. `.data` of a tensor that is
        # there already, another tensor over the same memory, is a third of the work of a new one.
        key = offset_bytes, spec
        try:
            return self._views[key].data
        except KeyError:
            dtype, shape = DTYPES[spec.dtype], spec.shape
            at = (offset_bytes + spec.offset_bytes) // dtype.itemsize
            kept = view_over(storage, at, dtype, shape, contiguous_strides(shape), self.device)
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            self._views[key] = kept
            return kept.data

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Enqueue a copy between addresses that this device can access."""
        current = self._current()[1]
        if current is not None and int(current) == self._context:
            code = self._memcpy(target, source, nbytes, stream)[0]
        else:  # another device's context is current, or this thread never used CUDA
            with self.driver.on(self.ordinal):
                code = self._memcpy(target, source, nbytes, stream)[0]
        if code != 0:
            self.driver.fail("cuMemcpyAsync", code)

    def copy_and_signal(
        self, target: int, source: int, nbytes: int, word: tuple[Any, int, int], stream: Any
    ) -> None:
        """As `copy`, then `write_word` of a word by its index.

        Hot path: the query for the current context, made once here, is a tenth of the time of the two.
        """
        words, index, value = word
        current = self._current()[1]
        if current is None or int(current) != self._context:
            self.copy(target, source, nbytes, stream)
            self.write_word(words.address + 8 * index, value, stream)
            return
        # The copy first: the stream runs both in this order, so the word vouches for the bytes.
        code = self._memcpy(target, source, nbytes, stream)[0]
        if code != 0:
            self.driver.fail("cuMemcpyAsync", code)
        code = self._write(stream, words.address + 8 * index, value, 0)[0]
        if code != 0:
            self.driver.fail("cuStreamWriteValue64", code)

    def write_word(self, address: int, value: int, stream: Any) -> None:
        """Enqueue the store of a 64-bit word: the host sees it after all earlier work of the stream."""
        current = self._current()[1]
        if current is not None and int(current) == self._context:
            code = self._write(stream, address, value, 0)[0]
        else:
            with self.driver.on(self.ordinal):
                code = self._write(stream, address, value, 0)[0]
        if code != 0:
            self.driver.fail("cuStreamWriteValue64", code)

    def write_words(self, words: Sequence[tuple[int, int]], stream: Any) -> None:
        """As `write_word`, of many words by address and value, so many a call of the driver."""
        if len(words) < _FEW_WORDS:
            for address, value in words:
                self.write_word(address, value, stream)
            return
        with self._batch_lock, self.driver.on(self.ordinal):
            if not self._batch:
                self._batch = self.driver.word_batch(_MAX_WORDS)
            for first in range(0, len(words), _MAX_WORDS):
                self.driver.write_words(self._batch, words[first : first + _MAX_WORDS], stream)

    def blocking_bytes(self, nbytes: int) -> int:
        """Return bytes of host memory that are copied in the time that `copy_now` of so many takes.

        While the device is busy with others' work that has no bound, since to wait keeps a processor busy:
        then a copy, even a small one, is a thread's.
        """
        if nbytes and _now() < self._busy_until_s:
            return sys.maxsize
        return nbytes * _SLOWDOWN

    def copy_now(self, target: int, source: int, nbytes: int) -> None:
        """Copy between the host and the device, and return when the copy is complete. Blocks.

        On a private stream: published bytes, and bytes on the host, depend on no other stream's work.
        """
        if not nbytes:
            return
        with self.driver.on(self.ordinal):
            if self._own is None:
                with self._lock:  # these copies run in several threads
                    if self._own is None:
                        self._own = self.driver.stream()
            began_s = _now()
            self.copy(target, source, nbytes, self._own)
            self.driver.finish(self._own)
            ended_s = _now()
            late = ended_s - began_s > _LATE_S + nbytes * _LATE_S_A_BYTE
            self._busy_until_s = ended_s + _BUSY_S if late else 0.0

    @contextmanager
    def at(self, order: StreamOrder) -> Iterator[None]:
        """Make torch enqueue the work of a block on this stream."""
        if self.device.type == "cpu" or self.driver.current_stream(self.ordinal) == order.raw:
            yield
            return
        stream = (
            torch.cuda.ExternalStream(order.raw, self.device)  # type: ignore[no-untyped-call]
            if order.raw
            else torch.cuda.default_stream(self.device)
        )
        with torch.cuda.stream(stream):
            yield

    def drop_storage(self) -> None:
        """Drop the reference to the slab's memory; live views keep it mapped."""
        self.storage = None
        self._views.clear()

    def close(self) -> None:
        """Destroy the private stream and drop the reference to the slab's memory."""
        self.drop_storage()
        if self._own is not None:
            with self.driver.on(self.ordinal):
                self.driver.end_stream(self._own)
            self._own = None
