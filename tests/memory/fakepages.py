"""What the memory of a GPU that is not there is made of: pages of this host.

A memfd, whose name tells the device and the size. So it travels between processes by descriptor, is
mapped where the fake says, and whether any of it is left can be asked of the kernel.
"""

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

GRANULARITY_BYTES = 64 << 10
"""2 MiB on a real device."""
_NAME = re.compile(r"/memfd:fakecuda-(\d+)-(\d+)( \(deleted\))?")
_MAP_FIXED, _PROT_NONE, _MAP_NORESERVE = 0x10, 0, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Code(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_PEER_ACCESS_UNSUPPORTED = 217
    CUDA_ERROR_OPERATING_SYSTEM = 304
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713
    CUDA_ERROR_NOT_PERMITTED = 800
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_UNKNOWN = 999


class Refused(Exception):
    """A call fails as the driver's would."""

    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


class Broken(AssertionError):
    """What the real driver would do here is not defined: the caller broke a rule."""


def refuse_unless(holds: object, code: Code = Code.CUDA_ERROR_INVALID_VALUE) -> None:
    if not holds:
        raise Refused(code)


def _mmap(address: int | None, size: int, prot: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, size, prot, flags, fd, 0)
    assert found not in {None, ctypes.c_void_p(-1).value}, os.strerror(ctypes.get_errno())
    return int(found)


def put_nothing(address: int | None, size: int) -> int:
    """Have addresses, these or new ones, that nobody can access."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return _mmap(address, size, _PROT_NONE, flags | (0 if address is None else _MAP_FIXED), -1)


def put(address: int | None, size: int, fd: int, *, accessible: bool) -> int:
    """Have a memory at addresses, these or new ones."""
    prot = mmap.PROT_READ | mmap.PROT_WRITE if accessible else _PROT_NONE
    return _mmap(address, size, prot, mmap.MAP_SHARED | (0 if address is None else _MAP_FIXED), fd)


def let(address: int, size: int, *, write: bool) -> None:
    """Make addresses accessible."""
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    assert _libc.mprotect(address, size, prot) == 0, os.strerror(ctypes.get_errno())


def take(address: int, size: int) -> None:
    """Give addresses back."""
    _libc.munmap(address, size)


def new_memory(device: int, size: int) -> int:
    """Return a descriptor of new memory of a device."""
    fd = os.memfd_create(f"fakecuda-{device}-{size}", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def described(fd: int) -> tuple[int, int]:
    """Return the device and the bytes of the memory behind a descriptor."""
    try:
        name = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - a memfd is no path
    except OSError as error:
        raise Refused(Code.CUDA_ERROR_INVALID_VALUE) from error
    found = _NAME.fullmatch(name)
    if found is None:
        raise Refused(Code.CUDA_ERROR_INVALID_VALUE)
    return int(found[1]), int(found[2])


def descriptors() -> dict[int, str]:
    """Return this process's descriptors of device memory, and which memory each is of."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names, not the links' targets
        try:
            name = os.readlink(f"/proc/self/fd/{entry}")  # noqa: PTH115 - a memfd is no path
            if _NAME.fullmatch(name):
                found[int(entry)] = f"{name} {os.fstat(int(entry)).st_ino}"
        except OSError:  # the descriptor of this very listing
            continue
    return found


def _mappings() -> Iterator[tuple[int, int, str, str]]:
    """Yield from where to where this process has what mapped with which access."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, access, _offset, _device, inode, *name = line.split(maxsplit=5)
        start, stop = (int(part, 16) for part in where.split("-"))
        yield start, stop, access, f"{name[0]} {inode}" if name else ""


def bytes_alive() -> int:
    """Return how much device memory has a descriptor or a mapping in this process."""
    memories = {*descriptors().values(), *(what for *_, what in _mappings())}
    found = [_NAME.match(memory) for memory in memories]
    return sum(int(memory[2]) for memory in found if memory)


def pages_are(address: int, size: int, wanted: str) -> bool:
    """Whether there are pages with this access all over a range."""
    at = address
    for start, stop, access, _ in _mappings():
        if start <= at < stop and access.startswith(wanted):
            at = stop
    return at >= address + size
