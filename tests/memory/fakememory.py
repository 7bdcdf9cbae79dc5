"""What one process has of its GPUs' memory, and where, under the driver's rules."""

import itertools
import os
import struct
from dataclasses import dataclass, field
from typing import Any

from memory.fakepages import (
    GRANULARITY_BYTES,
    Broken,
    Code,
    Refused,
    bytes_alive,
    described,
    descriptors,
    let,
    new_memory,
    pages_are,
    put,
    put_nothing,
    refuse_unless,
    take,
)

_ALIAS = 1 << 56
"""Devices know registered host memory by another address than the host does, and refuse the host's."""


@dataclass
class _Handle:
    fd: int
    device: int
    size: int


@dataclass
class Region:
    """Addresses with memory behind them, and which ordinals may do what there."""

    kind: str
    start: int
    size: int
    device: int
    access: dict[int, bool] = field(default_factory=dict)
    """Whether an ordinal may write; who is not in it may not even read."""
    fd: int = -1
    opened: int = 0

    def overlaps(self, start: int, size: int) -> bool:
        return start < self.start + self.size and self.start < start + size


@dataclass
class _Registered:
    size: int
    flags: int


class FakeMemory:
    """What one process has of its devices' memory, and where."""

    READ_ONLY, DEVICEMAP = 8, 2

    def __init__(self, visible: tuple[int, ...], peers: bool, total_bytes: int) -> None:
        self.visible = visible
        """The machine's devices, by this process's ordinals."""
        self.peers = peers
        self.total_bytes = total_bytes
        self.handles: dict[int, _Handle] = {}
        self.reserved: dict[int, int] = {}
        self.regions: dict[int, Region] = {}
        self.registered: dict[int, _Registered] = {}
        self.exported: dict[int, str] = {}
        """Descriptors that are now the caller's, and which memory they are of."""
        self._numbers = itertools.count(0x7001)

    def own_descriptors(self) -> set[int]:
        of_handles = {handle.fd for handle in self.handles.values()}
        return of_handles | {region.fd for region in self.regions.values() if region.fd >= 0}

    def end(self) -> None:
        """Take all of it down."""
        for fd in self.own_descriptors():
            os.close(fd)
        for at, size in self.reserved.items():
            take(at, size)
        for region in self.regions.values():
            if region.kind in {"allocation", "opened"}:
                take(region.start, region.size)
        self.handles, self.reserved, self.regions, self.registered = {}, {}, {}, {}

    def lend(self, start: int, size: int, ordinal: int) -> None:
        """Take host memory for what torch has on a device."""
        self.regions[start] = Region("torch", start, size, ordinal, {ordinal: True})

    def can_copy_to(self, ordinal: int, device: int) -> bool:
        return self.peers or self.visible[ordinal] == device

    def _new(self, device: int, size: int) -> int:
        refuse_unless(bytes_alive() + size <= self.total_bytes, Code.CUDA_ERROR_OUT_OF_MEMORY)
        return new_memory(device, size)

    # --- segments -------------------------------------------------------------------------------

    def create(self, size: int, ordinal: int) -> int:
        refuse_unless(size > 0 and size % GRANULARITY_BYTES == 0)
        device = self.visible[ordinal]
        return self._handle(_Handle(self._new(device, size), device, size))

    def _handle(self, handle: _Handle) -> int:
        number = next(self._numbers)
        self.handles[number] = handle
        return number

    def export(self, number: int) -> int:
        refuse_unless(number in self.handles, Code.CUDA_ERROR_INVALID_HANDLE)
        fd = os.dup(self.handles[number].fd)
        self.exported[fd] = descriptors()[fd]
        return fd

    def import_(self, fd: int) -> int:
        device, size = described(fd)
        return self._handle(_Handle(os.dup(fd), device, size))

    def release(self, number: int) -> None:
        if number not in self.handles:
            raise Broken(f"handle {number:#x} is released, and is none")
        os.close(self.handles.pop(number).fd)

    def reserve(self, size: int) -> int:
        refuse_unless(size > 0 and size % GRANULARITY_BYTES == 0)
        address = put_nothing(None, size)
        self.reserved[address] = size
        return address

    def unreserve(self, address: int, size: int) -> None:
        refuse_unless(self.reserved.get(address) == size)
        refuse_unless(not self._within(address, size))
        del self.reserved[address]
        take(address, size)

    def _within(self, address: int, size: int) -> list[Region]:
        found = [region for region in self.regions.values() if region.overlaps(address, size)]
        return sorted(found, key=lambda region: region.start)

    def map(self, address: int, size: int, number: int) -> None:
        refuse_unless(number in self.handles)
        handle = self.handles[number]
        ranges = self.reserved.items()
        starts = [at for at, of in ranges if at <= address and address + size <= at + of]
        refuse_unless(starts and (address - starts[0]) % GRANULARITY_BYTES == 0)
        refuse_unless(0 < size <= handle.size and size % GRANULARITY_BYTES == 0)
        refuse_unless(not self._within(address, size))
        put(address, size, handle.fd, accessible=False)
        self.regions[address] = Region("mapping", address, size, handle.device)

    def _mapped(self, address: int, size: int) -> list[Region]:
        """Return the whole mappings of which a range consists."""
        found = self._within(address, size)
        refuse_unless(all(region.kind == "mapping" for region in found))
        refuse_unless(found and found[0].start == address)
        refuse_unless(sum(region.size for region in found) == size)
        return found

    def unmap(self, address: int, size: int) -> None:
        for region in self._mapped(address, size):
            put_nothing(region.start, region.size)
            del self.regions[region.start]

    def allow(self, address: int, size: int, ordinals: dict[int, bool]) -> None:
        regions = self._mapped(address, size)
        refuse_unless(all(0 <= ordinal < len(self.visible) for ordinal in ordinals))
        for region in regions:
            may = all(self.can_copy_to(ordinal, region.device) for ordinal in ordinals)
            refuse_unless(may, Code.CUDA_ERROR_PEER_ACCESS_UNSUPPORTED)
            region.access.update(ordinals)
            let(region.start, region.size, write=any(region.access.values()))

    # --- legacy allocations ---------------------------------------------------------------------

    def _put(self, region: Region) -> int:
        region.start = put(None, region.size, region.fd, accessible=True)
        self.regions[region.start] = region
        return region.start

    def allocate(self, size: int, ordinal: int) -> int:
        device = self.visible[ordinal]
        fd = self._new(device, size)
        return self._put(Region("allocation", 0, size, device, {ordinal: True}, fd))

    def _region(self, address: int, kind: str) -> Region:
        region = self.regions.get(address)
        if region is None or region.kind != kind:
            raise Refused(Code.CUDA_ERROR_INVALID_VALUE)
        return region

    def discard(self, address: int, kind: str) -> None:
        region = self._region(address, kind)
        region.opened -= 1
        if region.opened <= 0:
            del self.regions[address]
            take(address, region.size)
            os.close(region.fd)

    def name(self, address: int) -> bytes:
        fd = self._region(address, "allocation").fd
        where = struct.pack("<4Q", os.getpid(), id(self), fd, os.fstat(fd).st_ino)
        return where.ljust(64, b"\0")

    def open(self, name: bytes, ordinal: int) -> int:
        pid, process, number, inode = struct.unpack("<4Q", name[:32])
        # A process cannot open its own handle.
        refuse_unless((pid, process) != (os.getpid(), id(self)), Code.CUDA_ERROR_INVALID_CONTEXT)
        try:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(Code.CUDA_ERROR_INVALID_VALUE) from error
        for region in self.regions.values():
            if (region.kind, *region.access) == ("opened", ordinal) and os.path.sameopenfile(
                region.fd, fd
            ):
                os.close(fd)
                region.opened += 1
                return region.start
        try:
            refuse_unless(os.fstat(fd).st_ino == inode)
            device, size = described(fd)
            refuse_unless(
                self.can_copy_to(ordinal, device), Code.CUDA_ERROR_PEER_ACCESS_UNSUPPORTED
            )
        except Refused:
            os.close(fd)
            raise
        return self._put(Region("opened", 0, size, device, {ordinal: True}, fd, 1))

    # --- host memory ----------------------------------------------------------------------------

    def register(self, address: int, size: int, flags: int) -> None:
        clash = any(at < address + size and address < at + r.size for at, r in self._host())
        refuse_unless(not clash, Code.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)
        wanted = "r" if flags & self.READ_ONLY else "rw"
        refuse_unless(size > 0 and pages_are(address, size, wanted))
        self.registered[address] = _Registered(size, flags)

    def _host(self) -> list[tuple[int, _Registered]]:
        return list(self.registered.items())

    def unregister(self, address: int) -> None:
        known = address in self.registered
        refuse_unless(known, Code.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)
        del self.registered[address]

    def device_address(self, address: int) -> int:
        refuse_unless(address in self.registered)
        refuse_unless(self.registered[address].flags & self.DEVICEMAP)
        return address + _ALIAS

    # --- access ---------------------------------------------------------------------------------

    def is_device(self, address: int) -> bool:
        """Whether an address is a device's, or a page's that devices know: not pageable memory."""
        ranges = [*self.reserved.items(), *((r.start, r.size) for r in self.regions.values())]
        return address >= _ALIAS or any(at <= address < at + size for at, size in ranges)

    def reach(self, ordinal: int, address: int, nbytes: int, *, write: bool) -> int:
        """Return where the bytes really are; Broken unless a device may read or write them all."""
        what = f"device {ordinal} {'writes' if write else 'reads'} {nbytes} bytes at {address:#x}"
        if address >= _ALIAS:
            address -= _ALIAS
            for at, registered in self._host():
                if at <= address and address + nbytes <= at + registered.size:
                    if write and registered.flags & self.READ_ONLY:
                        raise Broken(f"{what}, registered for reading")
                    return address
            raise Broken(f"{what}, which is not registered")
        at = address
        for region in self._within(address, nbytes):
            if region.start > at:
                break
            if ordinal not in region.access or (write and not region.access[ordinal]):
                raise Broken(f"{what}, which it may not: {region}")
            at = region.start + region.size
        if at < address + nbytes:
            raise Broken(f"{what}, where nothing is mapped from {at:#x} on")
        return address


def leftovers(memory: FakeMemory) -> dict[str, Any]:
    """Return what of a process's memory is still open."""
    there = descriptors().items()
    return {
        "handles": memory.handles,
        "reservations": memory.reserved,
        "regions": [region for region in memory.regions.values() if region.kind != "torch"],
        "registrations": memory.registered,
        "descriptors": [name for fd, name in there if memory.exported.get(fd) == name],
    }
