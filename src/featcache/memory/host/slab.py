"""The host slab: one sparse memfd, filled by fallocate, emptied by punching holes.

The owner maps it read-write; readers get a descriptor opened read-only, whose mappings can't be
written. That guards against accidents, not against malice of the same user: a process that may open
another's descriptors through /proc can reopen it for writing. F_SEAL_FUTURE_WRITE would forbid that,
but it forbids punching holes as well.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from featcache.errors import (
    AttachRefused,
    BackendUnavailable,
    CacheClosed,
    SettingsError,
    explain,
    system_errors,
)
from featcache.memory import strided as copies
from featcache.memory.dense import NOT_MADE, lend
from featcache.memory.devices import CPU
from featcache.memory.host.available import available_bytes
from featcache.memory.host.pages import (
    PIECE_BYTES,
    POPULATE_READ,
    POPULATE_WRITE,
    Region,
    advise,
    advise_huge_pages,
    drop_pages,
    punch_hole,
)
from featcache.memory.pack import DTYPES, check_parts
from featcache.memory.slab import Parts, Segment, Word, uncopied
from featcache.memory.views import view_of
from featcache.memory.words import TSO, Block, fence_stores, memfd, store_words
from featcache.ref import TensorSpec

KIND: Final = "host"

_SPARE_BYTES: Final = 64 << 20
"""Bytes that a commit leaves to the process, or as many as it takes if these are fewer."""

_NEVER_HERE: Final = 1 << 62  # bytes: above any limit on copies in the event loop

Streams = Sequence[Any]
"""The caller's streams of the GPUs that a copy touches. Copies are complete on return all the same, but
they must come behind the caller's earlier work there, such as the kernel that computes a put's source."""
_memmove: Callable[[int, int, int], int] = ctypes.memmove  # drops the GIL, unlike a buffer's slice


@contextlib.contextmanager
def _on(streams: Streams) -> Iterator[None]:
    """Make torch use the caller's streams, in a thread whose current ones are others."""
    with contextlib.ExitStack() as stack:
        for stream in streams:
            stack.enter_context(torch.cuda.stream(stream))
        yield


class _Target(NamedTuple):
    """A writable mapping, which lives as long as its storage."""

    address: int
    storage: torch.UntypedStorage


class HostMapping:
    """A host slab as one process maps it. The last tensor over it unmaps it."""

    def __init__(self, mapping: mmap.mmap) -> None:
        address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        # One tuple: a copy in a thread keeps the mapping of its address while another thread closes.
        self._region: Region | None = (mapping, address)
        with warnings.catch_warnings():
            # torch warns once per process that the buffer is not writable, which is intended.
            warnings.simplefilter("ignore", UserWarning)
            whole = torch.frombuffer(mapping, dtype=torch.uint8)
        self._storage: torch.UntypedStorage | None = lend(whole.untyped_storage())
        self.end_bytes = whole.nbytes
        self._target: _Target | None = None
        self.home = CPU
        """The device of reads that name none: a GPU if this slab stands in for one there."""

    @classmethod
    def attach(cls, fd: int, capacity_bytes: int, committed_bytes: int) -> "HostMapping":
        """Map a peer's slab read-only, and take the page faults of the committed part now."""
        found_bytes = os.fstat(fd).st_size
        if found_bytes != capacity_bytes:
            raise AttachRefused(f"the slab has {found_bytes} bytes where {capacity_bytes} belong")
        mapping = mmap.mmap(fd, capacity_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        mapped = cls(mapping)
        region = mapped._open()
        advise_huge_pages(region, capacity_bytes)
        advise(region, POPULATE_READ, 0, committed_bytes)
        return mapped

    deferred = False
    device = CPU

    @property
    def zero_copy(self) -> bool:
        """Whether a borrow is a view; where reads go to a GPU it is a copy there."""
        return self.home is CPU

    def can_copy_to(self, device: torch.device | None) -> bool:
        return True

    def _do_nothing(self, *_: object) -> None:
        pass

    # `read` copies to every device; the owner's holes appear in every mapping; no copy is in progress
    # when its call has returned.
    enable_device = cut = finish = _do_nothing

    def order(self, device: torch.device | None = None) -> Streams:
        """Return the caller's stream of the GPU that a read copies to, if it is one."""
        device = device or self.home
        return () if device is CPU or device.type == "cpu" else (torch.cuda.current_stream(device),)

    def blocking_read_bytes(self, nbytes: int, device: torch.device | None) -> int:
        """Return the bytes: the CPU copies them. A copy to a GPU also waits for its stream."""
        return nbytes if (device or self.home).type == "cpu" else _NEVER_HERE

    def view(
        self, offset_bytes: int, spec: TensorSpec, device: torch.device | None = None
    ) -> torch.Tensor:
        """Return a tensor over the slab's bytes: host memory, whatever the device."""
        storage = self._storage
        if storage is None:
            raise CacheClosed("this mapping of the slab is closed")
        return view_of(storage, offset_bytes, spec, CPU)

    def empty(self, spec: TensorSpec, device: torch.device | None) -> torch.Tensor:
        try:
            return torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device or self.home)
        except RuntimeError as error:  # of torch, which has no other for host memory
            raise uncopied(spec.nbytes, error) from error

    def fetch(
        self, offset_bytes: int, spec: TensorSpec, device: torch.device | None, order: Streams
    ) -> torch.Tensor:
        out = self.empty(spec, device)
        self.read(offset_bytes, spec, out, order)
        return out

    def read(self, offset_bytes: int, spec: TensorSpec, out: torch.Tensor, order: Streams) -> None:
        """Copy the slab's bytes into `out`; complete on return."""
        if not (out.is_cpu and copies.is_plain(out)):
            try:
                with _on(order), copies.outside_modes():
                    copies.copy(out, self.view(offset_bytes, spec))
            except RuntimeError as error:  # of torch: no memory, or no working GPU
                raise uncopied(spec.nbytes, error) from error
            return
        region = self._open()  # a reference for the copy's time: `close` unmaps nothing under it
        nbytes, to = out.nbytes, out.data_ptr()
        if not to and nbytes:
            raise SettingsError(NOT_MADE)
        _memmove(to, region[1] + offset_bytes + spec.offset_bytes, nbytes)

    # --- writing ----------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        return self._target is not None

    def open_for_writing(self, fds: Sequence[int]) -> None:
        """Map the slab a second time, for writing; views are over the first, which stays read-only.

        The caller says what it means that the system refuses (`errors.system_errors`).
        """
        self._open()
        if self._target is not None:
            return
        if len(fds) != 1 or os.fstat(fds[0]).st_size != self.end_bytes:
            raise AttachRefused("a host slab is written by one descriptor, of the slab's size")
        mapping = mmap.mmap(fds[0], self.end_bytes, flags=mmap.MAP_SHARED)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        advise_huge_pages((mapping, whole.data_ptr()), self.end_bytes)
        self._target = _Target(whole.data_ptr(), whole.untyped_storage())

    def warm(self, end_bytes: int) -> None:
        """Take the page faults of writes to what is committed now; else they cost the puts."""
        region, target = self._region, self._target
        if region is None or target is None:
            return
        for start_bytes in range(0, min(end_bytes, self.end_bytes), PIECE_BYTES):
            if self._target is not target:  # closed meanwhile
                return
            piece_bytes = min(PIECE_BYTES, end_bytes - start_bytes)
            with contextlib.suppress(OSError):  # they are taken one by one then
                advise((region[0], target.address), POPULATE_READ, start_bytes, piece_bytes)

    def stage(self, parts: Parts) -> tuple[Parts, Streams]:
        """Return the parts, and the caller's streams of the GPUs that they are on."""
        for _, tensor in parts:
            if not tensor.is_cpu:
                break
        else:
            return parts, ()
        devices = {tensor.device for _, tensor in parts if tensor.is_cuda}
        return parts, [torch.cuda.current_stream(device) for device in devices]

    def blocking_write_bytes(self, parts: Parts) -> int:
        """Return the bytes: the CPU copies them. A copy from a GPU also waits for its stream."""
        total_bytes = 0
        for _, tensor in parts:
            total_bytes += tensor.nbytes if tensor.is_cpu else _NEVER_HERE
        return total_bytes

    def write(
        self, offset_bytes: int, parts: Parts, order: Streams, word: Word | None = None
    ) -> None:
        """Copy tensors in, then store the word; complete on return."""
        target = self._target  # a reference for the length of the copies, as in `read`
        if target is None:
            self._open()
            raise BackendUnavailable("this mapping of the slab was not opened for writing")
        if word is None:
            check_parts(parts)  # a wait lies between their `stage` and this
        base = target.address
        for spec, tensor in parts:
            plain = tensor.is_cpu and tensor.is_contiguous()  # `is_plain`, inline
            if plain and not (tensor.is_neg() or tensor.is_conj()):
                at = base + offset_bytes + spec.offset_bytes
                _memmove(at, tensor.data_ptr(), tensor.nbytes)
            else:
                try:
                    with _on(order), copies.outside_modes():
                        copies.copy(view_of(target.storage, offset_bytes, spec, CPU), tensor)
                except RuntimeError as error:
                    raise uncopied(spec.nbytes, error) from error
        if word is not None:
            self.signal(*word, order)

    # --- words ------------------------------------------------------------------------------------

    def adopt(self, block: Block, words: memoryview) -> memoryview:
        return words

    def signal(self, words: memoryview, index: int, value: int, order: Streams) -> None:
        """Store the word now: host copies are complete when they return."""
        if not TSO:  # hot path: skip the call
            fence_stores()  # bytes before the word that vouches for them
        words[index] = value

    def signal_many(
        self, words: memoryview, values: Sequence[tuple[int, int]], order: Streams
    ) -> None:
        """Store the words now, behind one fence."""
        store_words(words, values)

    def follow(self, order: Streams, others: Sequence[Streams]) -> Streams:
        """Return the order: the CPU has only one."""
        return order

    def can_follow(self, order: Streams) -> bool:
        return False

    def extend(self, start_bytes: int, size_bytes: int, fd: int) -> None:
        """Refuse: a host slab is one descriptor."""
        raise AttachRefused("the owner sent segments of a host slab, which has none")

    def forget(self) -> None:
        """Drop the mappings in a forked child, which has none of their pages yet."""
        self._region = self._storage = self._target = None

    def close(self) -> None:
        """Drop the mappings. Takes the time that their pages take; a view finds its bytes still."""
        region, target = self._region, self._target
        self.forget()  # first: `warm` ends with its piece
        if region is not None:
            # Before the unmap, which would hold the lock of the address space for all pages at once.
            for address in {region[1], target.address if target else region[1]}:
                with contextlib.suppress(OSError):
                    drop_pages((region[0], address), self.end_bytes)

    def _open(self) -> Region:
        if self._region is None:
            raise CacheClosed("this mapping of the slab is closed")
        return self._region


class HostSlab(HostMapping):
    """The owner's side: the memfd and the memory behind it."""

    def __init__(self, capacity_bytes: int, *, huge_pages: bool = True) -> None:
        self.capacity_bytes = capacity_bytes
        self._fd = self._reader_fd = -1
        try:
            with system_errors(BackendUnavailable, f"no host slab of {capacity_bytes} bytes"):
                self._make(huge_pages=huge_pages)
        except BaseException:
            self.forget()
            raise

    def _make(self, *, huge_pages: bool) -> None:
        self._fd = memfd("slab", self.capacity_bytes)
        # Sealed before a writer can get this descriptor: a file truncated under the owner's mapping
        # would be a SIGBUS there.
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
        try:
            self._reader_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise BackendUnavailable("a host slab needs /proc to be mounted") from error
        super().__init__(mmap.mmap(self._fd, self.capacity_bytes, flags=mmap.MAP_SHARED))
        assert self._storage is not None, "a new mapping is open"
        self._target = _Target(self._open()[1], self._storage)
        if huge_pages:
            advise_huge_pages(self._open(), self.capacity_bytes)

    kind, ordinal = KIND, -1
    device_name = "cpu"
    """A GPU's UUID if this slab stands in for one on that GPU."""
    handle = b""
    granularity_bytes = mmap.PAGESIZE
    quick_commit_bytes = 2 << 20

    def commit(self, start_bytes: int, stop_bytes: int, *, prefault: bool) -> None:
        """Reserve pages for a range, and map them into the owner if `prefault`."""
        size_bytes = stop_bytes - start_bytes
        left_bytes, spare_bytes = available_bytes(), min(size_bytes, _SPARE_BYTES)
        # Checked first: a kernel that overcommits does not refuse, it kills. And not to the last byte:
        # the tensors that are put and read lie under the same limit.
        if left_bytes is not None and size_bytes + spare_bytes > left_bytes:
            raise MemoryError(
                f"{size_bytes} bytes, where the host has {left_bytes} left, of which {spare_bytes} are "
                "kept for this process's own tensors: raise the memory limit or ask for less"
            )
        try:
            # Populate first: touched pages may be huge ones, fallocate reserves small ones.
            if prefault and advise(self._open(), POPULATE_WRITE, start_bytes, size_bytes):
                return
            os.posix_fallocate(self._fd, start_bytes, size_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.decommit(start_bytes, stop_bytes)
            raise MemoryError(f"the host gave no {size_bytes} bytes: {explain(error)}") from error

    def decommit(self, start_bytes: int, stop_bytes: int) -> None:
        """Punch a hole: the system has the pages back at once, whoever maps them."""
        punch_hole(self._fd, start_bytes, stop_bytes)

    def segments(self, start_bytes: int, stop_bytes: int) -> list[Segment]:
        return []  # one descriptor covers the whole range

    def descriptors(self) -> list[int]:
        return [self._reader_fd]

    def write_descriptors(self) -> list[int]:
        return [self._fd]

    def forget(self) -> None:
        super().forget()
        for fd in (self._fd, self._reader_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._reader_fd = -1
