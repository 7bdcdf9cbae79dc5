"""The pages of a host slab's mappings, filled and dropped without the GIL and in pieces.

By ctypes, which drops the GIL, as `mmap.madvise` does not: advice that fills 64 MiB from a thread would
stop the event loop for tens of milliseconds. In pieces, because the kernel holds the lock of the address
space for each, which an allocation in the loop needs.
"""

import ctypes
import errno
import mmap
import os
import time
from typing import Final

Region = tuple[mmap.mmap, int]
"""A mapping and its address. Work on the address refers to the mapping: `close` unmaps nothing under it."""

PIECE_BYTES: Final = 4 << 20  # 2 ms of page faults
POPULATE_READ: Final = 22  # Linux 5.14; Python does not name them
POPULATE_WRITE: Final = 23
_QUICK_S: Final = 100e-6  # of a piece in which there were few pages to drop
_PUNCH: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_libc.fallocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64


def advise(region: Region, advice: int, start_bytes: int, size_bytes: int) -> bool:
    """Give the kernel advice, and return whether it knows it: old kernels return EINVAL."""
    end_bytes = start_bytes + size_bytes
    while start_bytes < end_bytes:
        piece_bytes = min(PIECE_BYTES, end_bytes - start_bytes)
        if not _advise_piece(region[1] + start_bytes, piece_bytes, advice):
            return False
        start_bytes += piece_bytes
    return True


def drop_pages(region: Region, size_bytes: int) -> None:
    """Drop the pages of a mapping that is to be unmapped.

    A piece takes the time of the pages in it, and behind what was ever committed there are none: so
    pieces grow where they take no time. A slab of terabytes would else need millions of calls.
    """
    start_bytes, piece_bytes = 0, PIECE_BYTES
    while start_bytes < size_bytes:
        began_s = time.perf_counter()
        some_bytes = min(piece_bytes, size_bytes - start_bytes)
        if not _advise_piece(region[1] + start_bytes, some_bytes, mmap.MADV_DONTNEED):
            return
        quick = time.perf_counter() - began_s < _QUICK_S
        piece_bytes = 2 * piece_bytes if quick else PIECE_BYTES
        start_bytes += some_bytes


def advise_huge_pages(region: Region, size_bytes: int) -> None:
    """Advise huge pages, in one piece: it marks the range and fills nothing. Refused, it is not needed."""
    _libc.madvise(region[1], size_bytes, mmap.MADV_HUGEPAGE)


def _advise_piece(address: int, size_bytes: int, advice: int) -> bool:
    while _libc.madvise(address, size_bytes, advice):
        code = ctypes.get_errno()
        if code in {errno.EINVAL, errno.ENOSYS}:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def punch_hole(fd: int, start_bytes: int, stop_bytes: int) -> None:
    """Give a range of a file back to the system, whoever maps it."""
    while _libc.fallocate(fd, _PUNCH, start_bytes, stop_bytes - start_bytes) != 0:
        if (code := ctypes.get_errno()) != errno.EINTR:
            raise OSError(code, os.strerror(code))
