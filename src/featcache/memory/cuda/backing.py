"""The memory behind a CUDA slab's addresses: segments mapped side by side, or one legacy allocation.

A backing outlives its `close` while tensors over it are alive: the last of them takes it down. In a
forked child, where CUDA calls fail, nothing is taken down.
"""

import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Final, NamedTuple

import torch

from featcache.errors import AttachRefused, BackendUnavailable, CacheClosed
from featcache.memory.cuda.driver import Driver, DriverError
from featcache.memory.dlpack import storage_over
from featcache.memory.slab import Unreachable

VMM: Final = "cuda-vmm"
IPC: Final = "cuda-ipc"
_NO_PEER_ACCESS: Final = 217


class _Mapped(NamedTuple):
    """One piece of device memory in the range."""

    start_bytes: int
    size_bytes: int
    handle: Any
    fd: int
    """In the owner the descriptor by which other processes map it; elsewhere -1."""


class Backing(ABC):
    """Memory that devices of this process can access at an address of their own.

    It counts the live storages; once closed, it is taken down when the last of them is gone.
    """

    def __init__(self, driver: Driver, ordinal: int, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._driver = driver
        self._ordinal = ordinal
        self._pid = os.getpid()
        self._lock = threading.RLock()  # the collector may drop a tensor while this thread holds it
        self._storages = 0
        self._closed = False
        self._changing = threading.Lock()
        """Held while mappings or access rights change: several threads do both."""

    @property
    @abstractmethod
    def end_bytes(self) -> int:
        """Bytes from the start that have memory behind them."""

    @abstractmethod
    def enable_device(self, ordinal: int) -> int:
        """Give a device access; return the address at which it has it. May block.

        Raises:
            Unreachable: the driver refuses.

        """

    @abstractmethod
    def open_for_writing(self) -> int:
        """Return the address at which the first device may write it. May block."""

    @abstractmethod
    def _ordinals(self) -> list[int]:
        """Return the devices that can access it."""

    @abstractmethod
    def _take_down(self) -> None:
        """Undo the steps that are not undone yet."""

    def storage(self, address: int, device: torch.device) -> torch.UntypedStorage:
        """Return a storage over the whole range. The backing stays up while it lives."""
        with self._lock:
            self._storages += 1
        return storage_over(address, self.capacity_bytes, device, self._on_gone)

    def close(self) -> None:
        """Take it down once no tensor is over it. No work on it may be in progress. May block.

        A step that the driver refused is tried again by the next call.
        """
        if os.getpid() != self._pid:
            return
        # Closed before the count is read: of this call and the last storage's `_on_gone` at least one
        # then sees both "closed" and "none left", and `_take_down` is idempotent if both do.
        with self._lock:
            self._closed = True
            storages = self._storages
        with self._changing:
            self.drop_descriptors()
        if not storages:
            self._end()

    def drop_descriptors(self) -> None:  # noqa: B027 - a backing may have none
        """Close the descriptors and nothing else, which works in a forked child too."""

    def _on_gone(self) -> None:
        if os.getpid() != self._pid:  # a forked child: the lock's holder may not exist here
            return
        with self._lock:
            self._storages -= 1
            if self._storages or not self._closed:
                return
        # The last read may still run, and the thread that dropped a tensor must not wait for it.
        try:
            threading.Thread(target=self._end_late, name="featcache-unmap", daemon=True).start()
        except (RuntimeError, MemoryError):
            self._end_here()

    def _end_here(self) -> None:
        """End it in this thread, since no other can be started.

        Not while the interpreter shuts down: the mapping ends with the process. Nor if the collector
        dropped the tensor in the middle of a change, whose lock this very thread may hold.
        """
        if not sys.is_finalizing() and self._changing.acquire(blocking=False):
            self._changing.release()
            self._end_late()

    def _end_late(self) -> None:
        with suppress(DriverError):  # a broken context: there is nothing left to take down
            # Synchronise before the unmap: work in flight on unmapped addresses kills the context.
            for ordinal in self._ordinals():
                self._driver.synchronize(ordinal)
            self._end()

    def _end(self) -> None:
        with self._changing:
            self._take_down()

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosed("this mapping of the slab is closed")


class SegmentBacking(Backing):
    """A reserved range of addresses, the same for every device, filled from its start (VMM)."""

    def __init__(
        self, driver: Driver, ordinal: int, capacity_bytes: int, *, write: bool = False
    ) -> None:
        super().__init__(driver, ordinal, capacity_bytes)
        self._write = write
        self._devices = [ordinal]
        self.segments: list[_Mapped] = []
        self._unreleased: list[Any] = []
        """Handles of unmapped memory that the driver has not released yet."""
        with driver.on(ordinal):
            self._address = driver.reserve(capacity_bytes)
        self._write_alias = 0
        """A second range over the same memory, mapped for writing; 0 if there is none."""
        self._unaliased: list[_Mapped] = []
        """Segments unmapped from the alias whose unmap in the first range the driver refused."""

    @property
    def end_bytes(self) -> int:
        last = self.segments[-1:]
        return last[0].start_bytes + last[0].size_bytes if last else 0

    def enable_device(self, ordinal: int) -> int:
        with self._changing:
            self._check_open()
            if ordinal not in self._devices:
                devices = [*self._devices, ordinal]
                with self._driver.on(ordinal):
                    for segment in self.segments:
                        self._allow(segment.start_bytes, segment.size_bytes, devices)
                self._devices = devices
            return self._address

    def open_for_writing(self) -> int:
        # In a reader a second range: the first stays read-only, so that no kernel can write through a
        # borrowed view.
        with self._changing, self._driver.on(self._ordinal), ExitStack() as undo:
            self._check_open()
            if self._write:
                return self._address
            if not self._write_alias:
                alias = self._driver.reserve(self.capacity_bytes)
                undo.callback(self._driver.unreserve, alias, self.capacity_bytes)
                for segment in self.segments:
                    self._map_alias(alias, segment.start_bytes, segment.size_bytes, segment.handle)
                    undo.callback(self._unmap_alias, alias, segment)
                # Only when all of it is mapped: from now on `_map` and `_take_away` keep it in step.
                self._write_alias = alias
                undo.pop_all()
            return self._write_alias

    def _map_alias(self, alias: int, start_bytes: int, size_bytes: int, handle: Any) -> None:
        driver, address = self._driver, alias + start_bytes
        driver.map(address, size_bytes, handle)
        try:
            driver.allow(address, size_bytes, [self._ordinal], write=True)
        except BaseException:
            driver.unmap(address, size_bytes)
            raise

    def _unmap_alias(self, alias: int, segment: _Mapped) -> None:
        self._driver.unmap(alias + segment.start_bytes, segment.size_bytes)

    def make(self, start_bytes: int, size_bytes: int) -> None:
        """Append a segment of new memory, with a descriptor for readers."""
        driver = self._driver
        with self._changing, driver.on(self._ordinal), ExitStack() as undo:
            self._check_open()
            handle = driver.create(self._ordinal, size_bytes)
            undo.callback(self._release, handle)
            fd = driver.export(handle)
            undo.callback(os.close, fd)
            self._map(start_bytes, size_bytes, handle, fd)
            undo.pop_all()

    def adopt(self, start_bytes: int, size_bytes: int, fd: int) -> None:
        """Append an owner's segment; the descriptor stays the caller's."""
        driver = self._driver
        if start_bytes != self.end_bytes or start_bytes + size_bytes > self.capacity_bytes:
            raise AttachRefused("the owner sent a segment that does not follow those before it")
        with self._changing, driver.on(self._ordinal), ExitStack() as undo:
            self._check_open()
            handle = driver.import_(fd)
            undo.callback(self._release, handle)
            self._map(start_bytes, size_bytes, handle, -1)
            undo.pop_all()

    def _map(self, start_bytes: int, size_bytes: int, handle: Any, fd: int) -> None:
        driver, address = self._driver, self._address + start_bytes
        driver.map(address, size_bytes, handle)
        try:
            self._allow(start_bytes, size_bytes, self._devices)
            if self._write_alias:
                self._map_alias(self._write_alias, start_bytes, size_bytes, handle)
        except BaseException:
            driver.unmap(address, size_bytes)
            raise
        # Last: a segment in the list has memory, access rights and its alias.
        self.segments.append(_Mapped(start_bytes, size_bytes, handle, fd))

    def _allow(self, start_bytes: int, size_bytes: int, devices: list[int]) -> None:
        address = self._address + start_bytes
        try:
            self._driver.allow(address, size_bytes, devices, write=self._write)
        except DriverError as error:
            if self._write:
                raise
            raise Unreachable(str(error)) from error

    def cut(self, end_bytes: int) -> None:
        """Unmap the segments from `end_bytes` on; no work on them may be in progress."""
        with self._changing, self._driver.on(self._ordinal):
            self._cut(end_bytes)

    def _cut(self, end_bytes: int) -> None:
        # From the last to the first; a failure does not stop the rest.
        with ExitStack() as each:
            for segment in self.segments:
                if segment.start_bytes >= end_bytes:
                    each.callback(self._take_away, segment)

    def _take_away(self, segment: _Mapped) -> None:
        # Ordered so that a refused step is tried again by the next call and none is done twice: the
        # alias, which is noted; the mapping; then the list, the descriptor and the handle.
        if self._write_alias and segment not in self._unaliased:
            self._unmap_alias(self._write_alias, segment)
            self._unaliased.append(segment)
        self._driver.unmap(self._address + segment.start_bytes, segment.size_bytes)
        self.segments.remove(segment)
        if segment in self._unaliased:
            self._unaliased.remove(segment)
        if segment.fd >= 0:
            os.close(segment.fd)
        self._release(segment.handle)

    def _release(self, *handles: Any) -> None:
        self._unreleased.extend(handles)
        while self._unreleased:
            self._driver.release(self._unreleased[-1])  # if refused it stays, for the next call
            self._unreleased.pop()

    def _ordinals(self) -> list[int]:
        return self._devices

    def _take_down(self) -> None:
        if not self._address:
            return
        with self._driver.on(self._ordinal):
            with ExitStack() as each:  # runs in reverse: unmap, then handles left from before
                each.callback(self._release)
                each.callback(self._cut, 0)
            # The ranges come last: the driver frees no range that still has memory mapped.
            if self._write_alias:
                self._driver.unreserve(self._write_alias, self.capacity_bytes)
                self._write_alias = 0
            self._driver.unreserve(self._address, self.capacity_bytes)
            self._address = 0

    def drop_descriptors(self) -> None:
        segments = self.segments
        self.segments = [segment._replace(fd=-1) for segment in segments]
        for segment in segments:
            if segment.fd >= 0:
                os.close(segment.fd)


class IpcBacking(Backing):
    """One allocation of a fixed size, opened by readers with a handle of 64 bytes (legacy IPC)."""

    def __init__(
        self, driver: Driver, ordinal: int, capacity_bytes: int, *, handle: bytes | None = None
    ) -> None:
        """Allocate, or with a `handle` open another process's allocation."""
        super().__init__(driver, ordinal, capacity_bytes)
        self._open: dict[int, int] = {}
        self._undo: list[tuple[int, Callable[[int], None], int]] = []
        self._theirs = handle
        if handle is not None:
            self.handle = handle
            self.enable_device(ordinal)
            return
        with driver.on(ordinal):
            address = driver.allocate(capacity_bytes)
            try:
                self.handle = driver.ipc_export(address)
            except BaseException:
                driver.free(address)
                raise
        self._open[ordinal] = address
        self._undo.append((ordinal, driver.free, address))
        driver.own_allocations[self.handle] = (ordinal, address)

    @property
    def end_bytes(self) -> int:
        return self.capacity_bytes

    def enable_device(self, ordinal: int) -> int:
        with self._changing:
            self._check_open()
            address = self._open.get(ordinal)
            return self._open_theirs(ordinal) if address is None else address

    def open_for_writing(self) -> int:
        return self.enable_device(self._ordinal)  # a legacy handle always opens for writing

    def _open_theirs(self, ordinal: int) -> int:
        if self._theirs is None:
            raise Unreachable("the owner's other devices don't open its own legacy allocation")
        own = self._driver.own_allocations.get(self._theirs)
        if own is not None and own[0] == ordinal:
            # A process can't open its own handle; its address is at hand.
            self._open[ordinal] = own[1]
            return own[1]
        with self._driver.on(ordinal):
            try:
                address = self._driver.ipc_open(self._theirs)
            except DriverError as error:
                kind = Unreachable if error.code == _NO_PEER_ACCESS else BackendUnavailable
                why = f"the owner's legacy IPC handle can't be opened here: {error}"
                raise kind(why) from error
        self._open[ordinal] = address
        self._undo.append((ordinal, self._driver.ipc_close, address))
        return address

    def _take_down(self) -> None:
        if self._theirs is None:
            self._driver.own_allocations.pop(self.handle, None)
        with ExitStack() as each:
            for step in self._undo:
                each.callback(self._undo_one, step)

    def _undo_one(self, step: tuple[int, Callable[[int], None], int]) -> None:
        ordinal, undo, address = step
        with self._driver.on(ordinal):
            undo(address)
        self._undo.remove(step)

    def _ordinals(self) -> list[int]:
        return list(self._open)
