"""A slab on a GPU as one process maps it: copies and words in the order of torch's streams.

A read of published bytes is enqueued on the caller's stream, and the word that pays it behind it, so
nothing here waits for the GPU. A copy from or to host memory is complete when the call returns, on a
private stream: it may block, and belongs in a thread.
"""

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NoReturn

import numpy as np
import torch

from featcache.errors import AttachRefused, BackendUnavailable, CacheClosed, SettingsError
from featcache.memory import strided as copies
from featcache.memory.cuda.backing import Backing, SegmentBacking
from featcache.memory.cuda.driver import Driver
from featcache.memory.cuda.streams import DeviceStreams, StreamOrder, Words, signal_many
from featcache.memory.dense import NOT_MADE, dense, lend
from featcache.memory.pack import DTYPES, check_parts, contiguous_strides
from featcache.memory.slab import Parts, Unreachable, Word, torch_copies, uncopied
from featcache.memory.views import view_of
from featcache.memory.words import Block, fence_stores
from featcache.ref import TensorSpec


class CudaMapping:
    """A slab on a GPU, mapped for one device of this process or for several.

    The backing is the mapping's to close, also where it can't be made.
    """

    deferred = True
    zero_copy = True

    def __init__(self, driver: Driver, backing: Backing, ordinal: int) -> None:
        self._driver = driver
        self._backing = backing
        self._ordinal = ordinal
        self._by_ordinal: dict[int, DeviceStreams] = {}
        self._by_device: dict[torch.device, DeviceStreams] = {}
        """The same by torch.device with an index: reading a torch.device's parts is slow."""
        self._adopted: dict[int, tuple[memoryview, int]] = {}
        try:
            self._home = self._open_device(ordinal)
        except BaseException:
            backing.close()
            raise
        self.device = self._home.device
        self._target: tuple[int, torch.UntypedStorage] | None = None
        """The slab's start in a writable range of addresses, and a storage over that range."""

    @property
    def end_bytes(self) -> int:
        return self._backing.end_bytes

    # --- devices ----------------------------------------------------------------------------------

    def can_copy_to(self, device: torch.device | None) -> bool:
        """Whether `read` can copy to this device now, perhaps after `enable_device`."""
        return (
            device is None
            or device in self._by_device
            or device.type == "cpu"
            or self._ordinal_at(device) in self._by_ordinal
        )

    def enable_device(self, device: torch.device) -> None:
        """Map the slab for another device of this process, or raise Unreachable. May block."""
        ordinal = self._ordinal_at(device)
        if self._home.storage is None:
            raise CacheClosed("this mapping of the slab is closed")
        if ordinal not in self._by_ordinal:
            self._open_device(ordinal)

    def _open_device(self, ordinal: int) -> DeviceStreams:
        streams = DeviceStreams(self._driver, ordinal, self._driver.device(ordinal))
        streams.address = self._backing.enable_device(ordinal)
        streams.storage = lend(self._backing.storage(streams.address, streams.device))
        self._by_ordinal[ordinal] = streams
        if streams.device.type != "cpu":
            self._by_device[streams.device] = streams
        return streams

    def _ordinal_at(self, device: torch.device) -> int:
        return device.index if device.index is not None else torch.cuda.current_device()

    def _streams_on(self, ordinal: int) -> DeviceStreams:
        streams = self._by_ordinal.get(ordinal)
        if streams is None or streams.storage is None:
            if self._home.storage is None:
                raise CacheClosed("this mapping of the slab is closed")
            raise Unreachable(f"cuda:{ordinal} has not opened this slab: await a get there first")
        return streams

    # --- bytes ------------------------------------------------------------------------------------

    def order(self, device: torch.device | None = None) -> StreamOrder | None:
        """Return the caller's position on a device's stream; None for the CPU, which acts at once."""
        if device is None:
            return self._home.order()
        if device in self._by_device:
            streams = self._by_device[device]
            if streams.storage is not None:
                return streams.order()
        return None if device.type == "cpu" else self._streams_on(self._ordinal_at(device)).order()

    def blocking_read_bytes(self, nbytes: int, device: torch.device | None) -> int:
        if device is not None and device.type == "cpu":
            return self._home.blocking_bytes(nbytes)
        return 0

    def view(
        self, offset_bytes: int, spec: TensorSpec, device: torch.device | None = None
    ) -> torch.Tensor:
        streams = self._home if device is None else self._streams_on(self._ordinal_at(device))
        return streams.view(offset_bytes, spec)

    def empty(self, spec: TensorSpec, device: torch.device | None) -> torch.Tensor:
        device = self.device if device is None else device
        try:
            return torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device)
        except (
            RuntimeError
        ) as error:  # of torch: its OutOfMemoryError, or any other for host memory
            raise uncopied(spec.nbytes, error) from error

    def fetch(
        self,
        offset_bytes: int,
        spec: TensorSpec,
        device: torch.device | None,
        order: StreamOrder | None,
    ) -> torch.Tensor:
        """Return a new tensor with the slab's bytes; they are there at `order`, or now if it is None."""
        if order is None:
            out = self.empty(spec, device)
            self._read_to_host(offset_bytes, spec, out)
            return out
        streams = order.streams
        if streams.storage is None:
            raise CacheClosed("this mapping of the slab is closed")
        shape = spec.shape
        strides, dtype = contiguous_strides(shape), DTYPES[spec.dtype]
        try:  # with strides torch takes two thirds of the time of `empty`
            out = torch.empty_strided(shape, strides, dtype=dtype, device=streams.device)
        except RuntimeError as error:
            raise uncopied(spec.nbytes, error) from error
        if nbytes := out.nbytes:
            at = streams.address + offset_bytes + spec.offset_bytes
            streams.copy(out.data_ptr() or _not_made(), at, nbytes, order.stream)
        return out

    def read(
        self, offset_bytes: int, spec: TensorSpec, out: torch.Tensor, order: StreamOrder | None
    ) -> None:
        """Copy the slab's bytes into `out`: enqueued at `order`, or at once if that is None."""
        if order is None:
            self._read_to_host(offset_bytes, spec, out)
            return
        streams = order.streams
        if out.get_device() != streams.ordinal:
            raise SettingsError("the tensors of one get are all on one device")
        if streams.storage is None:
            raise CacheClosed("this mapping of the slab is closed")
        # copies.is_plain, inline
        if out.is_contiguous() and not (out.is_neg() or out.is_conj()):
            if nbytes := out.nbytes:
                at = streams.address + offset_bytes + spec.offset_bytes
                streams.copy(out.data_ptr() or _not_made(), at, nbytes, order.stream)
            return
        with streams.at(order), copies.outside_modes():
            copies.copy(out, self.view(offset_bytes, spec, streams.device))

    def _read_to_host(self, offset_bytes: int, spec: TensorSpec, out: torch.Tensor) -> None:
        if not out.is_cpu:
            raise SettingsError("the tensors of one get are all on one device")
        if self._home.storage is None:
            raise CacheClosed("this mapping of the slab is closed")
        with torch_copies(out.nbytes):
            target = out if copies.is_plain(out) else torch.empty(out.shape, dtype=out.dtype)
        at = self._home.address + offset_bytes + spec.offset_bytes
        if nbytes := target.nbytes:
            self._home.copy_now(target.data_ptr() or _not_made(), at, nbytes)
        if target is not out:
            copies.copy(out, target)

    # --- writing ----------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        return self._target is not None

    def open_for_writing(self, fds: Sequence[int]) -> None:
        """Map the slab a second time, for writing; views are over the first, which stays read-only."""
        if self._home.storage is None:
            raise CacheClosed("this mapping of the slab is closed")
        if fds:
            raise AttachRefused("the owner sent descriptors where a slab on a GPU has none")
        if self._target is None:
            address = self._backing.open_for_writing()
            self._target = (address, self._backing.storage(address, self.device))

    def warm(self, end_bytes: int) -> None:
        pass

    def stage(self, parts: Parts) -> tuple[Parts, StreamOrder | None]:
        """Return the parts, moved to this device if on another, and the caller's stream position.

        The order is None where no part is on a GPU: bytes on the host are there already.
        """
        ordinal, on_device = self._ordinal, False
        for _, tensor in parts:
            where = tensor.get_device()
            if where == ordinal:
                on_device = True
            elif where >= 0:
                # torch runs a copy between devices behind the current streams of both, and makes them
                # wait for it: the order below, this device's stream, stands behind the copy.
                device = self.device
                with torch_copies(sum(part.nbytes for _, part in parts)):
                    parts = [
                        (spec, dense(part).to(device) if part.get_device() >= 0 else part)
                        for spec, part in parts
                    ]
                on_device = True
                break
        return parts, self._home.order() if on_device else None

    def blocking_write_bytes(self, parts: Parts) -> int:
        total_bytes = 0
        for _, tensor in parts:
            if tensor.get_device() < 0:
                total_bytes += tensor.nbytes
        return self._home.blocking_bytes(total_bytes) if total_bytes else 0

    def write(
        self, offset_bytes: int, parts: Parts, order: StreamOrder | None, word: Word | None = None
    ) -> None:
        """As `Mapping.write`: from the GPU enqueued at `order`, from the host complete on return.

        The word of one bare tensor, the common feature, goes in one call with its copy.
        """
        streams, target = self._home, self._target
        if streams.storage is None or target is None:
            raise self._not_writable()
        if word is None:
            check_parts(parts)  # a wait lies between their `stage` and this
        for spec, tensor in parts:
            nbytes = tensor.nbytes
            if not nbytes:
                continue
            at = target[0] + offset_bytes + spec.offset_bytes
            where = tensor.get_device()
            if where != streams.ordinal or order is None:
                if where >= 0:
                    raise SettingsError("a part was not staged")
                plain = tensor if copies.is_plain(tensor) else _made_plain(tensor)
                streams.copy_now(at, plain.data_ptr(), nbytes)
            elif (  # not copies.is_plain, inline
                not tensor.is_contiguous()
                or tensor.is_neg()
                or (spec.dtype in copies.COMPLEX and tensor.is_conj())
            ):
                with streams.at(order), copies.outside_modes():
                    copies.copy(view_of(target[1], offset_bytes, spec, streams.device), tensor)
            elif word is None or spec.name is not None:
                streams.copy(at, tensor.data_ptr(), nbytes, order.stream)
            else:
                streams.copy_and_signal(at, tensor.data_ptr(), nbytes, word, order.stream)
                return
        if word is not None:  # last: it vouches for all the bytes before it
            self.signal(*word, order)

    def _not_writable(self) -> Exception:
        if self._home.storage is None:
            return CacheClosed("this mapping of the slab is closed")
        return BackendUnavailable("this mapping of the slab was not opened for writing")

    # --- words ------------------------------------------------------------------------------------

    def adopt(self, block: Block, words: memoryview) -> Words:
        """Register a block of control words with the driver; return `words` of it for `signal`."""
        base = _address_of(block.whole)
        if base not in self._adopted:
            with self._driver.on(self._ordinal):
                self._driver.register(base, block.whole.nbytes)
                try:
                    devices_base = self._driver.device_address(base)
                except BaseException:
                    self._driver.unregister(base)
                    raise
            self._adopted[base] = (block.whole, devices_base)
        return Words(words, self._adopted[base][1] + _address_of(words) - base)

    def signal(self, words: Words, index: int, value: int, order: StreamOrder | None) -> None:
        """Store a word behind all earlier work of `order`, or now if that is None."""
        if order is None:
            fence_stores()  # bytes before the word that vouches for them
            words.here[index] = value
            return
        order.streams.write_word(words.address + 8 * index, value, order.stream)

    signal_many = staticmethod(signal_many)

    def can_follow(self, order: StreamOrder | None) -> bool:
        return order is not None and order.lasts

    def follow(
        self, order: StreamOrder | None, others: Sequence[StreamOrder | None]
    ) -> StreamOrder | None:
        """Return an order behind them all, for a read that was used on several streams."""
        behind = [other for other in others if other is not None and other is not order]
        if not behind:
            return order
        last = order if order is not None else behind.pop()
        for other in behind:
            with self._driver.on(other.streams.ordinal):
                event = self._driver.mark(other.stream)
            try:
                with self._driver.on(last.streams.ordinal):  # stream 0 is this context's default
                    self._driver.follow(last.stream, event)
            finally:
                self._driver.drop(event)
        return last

    # --- size and end -----------------------------------------------------------------------------

    def extend(self, start_bytes: int, size_bytes: int, fd: int) -> None:
        if not isinstance(self._backing, SegmentBacking):
            raise AttachRefused("the owner sent a segment of a slab that has one fixed one")
        self._backing.adopt(start_bytes, size_bytes, fd)

    def cut(self, end_bytes: int) -> None:
        if isinstance(self._backing, SegmentBacking):
            self._backing.cut(end_bytes)

    def finish(self) -> None:
        for ordinal in list(self._by_ordinal):
            self._driver.synchronize(ordinal)

    def close(self) -> None:
        """Take the mapping down. No work on it may be in progress. May block. Idempotent.

        Live views keep the memory mapped. If the driver refuses a step the others are done all the
        same, and another `close` tries that one again.
        """
        # Run from the last to the first: words, then streams with their storages, and the backing when
        # nothing of this mapping is over it any more.
        with ExitStack() as each:
            each.callback(self._backing.close)
            self._target = None
            for streams in self._by_ordinal.values():
                each.callback(streams.close)
            for address in self._adopted:
                each.callback(self._disown, address)

    def _disown(self, address: int) -> None:
        with self._driver.on(self._ordinal):
            self._driver.unregister(address)
        del self._adopted[address]

    def forget(self) -> None:
        """In a forked child, drop what needs no CUDA call: those fail there."""
        self._adopted.clear()
        self._target = None
        for streams in self._by_ordinal.values():
            streams.drop_storage()
        if isinstance(self._backing, SegmentBacking):
            self._backing.drop_descriptors()


def _address_of(words: memoryview) -> int:
    if not words.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(words))
    return int(np.frombuffer(words, dtype=np.uint8).ctypes.data)


def _not_made() -> NoReturn:
    raise SettingsError(NOT_MADE)


def _made_plain(tensor: torch.Tensor) -> torch.Tensor:
    with torch_copies(tensor.nbytes):
        plain = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies.copy(plain, tensor)
    return plain
