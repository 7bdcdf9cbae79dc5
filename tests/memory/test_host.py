"""The host slab: memory that comes and goes, and readers that can't write."""

import ctypes
import errno
import itertools
import mmap
import os
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from featcache.errors import AttachRefused, BackendUnavailable, CacheClosed
from featcache.memory.host import pages
from featcache.memory.host.slab import HostMapping, HostSlab
from featcache.memory.pack import pack
from featcache.ref import TensorSpec

KIB, MIB = 1 << 10, 1 << 20
CAPACITY = 1 << 20


@pytest.fixture
def slab() -> Iterator[HostSlab]:
    made = HostSlab(CAPACITY, huge_pages=False)
    yield made
    made.close()


def allocated(slab: HostSlab) -> int:
    (fd,) = slab.descriptors()
    return os.fstat(fd).st_blocks * 512


def write(slab: HostSlab, offset: int, value: torch.Tensor) -> TensorSpec:
    specs, parts, _ = pack(value, 1)
    slab.write(offset, parts, ())
    return specs[0]


def copied(mapping: HostMapping, offset: int, spec: TensorSpec) -> torch.Tensor:
    out = mapping.empty(spec, None)
    mapping.read(offset, spec, out, ())
    return out


@pytest.mark.parametrize("prefault", [True, False])
def test_memory_comes_and_goes(slab: HostSlab, prefault: bool) -> None:
    assert allocated(slab) == 0
    slab.commit(0, 256 * KIB, prefault=prefault)
    assert allocated(slab) == 256 * KIB
    slab.commit(256 * KIB, CAPACITY, prefault=prefault)
    assert allocated(slab) == CAPACITY
    slab.decommit(512 * KIB, CAPACITY)
    assert allocated(slab) == 512 * KIB
    slab.decommit(0, 512 * KIB)
    assert allocated(slab) == 0


def test_what_was_given_back_comes_again_as_zeros(slab: HostSlab) -> None:
    slab.commit(0, CAPACITY, prefault=False)
    kept = write(slab, 0, torch.full((4096,), 5, dtype=torch.uint8))
    spec = write(slab, 4096, torch.full((8192,), 7, dtype=torch.uint8))
    slab.decommit(4096, CAPACITY)
    assert allocated(slab) == 4096
    slab.commit(4096, CAPACITY, prefault=True)
    assert copied(slab, 4096, spec).sum() == 0
    assert copied(slab, 0, kept).sum() == 5 * 4096


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_memory_that_is_not_there(
    slab: HostSlab, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab.commit(0, 64 * KIB, prefault=False)

    def half(fd: int, offset: int, size: int) -> None:
        real(fd, offset, size // 2)
        raise OSError(code, os.strerror(code))

    real = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", half)
    with pytest.raises(MemoryError, match=os.strerror(code)):
        slab.commit(64 * KIB, CAPACITY, prefault=False)
    assert allocated(slab) == 64 * KIB  # nothing changed


def test_a_kernel_that_does_not_know_populate(
    slab: HostSlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.memory.host.slab.POPULATE_WRITE", 9999)
    slab.commit(0, 64 * KIB, prefault=True)
    assert allocated(slab) == 64 * KIB


def test_readers_see_the_bytes_and_can_not_write_them(slab: HostSlab) -> None:
    slab.commit(0, CAPACITY, prefault=True)
    value = torch.arange(1000, dtype=torch.int32)
    spec = write(slab, 512, value)
    (fd,) = slab.descriptors()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, CAPACITY, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 512)
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(fd, 0)
    reader = HostMapping.attach(fd, CAPACITY, CAPACITY)
    assert torch.equal(reader.view(512, spec), value)
    assert torch.equal(copied(reader, 512, spec), value)
    slab.write(512, ((spec, -value),), ())
    assert torch.equal(reader.view(512, spec), -value)


@pytest.mark.parametrize("size", [0, 4096, CAPACITY - 4096, 2 * CAPACITY])
def test_a_slab_of_another_size_is_refused(slab: HostSlab, size: int) -> None:
    (fd,) = slab.descriptors()
    with pytest.raises(AttachRefused, match="bytes where"):
        HostMapping.attach(fd, size, 0)


def test_views_keep_a_closed_mapping_alive(no_leaks: None) -> None:
    slab = HostSlab(CAPACITY, huge_pages=False)
    slab.commit(0, CAPACITY, prefault=True)
    spec = write(slab, 0, torch.full((4096,), 5, dtype=torch.uint8))
    reader = HostMapping.attach(slab.descriptors()[0], CAPACITY, CAPACITY)
    view = reader.view(0, spec)
    reader.close()
    slab.close()
    slab.close()
    assert view.sum() == 5 * 4096
    for mapping in (reader, slab):
        with pytest.raises(CacheClosed):
            mapping.view(0, spec)
        with pytest.raises(CacheClosed):
            copied(mapping, 0, spec)
    with pytest.raises(CacheClosed):
        slab.write(0, ((spec, view),), ())


def test_signals(slab: HostSlab) -> None:
    words = memoryview(bytearray(64)).cast("Q")
    slab.signal(words, 3, 1 << 62, ())
    assert words.tolist() == [0, 0, 0, 1 << 62, 0, 0, 0, 0]
    assert not slab.deferred


def test_neighbours_are_not_touched(slab: HostSlab) -> None:
    slab.commit(0, CAPACITY, prefault=False)
    everything = TensorSpec(None, "uint8", (CAPACITY,), 0)
    slab.view(0, everything).fill_(0xEE)
    for value in (torch.zeros(100), torch.zeros(10, 20).T, torch.zeros(3, dtype=torch.uint8)):
        spec = write(slab, 4096, value)
        whole = slab.view(0, everything)
        assert (whole[:4096] == 0xEE).all()
        assert (whole[4096 : 4096 + spec.nbytes] == 0).all()
        assert (whole[4096 + spec.nbytes :] == 0xEE).all()
        whole.fill_(0xEE)


def test_nothing_is_left_of_a_slab_that_could_not_be_made(
    no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> int:
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(RuntimeError, match="/proc"):
            HostSlab(CAPACITY)


def turns_during(work: Callable[[], object]) -> int:
    """Count how often this thread runs while another one does the work."""
    states = list[str]()

    def run() -> None:
        states.append("begun")
        work()
        states.append("done")

    thread = threading.Thread(target=run)
    thread.start()
    turns = 0
    while "done" not in states:
        turns += states == ["begun"]
        time.sleep(0)
    thread.join()
    return turns


@pytest.mark.parametrize("side", ["owner", "client"])
def test_taking_page_faults_in_a_thread_does_not_stop_the_others(side: str) -> None:
    """Advice given by `mmap.madvise` keeps the GIL: this thread would run before it, or behind it."""
    nbytes = 256 * MIB
    slab = HostSlab(nbytes, huge_pages=False)
    try:
        if side == "owner":
            turns = turns_during(lambda: slab.commit(0, nbytes, prefault=True))
        else:
            (fd,) = slab.descriptors()
            attached = list[HostMapping]()
            turns = turns_during(lambda: attached.append(HostMapping.attach(fd, nbytes, nbytes)))
            attached.pop().close()
        assert turns > 4
    finally:
        slab.close()


def test_page_faults_are_taken_in_pieces(slab: HostSlab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel holds a lock of the address space for each, which an allocation of the loop needs."""
    pieces, code = list[tuple[int, int]](), iter([errno.EINTR] + [0] * 8)

    def madvise(address: int, nbytes: int, advice: int) -> int:
        found = next(code)
        ctypes.set_errno(found)
        if not found:
            pieces.append((address - slab._open()[1], nbytes))
        return -1 if found else 0

    monkeypatch.setattr(pages, "_libc", types.SimpleNamespace(madvise=madvise))
    slab.commit(MIB, 10 * MIB, prefault=True)
    assert pieces == [(1 * MIB, 4 * MIB), (5 * MIB, 4 * MIB), (9 * MIB, 1 * MIB)]


def resident_kib(address: int) -> int:
    """Return how much of the mapping at an address is in this process's page tables."""
    with Path("/proc/self/smaps").open() as smaps:
        lines = iter(smaps)
        for line in lines:
            if line.startswith(f"{address:x}-"):
                return next(int(each.split()[1]) for each in lines if each.startswith("Rss:"))
    return 0


def test_a_mapping_gives_its_pages_back_in_pieces_before_it_is_unmapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An unmap holds the address space's lock for all pages at once, and the loop needs it."""
    nbytes = 10 * MIB
    slab = HostSlab(nbytes, huge_pages=False)
    slab.commit(0, nbytes, prefault=True)
    spec = write(slab, 0, torch.arange(1000))
    mapping = HostMapping.attach(slab.descriptors()[0], nbytes, nbytes)
    mapping.open_for_writing(slab.write_descriptors())
    mapping.warm(nbytes)
    (_, read), target = mapping._open(), mapping._target
    assert target is not None
    view, written = mapping.view(0, spec), target.address  # view and target outlive the close
    assert resident_kib(read) == resident_kib(written) == nbytes // KIB
    madvise, pieces = pages._libc.madvise, list[int]()

    def noted(address: int, size_bytes: int, advice: int) -> int:
        pieces.append(size_bytes)
        return int(madvise(address, size_bytes, advice))

    monkeypatch.setattr(pages, "_libc", types.SimpleNamespace(madvise=noted))
    monkeypatch.setattr(
        pages, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__)
    )
    mapping.close()
    assert resident_kib(read) == resident_kib(written) == 0
    assert sorted(pieces) == [2 * MIB, 2 * MIB, 4 * MIB, 4 * MIB, 4 * MIB, 4 * MIB]
    assert torch.equal(view, torch.arange(1000))  # what still reads finds its bytes
    monkeypatch.undo()
    slab.close()


def test_a_slab_of_terabytes_that_holds_little_is_dropped_in_few_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In equal ones it were 16 million, which held the loop for a minute."""
    slab = HostSlab(64 << 40, huge_pages=False)
    slab.commit(0, MIB, prefault=True)
    address = slab._open()[1]
    madvise, pieces = pages._libc.madvise, list[int]()

    def noted(address: int, size_bytes: int, advice: int) -> int:
        pieces.append(size_bytes)
        return int(madvise(address, size_bytes, advice))

    monkeypatch.setattr(pages, "_libc", types.SimpleNamespace(madvise=noted))
    now_s = itertools.count(step=1e-6).__next__
    monkeypatch.setattr(pages, "time", types.SimpleNamespace(perf_counter=now_s))
    slab.close()
    assert resident_kib(address) == 0
    assert sum(pieces) == 64 << 40
    assert len(pieces) < 32


def test_memory_that_torch_can_not_have_is_told_and_its_other_errors_too(
    slab: HostSlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("can't allocate memory\nException raised from alloc_cpu at …")

    slab.commit(0, CAPACITY, prefault=False)
    spec = write(slab, 0, torch.arange(1000))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        with pytest.raises(BackendUnavailable, match=r"copy of 8000 bytes: can't allocate memory$"):
            slab.fetch(0, spec, None, ())
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", refuse)
        with pytest.raises(BackendUnavailable, match="copy of 8000 bytes"):
            slab.read(0, spec, torch.zeros(1000, 2, dtype=torch.int64)[:, 0], ())
        with pytest.raises(BackendUnavailable, match="copy of 8000 bytes"):
            write(slab, 0, torch.zeros(1000, 2, dtype=torch.int64)[:, 0])
