"""A lane: one device of this process, and how copies and control words go through its streams.

What a call does is enqueued on a stream and done later, in that stream's order. An `StreamOrder` is a place
in such an order: the stream that was torch's current one when the user called, whichever thread does
the work. None stands in its place where the CPU does the work itself, at once.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from featcache.errors import CacheClosed
from featcache.memory.cuda.driver import Driver
from featcache.memory.pack import DTYPES, contiguous_strides
from featcache.memory.views import view_over
from featcache.ref import TensorSpec

_MAX_VIEWS: Final = 4096
_MAX_ORDERS: Final = 256  # torch has 32 streams to a device and priority; others come and go


class StreamOrder:
    """A lane and one of its streams."""

    __slots__ = ("lane", "raw", "stream")

    def __init__(self, lane: "DeviceStreams", raw: int) -> None:
        self.lane = lane
        self.raw = raw
        self.stream = lane.driver.api.CUstream(raw)


class DeviceStreams:
    """One device: its context, its streams, and where the slab begins for it."""

    def __init__(self, driver: Driver, ordinal: int, device: torch.device) -> None:
        self.driver = driver
        self.ordinal = ordinal
        self.device = device
        self.address = 0
        """Where the slab begins, once this device can access it."""
        self.storage: torch.UntypedStorage | None = None
        self._orders: dict[int, StreamOrder] = {}
        self._views: dict[tuple[int, TensorSpec], torch.Tensor] = {}
        self._stream_now = driver.current_stream
        self._context = int(driver.context(ordinal))
        self._current = driver.api.cuCtxGetCurrent
        self._memcpy = driver.api.cuMemcpyAsync
        self._write = driver.api.cuStreamWriteValue64
        self._own: Any = None  # a stream for copies to and from the host, made when first needed
        self._lock = threading.Lock()

    def order(self) -> StreamOrder:
        """Return the caller's place: torch's current stream of this device."""
        raw = self._stream_now(self.ordinal)
        try:
            return self._orders[raw]
        except KeyError:
            if len(self._orders) >= _MAX_ORDERS:
                self._orders.clear()
            order = self._orders[raw] = StreamOrder(self, raw)
            return order

    def view(self, offset_bytes: int, spec: TensorSpec) -> torch.Tensor:
        """Return a tensor over the slab's bytes.

        Features of one shape come to lie at the same few places, and a tensor that lies there already
        is a third of the work of a new one: `.data` of it is another tensor over the same memory.
        """
        storage = self.storage
        if storage is None:
            raise CacheClosed("this mapping of the slab is closed")
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
        else:  # another device's turn, or a thread that never used CUDA
            with self.driver.on(self.ordinal):
                code = self._memcpy(target, source, nbytes, stream)[0]
        if code != 0:
            self.driver.fail("cuMemcpyAsync", code)

    def copy_and_signal(
        self, target: int, source: int, nbytes: int, word: tuple[Any, int, int], stream: Any
    ) -> None:
        """As `copy` and then `write_word`, of words at their `address`, at an index.

        Asking which context is current, and having the answer, takes a tenth of the two.
        """
        words, index, value = word
        current = self._current()[1]
        if current is None or int(current) != self._context:
            self.copy(target, source, nbytes, stream)
            self.write_word(words.address + 8 * index, value, stream)
            return
        code = self._memcpy(target, source, nbytes, stream)[0]
        if code != 0:
            self.driver.fail("cuMemcpyAsync", code)
        code = self._write(stream, words.address + 8 * index, value, 0)[0]
        if code != 0:
            self.driver.fail("cuStreamWriteValue64", code)

    def write_word(self, address: int, value: int, stream: Any) -> None:
        """Enqueue the store of a 64-bit word, seen by the host after all that was enqueued before."""
        current = self._current()[1]
        if current is not None and int(current) == self._context:
            code = self._write(stream, address, value, 0)[0]
        else:
            with self.driver.on(self.ordinal):
                code = self._write(stream, address, value, 0)[0]
        if code != 0:
            self.driver.fail("cuStreamWriteValue64", code)

    def copy_now(self, target: int, source: int, nbytes: int) -> None:
        """Copy between the host and the device, and return when it is done. Blocks.

        On a stream of the lane's own: bytes that are published, or on the host, wait for nobody.
        """
        if not nbytes:
            return
        with self.driver.on(self.ordinal):
            if self._own is None:
                with self._lock:  # these copies run in threads
                    if self._own is None:
                        self._own = self.driver.stream()
            self.copy(target, source, nbytes, self._own)
            self.driver.finish(self._own)

    @contextmanager
    def at(self, order: StreamOrder) -> Iterator[None]:
        """Have torch enqueue at this place what it is asked for in a block."""
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
        """Let go of the slab's memory; tensors that are out keep it."""
        self.storage = None
        self._views.clear()

    def close(self) -> None:
        """Let the lane's own stream go, and its hold on the slab's memory."""
        self.drop_storage()
        if self._own is not None:
            with self.driver.on(self.ordinal):
                self.driver.end_stream(self._own)
            self._own = None
