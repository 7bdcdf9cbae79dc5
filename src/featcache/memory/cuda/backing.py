"""What is behind a CUDA slab's addresses: segments mapped side by side, or one legacy allocation.

A backing outlives its `close` while tensors over it are alive: the last of them takes it down. In a
forked child, whose CUDA calls would fail, nothing is taken down.
"""

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Final, NamedTuple, Protocol

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
    """The descriptor that other processes map it by, in its owner; elsewhere -1."""


class Backing(Protocol):
    """Memory that devices of this process can access at an address of their own."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the range."""

    @property
    def end_bytes(self) -> int:
        """Bytes from the start that have memory behind them."""

    def enable_device(self, ordinal: int) -> int:
        """Let a device access it; return the address at which it does. May block."""

    def open_for_writing(self) -> int:
        """Return the address at which the first device may write it. May block."""

    def storage(self, address: int, device: torch.device) -> torch.UntypedStorage:
        """Return a storage over the whole range. It keeps the backing up."""

    def close(self) -> None:
        """Take it down, once no tensor is over it. No work on it may be under way. May block."""


class _RefCounted:
    """Counts the storages that are out, and takes down what was closed when the last is gone."""

    def __init__(self, driver: Driver, ordinal: int, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._driver = driver
        self._ordinal = ordinal
        self._pid = os.getpid()
        self._lock = threading.RLock()  # the collector may drop a tensor while this thread has it
        self._lent = 0
        self._closed = False
        self._changing = threading.Lock()
        """Held while what is mapped changes, and who may access it: both are done in threads."""

    def storage(self, address: int, device: torch.device) -> torch.UntypedStorage:
        with self._lock:
            self._lent += 1
        return storage_over(address, self.capacity_bytes, device, self._on_gone)

    def close(self) -> None:
        """As `Backing.close`. If the driver refuses a step, another call tries that one again."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            lent = self._lent
        with self._changing:
            self.drop_descriptors()
        if not lent:
            self._end()

    def drop_descriptors(self) -> None:
        """Close what descriptors there are, and nothing else: in a forked child too."""

    def _on_gone(self) -> None:
        if os.getpid() != self._pid:  # in a forked child, where nobody may have left the lock
            return
        with self._lock:
            self._lent -= 1
            if self._lent or not self._closed:
                return
        # What read it last may still run, and to wait for that is not for whoever dropped a tensor.
        with suppress(RuntimeError):  # too late for threads: the process ends, and all this with it
            threading.Thread(target=self._end_late, name="featcache-unmap", daemon=True).start()

    def _end_late(self) -> None:
        with suppress(DriverError):  # a broken context: there is nothing left to take down
            for ordinal in self._ordinals():
                self._driver.synchronize(ordinal)
            self._end()

    def _end(self) -> None:
        with self._changing:
            self._take_down()

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosed("this mapping of the slab is closed")

    def _ordinals(self) -> list[int]:
        """Return the devices that can access it."""
        raise NotImplementedError

    def _take_down(self) -> None:
        """Undo what is not undone yet."""
        raise NotImplementedError


class SegmentBacking(_RefCounted):
    """A reserved range of addresses, the same for every device, filled from its start (VMM)."""

    def __init__(
        self, driver: Driver, ordinal: int, capacity_bytes: int, *, write: bool = False
    ) -> None:
        super().__init__(driver, ordinal, capacity_bytes)
        self._write = write
        self._devices = [ordinal]
        self.segments: list[_Mapped] = []
        self._unreleased: list[Any] = []
        """Handles of memory that is not mapped any more, until the driver has let them go."""
        with driver.on(ordinal):
            self._address = driver.reserve(capacity_bytes)
        self._write_alias = 0
        """Where the same memory is mapped once more, for writing, if it is."""
        self._untwinned: list[_Mapped] = []
        """Segments that are not mapped there any more, while the driver would not unmap them here."""

    @property
    def end_bytes(self) -> int:
        if not self.segments:
            return 0
        return self.segments[-1].start_bytes + self.segments[-1].size_bytes

    def enable_device(self, ordinal: int) -> int:
        """As `Backing.enable_device`; raise Unreachable if the driver does not let it."""
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
        """As `Backing.open_for_writing`: where readers map it, a second range of addresses."""
        with self._changing, self._driver.on(self._ordinal), ExitStack() as undo:
            self._check_open()
            if self._write:
                return self._address
            if not self._write_alias:
                twin = self._driver.reserve(self.capacity_bytes)
                undo.callback(self._driver.unreserve, twin, self.capacity_bytes)
                for segment in self.segments:
                    self._map_twin(twin, segment.start_bytes, segment.size_bytes, segment.handle)
                    undo.callback(self._unmap_twin, twin, segment)
                self._write_alias = twin
                undo.pop_all()
            return self._write_alias

    def _map_twin(self, twin: int, start_bytes: int, size_bytes: int, handle: Any) -> None:
        driver, address = self._driver, twin + start_bytes
        driver.map(address, size_bytes, handle)
        try:
            driver.allow(address, size_bytes, [self._ordinal], write=True)
        except BaseException:
            driver.unmap(address, size_bytes)
            raise

    def _unmap_twin(self, twin: int, segment: _Mapped) -> None:
        self._driver.unmap(twin + segment.start_bytes, segment.size_bytes)

    def make(self, start_bytes: int, size_bytes: int) -> None:
        """Put new memory at the end of what there is, with a descriptor for readers."""
        driver = self._driver
        with self._changing, driver.on(self._ordinal), ExitStack() as undo:
            self._check_open()
            handle = driver.create(self._ordinal, size_bytes)
            undo.callback(self._let_go, handle)
            fd = driver.export(handle)
            undo.callback(os.close, fd)
            self._map(start_bytes, size_bytes, handle, fd)
            undo.pop_all()

    def adopt(self, start_bytes: int, size_bytes: int, fd: int) -> None:
        """Put an owner's memory there; the descriptor stays the caller's."""
        driver = self._driver
        if start_bytes != self.end_bytes or start_bytes + size_bytes > self.capacity_bytes:
            raise AttachRefused("the owner sent a segment that does not follow those before it")
        with self._changing, driver.on(self._ordinal), ExitStack() as undo:
            self._check_open()
            handle = driver.import_(fd)
            undo.callback(self._let_go, handle)
            self._map(start_bytes, size_bytes, handle, -1)
            undo.pop_all()

    def _map(self, start_bytes: int, size_bytes: int, handle: Any, fd: int) -> None:
        driver, address = self._driver, self._address + start_bytes
        driver.map(address, size_bytes, handle)
        try:
            self._allow(start_bytes, size_bytes, self._devices)
            if self._write_alias:
                self._map_twin(self._write_alias, start_bytes, size_bytes, handle)
        except BaseException:
            driver.unmap(address, size_bytes)
            raise
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
        """Take away the segments from `end_bytes` on; nothing may be using them."""
        with self._changing, self._driver.on(self._ordinal):
            self._cut(end_bytes)

    def _cut(self, end_bytes: int) -> None:
        with ExitStack() as each:  # from the last to the first; one that fails does not keep others
            for segment in self.segments:
                if segment.start_bytes >= end_bytes:
                    each.callback(self._take_away, segment)

    def _take_away(self, segment: _Mapped) -> None:
        if self._write_alias and segment not in self._untwinned:
            self._unmap_twin(self._write_alias, segment)
            self._untwinned.append(segment)
        self._driver.unmap(self._address + segment.start_bytes, segment.size_bytes)
        self.segments.remove(segment)
        if segment in self._untwinned:
            self._untwinned.remove(segment)
        if segment.fd >= 0:
            os.close(segment.fd)
        self._let_go(segment.handle)

    def _let_go(self, *handles: Any) -> None:
        self._unreleased.extend(handles)
        while self._unreleased:
            self._driver.release(self._unreleased[-1])
            self._unreleased.pop()

    def _ordinals(self) -> list[int]:
        return self._devices

    def _take_down(self) -> None:
        if not self._address:
            return
        with self._driver.on(self._ordinal):
            with ExitStack() as each:
                each.callback(self._let_go)
                each.callback(self._cut, 0)
            if self._write_alias:
                self._driver.unreserve(self._write_alias, self.capacity_bytes)
                self._write_alias = 0
            self._driver.unreserve(self._address, self.capacity_bytes)
            self._address = 0

    def drop_descriptors(self) -> None:
        """As `_RefCounted.drop_descriptors`."""
        segments = self.segments
        self.segments = [segment._replace(fd=-1) for segment in segments]
        for segment in segments:
            if segment.fd >= 0:
                os.close(segment.fd)


class IpcBacking(_RefCounted):
    """One allocation of a fixed size, which readers open by a handle of 64 bytes (legacy IPC)."""

    def __init__(
        self, driver: Driver, ordinal: int, capacity_bytes: int, *, handle: bytes | None = None
    ) -> None:
        """Allocate, or with a `handle` open what another process allocated."""
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
        """As `Backing.enable_device`: each device opens the handle for itself."""
        with self._changing:
            self._check_open()
            address = self._open.get(ordinal)
            return self._open_theirs(ordinal) if address is None else address

    def open_for_writing(self) -> int:
        """As `Backing.open_for_writing`: what a legacy handle opens may be written."""
        return self.enable_device(self._ordinal)

    def _open_theirs(self, ordinal: int) -> int:
        if self._theirs is None:
            raise Unreachable("the owner's other devices don't open its own legacy allocation")
        own = self._driver.own_allocations.get(self._theirs)
        if (
            own is not None and own[0] == ordinal
        ):  # a process can't open its own handle, and need not
            self._open[ordinal] = own[1]
            return own[1]
        with self._driver.on(ordinal):
            try:
                address = self._driver.ipc_open(self._theirs)
            except DriverError as error:
                kind = Unreachable if error.code == _NO_PEER_ACCESS else BackendUnavailable
                raise kind(
                    f"the owner's legacy IPC handle can't be opened here: {error}"
                ) from error
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
