"""Control words: who can write which, and that what is mapped is what was meant."""

import ctypes
import fcntl
import mmap
import os
import platform
from collections.abc import Callable, Iterator

import pytest

from featcache.errors import AttachRefused
from featcache.memory import words as words_module
from featcache.memory.words import (
    Header,
    OwnerWords,
    SessionWords,
    fence_full,
    fence_stores,
    memfd,
    owner_block_bytes,
    session_page_bytes,
)

SLOTS = 100
F_SEAL_FUTURE_WRITE = 0x0010


@pytest.fixture
def owner() -> Iterator[tuple[OwnerWords, int]]:
    words, fd = OwnerWords.create(SLOTS)
    yield words, fd
    os.close(fd)


@pytest.fixture
def session() -> Iterator[tuple[SessionWords, int]]:
    words, fd = SessionWords.create(SLOTS)
    yield words, fd
    os.close(fd)


def test_readers_see_what_the_owner_writes(owner: tuple[OwnerWords, int]) -> None:
    mine, fd = owner
    theirs = OwnerWords.attach(fd, SLOTS)
    for index in (0, 1, SLOTS - 1):
        mine.make_live(index, (1 << 63) - 1 - index, 256 * index, 7 + index)
        mine.published[index] = 3
        assert theirs.live[index] == (1 << 63) - 1 - index
        assert (theirs.offset[index], theirs.nbytes[index]) == (256 * index, 7 + index)
        assert theirs.published[index] == 3
    mine.header[Header.WAITING] = True
    assert theirs.header[Header.WAITING] == 1
    for array in (theirs.live, theirs.published, theirs.offset, theirs.nbytes):
        assert len(array) == SLOTS


def test_words_do_not_overlap(owner: tuple[OwnerWords, int]) -> None:
    words, _ = owner
    arrays = [words.live, words.published, words.offset, words.nbytes]
    for n, array in enumerate(arrays, 1):
        for index in range(SLOTS):
            array[index] = 1000 * n + index
    for n, array in enumerate(arrays, 1):
        assert array.tolist() == [1000 * n + index for index in range(SLOTS)]
    assert words.header[Header.SLOTS] == SLOTS


def test_a_session_and_its_owner_share_a_page(session: tuple[SessionWords, int]) -> None:
    mine, fd = session
    theirs = SessionWords.attach(fd, SLOTS)
    theirs.held[SLOTS - 1] = 4
    theirs.released[0] = 5
    assert (mine.held[SLOTS - 1], mine.released[0]) == (4, 5)
    now = mine.released_array()
    assert now.shape == (SLOTS,)
    theirs.released[1] = 6
    assert now[:3].tolist() == [5, 6, 0]


# --- who may write -------------------------------------------------------------------------------


def test_readers_can_not_write_the_owners_words(owner: tuple[OwnerWords, int]) -> None:
    mine, fd = owner
    theirs = OwnerWords.attach(fd, SLOTS)
    for array in (theirs.live, theirs.header):
        with pytest.raises(TypeError, match="read-only"):
            array[0] = 1
    mine.live[0] = 2  # the mapping from before the seal goes on
    assert theirs.live[0] == 2


@pytest.mark.parametrize("again", [False, True], ids=["received", "opened again"])
def test_no_descriptor_of_the_owners_words_writes(
    owner: tuple[OwnerWords, int], again: bool
) -> None:
    _, given = owner
    fd = os.open(f"/proc/self/fd/{given}", os.O_RDWR) if again else os.dup(given)
    size = os.fstat(fd).st_size
    with pytest.raises(PermissionError):
        mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    for act in (
        lambda: os.pwrite(fd, b"x", 600),
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, 2 * size),
    ):
        with pytest.raises(PermissionError):
            act()
    os.close(fd)


def test_a_read_only_mapping_can_not_be_upgraded(owner: tuple[OwnerWords, int]) -> None:
    _, fd = owner
    size = os.fstat(fd).st_size
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE) == -1
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    assert libc.munmap(address, size) == 0
    mapping.close()


def test_seals(owner: tuple[OwnerWords, int], session: tuple[SessionWords, int]) -> None:
    sizes = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    assert fcntl.fcntl(owner[1], fcntl.F_GET_SEALS) & (sizes | F_SEAL_FUTURE_WRITE) == (
        sizes | F_SEAL_FUTURE_WRITE
    )
    # A page that shrank under its owner would be a SIGBUS there.
    assert fcntl.fcntl(session[1], fcntl.F_GET_SEALS) & sizes == sizes
    with pytest.raises(PermissionError):
        os.ftruncate(session[1], 0)
    for fd in (owner[1], session[1]):
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


# --- layout --------------------------------------------------------------------------------------


def test_sizes() -> None:
    for slots in (1, 64, 100, 4096, 1 << 20):
        assert owner_block_bytes(slots) >= (64 + 4 * slots) * 8
        assert session_page_bytes(slots) >= (64 + 2 * slots) * 8
        assert owner_block_bytes(slots) % mmap.PAGESIZE == 0
        assert session_page_bytes(slots) % mmap.PAGESIZE == 0


@pytest.mark.parametrize("slots", [1, SLOTS - 1, SLOTS + 1, 4096])
def test_another_number_of_slots_is_refused(
    owner: tuple[OwnerWords, int], session: tuple[SessionWords, int], slots: int
) -> None:
    with pytest.raises(AttachRefused):
        OwnerWords.attach(owner[1], slots)
    with pytest.raises(AttachRefused):
        SessionWords.attach(session[1], slots)


@pytest.mark.parametrize(
    ("attach", "size_bytes"),
    [
        (OwnerWords.attach, owner_block_bytes(SLOTS)),
        (SessionWords.attach, session_page_bytes(SLOTS)),
    ],
    ids=["owner", "session"],
)
def test_other_memory_is_refused(attach: Callable[[int, int], object], size_bytes: int) -> None:
    for wrong_bytes in (0, 1, size_bytes - 1, size_bytes + 1, 2 * size_bytes, size_bytes):
        fd = memfd("test", wrong_bytes)  # zeros: of the right size at last, of no layout
        with pytest.raises(AttachRefused):
            attach(fd, SLOTS)
        os.close(fd)


def test_nothing_is_left(no_leaks: None) -> None:
    for kind in (OwnerWords, SessionWords):
        _, fd = kind.create(SLOTS)
        kind.attach(fd, SLOTS)
        os.close(fd)


ALIKE_GRANTS = (owner_block_bytes(SLOTS) - session_page_bytes(SLOTS, 0)) // (4 * 8)
"""Grants with which both kinds of block are of one size."""


def test_each_others_blocks_are_refused() -> None:
    assert owner_block_bytes(SLOTS) == session_page_bytes(SLOTS, ALIKE_GRANTS)
    _, page = SessionWords.create(SLOTS, ALIKE_GRANTS)
    _, words = OwnerWords.create(SLOTS)
    try:
        with pytest.raises(AttachRefused):
            OwnerWords.attach(page, SLOTS)
        with pytest.raises(AttachRefused):
            SessionWords.attach(words, SLOTS, ALIKE_GRANTS)
    finally:
        os.close(page)
        os.close(words)


def test_the_fences_run_on_this_processor() -> None:
    fence_full()
    fence_stores()


@pytest.mark.skipif(
    platform.machine() not in {"x86_64", "aarch64"}, reason="numbers of other tables"
)
def test_membarrier_is_what_the_weaker_processors_get(monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.machine() == "x86_64":
        monkeypatch.setattr(words_module, "_SYS_MEMBARRIER", 324)
    words_module._membarrier()
    words_module._membarrier()
