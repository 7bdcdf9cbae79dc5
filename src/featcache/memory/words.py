"""Control words: 64-bit, in shared host memory, each written by exactly one process.

Two kinds of block. The *owner's* block has a header, one `live`, `published`, `offset`, `nbytes`,
`reserved` and `ending` word (how its last ref ended that was not paid) per slot,
and the key table (`memory.key_table`); it is sealed so that readers can map it
only for reading. A *session's* page has one `held`, `released`, `written` and `used` word per slot, one
`granted` word per grant that it may have out, a lease entry per read by key that it may hold (`lease`,
`serial` and `ended`), a ring of posts (`memory.post_ring`), and one word that says how far it has ended
(`Parting`); that session and the owner map it, nobody else.

Aligned 8-byte stores through a memoryview are enough: CPython packs an item with one 8-byte move,
which x86-64 and arm64 make single-copy atomic when aligned. `fence_stores` orders bytes before their
word, `fence_full` a word written before another word read.
"""

import ctypes
import fcntl
import functools
import mmap
import os
import platform
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from featcache.errors import AttachRefused, BackendUnavailable, explain
from featcache.settings import round_up

_B = TypeVar("_B")
_WORD_BYTES: Final = 8
_HEADER_WORDS: Final = 64
_OWNER_MAGIC: Final = int.from_bytes(b"fcOwner\x02", "little")
_SESSION_MAGIC: Final = int.from_bytes(b"fcSessn\x04", "little")
_OWNER_ARRAYS: Final = 6
_SESSION_ARRAYS: Final = 4
_ENTRY_ARRAYS: Final = 4
GRANTS: Final = 4096
"""Grants that a session may hold by default."""
POSTS: Final = 64
"""Messages that wait in a session's page at most."""
POST_BYTES: Final = 256
"""Each of them, with its length."""
KEY_SET_BYTES: Final = 256
"""A set of the key table."""
RECORD_BYTES: Final = 256
"""A slot's record behind the key table: the wire form of its ref."""
_F_SEAL_FUTURE_WRITE: Final = 0x0010  # Linux 5.1; Python's fcntl does not name it before 3.13


class Header:
    """Indices of the header words of an owner's block."""

    MAGIC, SLOTS, CAPACITY = range(3)
    WAITING = 3
    """n > 0 while a put waits: a reader then rings the owner's eventfd at each n-th of its releases.

    Every release rings (1) unless the owner is busy with releases and polls each millisecond anyway.
    """
    COMMITTED, USED, SLOTS_USED, WAITERS, WAITING_BYTES, LARGEST_FREE = range(4, 10)
    SHRINK_EPOCH = 10
    """How often the slab has shrunk. A reader at an older epoch may have old memory mapped where new
    segments are, and reads nothing until it has unmapped that.
    """
    KEYS, RESIDENT, PINNED, EVICTED = range(11, 15)
    TICK = 15
    """The recency policy's present tick: a session copies it into `used` at each hit of a slot."""
    SECRET = 16
    """The first of the four words of the key under which this pool digests the keys of features."""
    OLDEST_UNPAID = 20
    """The age, in microseconds, of the oldest ref that still owes a read; 0 if none does."""


class RoomClaim:
    """How a session takes a slot that was reserved for it ahead of a put, without a message.

    The owner stores `OPEN` with the generation in its `reserved` word: the session may claim the slot. The
    session stores `CLAIMED` with the generation in its `written` word, fences, and looks at `reserved`
    again; the owner, to take the room back, stores `reserved` without `OPEN`, fences, and looks at `written`.
    So either the session finds that the room is gone, or the owner that it is claimed, as with a pin.
    Whoever only reads sees the same generation with and without the bit: a publish may still come.
    """

    OPEN = CLAIMED = 1 << 63
    GENERATION = OPEN - 1


class Counts:
    """Indices of the header words of a session's page in which the session counts what it did itself."""

    REVOKED = 4
    """Lease entries that were taken for nothing: all others are hits."""
    MISSES = 5
    """Lookups that the key table alone answered with no."""
    LEASES_HIGH = 6
    """One more than the highest index of a lease entry that was ever taken."""


class Posts:
    """Indices of the header words of a session's page that count its posts (`memory.post_ring`)."""

    POSTED = 7
    TAKEN = 8
    """As the owner tells it: the one word of the page, but for its size, that the owner writes."""


class Parting:
    """How far a session has ended, by its own word in its page's header; it only grows.

    IN_USE: it may begin to read. LEAVING: it begins nothing more, what it still holds is in its words.
    ABANDONED: it holds nothing and reads nothing more, though nobody closed it. LEFT: it was closed, as
    its goodbye says, which a full socket drops.
    """

    WORD = 3
    IN_USE, LEAVING, ABANDONED, LEFT = range(4)


# --- order ---------------------------------------------------------------------------------------

TSO: Final = platform.machine() in {"x86_64", "AMD64"}
"""Whether stores become visible in program order: a hot path then skips `fence_stores`."""
_barrier_lock = threading.Lock()
_SYS_MEMBARRIER: Final = 283  # the generic syscall table (arm64, riscv64); x86-64 needs none here
_MEMBARRIER_GLOBAL_EXPEDITED: Final = 1 << 1
"""Not the private form: that omits the barrier where the process has one thread."""


def _membarrier() -> None:
    """Issue the kernel's full barrier in the caller's thread."""
    if _libc().syscall(_SYS_MEMBARRIER, _MEMBARRIER_GLOBAL_EXPEDITED, 0, 0) != 0:
        raise BackendUnavailable("this processor needs membarrier(2) and the kernel has none")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _renew_lock() -> None:
    global _barrier_lock  # noqa: PLW0603 - another thread may have held it as this process forked
    _barrier_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _lock_as_barrier() -> None:
    # An uncontended lock is a LOCK-prefixed instruction on x86, which drains the store buffer.
    _barrier_lock.acquire()
    _barrier_lock.release()


def _nothing() -> None:
    pass


fence_stores = _nothing if TSO else _membarrier
"""Store barrier between bytes and the word that vouches for them. x86-64 needs none (TSO)."""

fence_loads = _nothing if TSO else _membarrier
"""Load barrier between a word and what is read because of it. x86-64 needs none (TSO)."""

fence_after_lock = _nothing if TSO else _membarrier
"""`fence_full` where a lock was released since the store, which on x86-64 was the barrier."""

fence_full = _lock_as_barrier if TSO else _membarrier
"""Full barrier between a word written and another process's word read.

A reader writes `held` (a hazard pointer), then reads `live`; the owner clears `live`, then reads `held`.
With a full barrier in both, at least one of them sees the other's store."""


def store_words(words: memoryview, values: Sequence[tuple[int, int]]) -> None:
    """Store words, each by its index and new value, behind the bytes that they vouch for."""
    fence_stores()
    for index, value in values:
        words[index] = value


# --- blocks --------------------------------------------------------------------------------------


def memfd(label: str, size_bytes: int) -> int:
    """Return a new close-on-exec, sealable, zeroed memfd of this size."""
    fd = os.memfd_create(f"featcache-{label}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _map(fd: int, size_bytes: int, *, write: bool) -> mmap.mmap:
    """Map a whole block; a peer's descriptor of another size is refused before it is mapped."""
    found_bytes = os.fstat(fd).st_size
    if found_bytes != size_bytes:
        raise AttachRefused(f"a control block has {found_bytes} bytes where {size_bytes} belong")
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    try:
        return mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED, prot=prot)
    except PermissionError as error:
        raise AttachRefused(
            f"a control block can't be mapped as it should: {explain(error)}"
        ) from error


def key_sets(slots: int) -> int:
    """Return how many sets the key table has: a power of two, with four keys a set or fewer."""
    return 1 << max(0, (slots - 1) // 4).bit_length()


def key_table_start_bytes(slots: int) -> int:
    """Return where an owner's block has its key table; the records of the slots follow it."""
    return round_up((_HEADER_WORDS + _OWNER_ARRAYS * slots) * _WORD_BYTES, mmap.PAGESIZE)


def owner_block_bytes(slots: int) -> int:
    """Return the size of an owner's block."""
    table_bytes = key_sets(slots) * KEY_SET_BYTES + slots * RECORD_BYTES
    return round_up(key_table_start_bytes(slots) + table_bytes, mmap.PAGESIZE)


def session_page_bytes(slots: int, grants: int = GRANTS) -> int:
    """Return the size of a session's page."""
    words = _HEADER_WORDS + _SESSION_ARRAYS * slots + _ENTRY_ARRAYS * grants
    return round_up(words * _WORD_BYTES + POSTS * POST_BYTES, mmap.PAGESIZE)


class Block:
    """Words over a mapping, which lives as long as the block and every view of it."""

    def __init__(self, mapping: mmap.mmap, slots: int, magic: int, arrays: int) -> None:
        words = memoryview(mapping).cast("Q")
        if words[Header.MAGIC] != magic or words[Header.SLOTS] != slots:
            raise AttachRefused(
                f"a control block of layout {words[Header.MAGIC]:#x} with {words[Header.SLOTS]} "
                f"slots, where {magic:#x} with {slots} belongs: owner and client differ"
            )
        self.slots = slots
        self.whole = words
        """All words of the block, for its registration with a driver."""
        self.header = words[:_HEADER_WORDS]
        starts = [_HEADER_WORDS + n * slots for n in range(arrays)]
        self._arrays = [words[start : start + slots] for start in starts]


def _create(
    make: Callable[[mmap.mmap], _B], label: str, slots: int, size_bytes: int, magic: int, seals: int
) -> tuple[_B, int]:
    """Return a new block and its descriptor, whose size is sealed."""
    fd = memfd(label, size_bytes)
    try:
        mapping = _map(fd, size_bytes, write=True)
        words = memoryview(mapping).cast("Q")
        words[Header.SLOTS], words[Header.MAGIC] = slots, magic
        # After this mapping, which stays writable, and before it is shared: a session that truncated
        # it would be a SIGBUS here.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return make(mapping), fd
    except BaseException:
        os.close(fd)
        raise


class OwnerWords(Block):
    """The owner's block, made by the owner (`create`) or mapped by a reader (`attach`)."""

    def __init__(self, mapping: mmap.mmap, slots: int) -> None:
        super().__init__(mapping, slots, _OWNER_MAGIC, _OWNER_ARRAYS)
        self.live, self.published, self.offset, self.nbytes = self._arrays[:4]
        self.reserved, self.ending = self._arrays[4:]
        self.mapping = mapping
        """The mapping itself, in which `memory.key_table` searches."""

    @classmethod
    def create(cls, slots: int) -> tuple["OwnerWords", int]:
        """Return the block and its descriptor, of which no new writable mapping can be made."""
        make, size_bytes = functools.partial(cls, slots=slots), owner_block_bytes(slots)
        return _create(make, "words", slots, size_bytes, _OWNER_MAGIC, _F_SEAL_FUTURE_WRITE)

    @classmethod
    def attach(cls, fd: int, slots: int) -> "OwnerWords":
        """Map a peer's block read-only, after checking its size and layout."""
        return cls(_map(fd, owner_block_bytes(slots), write=False), slots)

    def make_live(self, index: int, generation: int, offset_bytes: int, nbytes: int) -> None:
        """Make a slot readable: its extent first, then `live`, which vouches for it."""
        self.offset[index] = offset_bytes
        self.nbytes[index] = nbytes
        if not TSO:  # hot path: skip the call on TSO
            fence_stores()
        self.live[index] = generation

    def tell_endings(self, endings: deque[tuple[int, int]]) -> None:
        """Write the `ending` words of slots, and empty the queue of them. `live` is cleared after."""
        while endings:
            index, word = endings.popleft()
            self.ending[index] = word
        if not TSO:
            fence_stores()


class SessionWords(Block):
    """A session's page, made by the owner (`create`) or mapped by the session (`attach`)."""

    def __init__(self, mapping: mmap.mmap, slots: int, grants: int) -> None:
        super().__init__(mapping, slots, _SESSION_MAGIC, _SESSION_ARRAYS)
        self.held, self.released, self.written, self.used = self._arrays
        first = _HEADER_WORDS + _SESSION_ARRAYS * slots
        starts = [first + n * grants for n in range(_ENTRY_ARRAYS)]
        self.granted, self.lease, self.serial, self.ended = (
            self.whole[start : start + grants] for start in starts
        )
        posts_at_bytes = (first + _ENTRY_ARRAYS * grants) * _WORD_BYTES
        self.posts = memoryview(mapping)[posts_at_bytes : posts_at_bytes + POSTS * POST_BYTES]

    @classmethod
    def create(cls, slots: int, grants: int = GRANTS) -> tuple["SessionWords", int]:
        """Return a page and its descriptor, whose size is sealed."""
        size_bytes = session_page_bytes(slots, grants)
        make = functools.partial(cls, slots=slots, grants=grants)
        return _create(make, "session", slots, size_bytes, _SESSION_MAGIC, 0)

    @classmethod
    def attach(cls, fd: int, slots: int, grants: int = GRANTS) -> "SessionWords":
        """Map the session's own page for writing, after checking its size and layout."""
        return cls(_map(fd, session_page_bytes(slots, grants), write=True), slots, grants)

    def granted_array(self) -> NDArray[np.uint64]:
        """Return the `granted` words as an array over the same memory, for vector compares."""
        return np.frombuffer(self.granted, dtype=np.uint64)

    @property
    def lookups(self) -> tuple[int, int]:
        """Hits and misses that the session counted itself."""
        high = min(self.header[Counts.LEASES_HIGH], len(self.serial))
        taken = int(np.frombuffer(self.serial, np.uint64)[:high].max(initial=0))
        return max(0, taken - self.header[Counts.REVOKED]), self.header[Counts.MISSES]

    def entries_in_use(self) -> NDArray[np.bool_]:
        """Return which lease entries are in use, as far as any was ever taken."""
        high = min(self.header[Counts.LEASES_HIGH], len(self.serial))
        serials, ended = (np.frombuffer(words, np.uint64) for words in (self.serial, self.ended))
        in_use: NDArray[np.bool_] = serials[:high] != ended[:high]
        return in_use

    def released_array(self) -> NDArray[np.uint64]:
        """Return the `released` words as an array over the same memory, for vector compares."""
        return np.frombuffer(self.released, dtype=np.uint64)
