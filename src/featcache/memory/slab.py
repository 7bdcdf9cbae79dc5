"""The interface of slabs and their mappings: the same calls for host memory and for a GPU.

Offsets and sizes are bytes from the slab's start. All access to bytes is *stream ordered*: after
`write`, then `signal`, every process that sees the signal sees the bytes, although both may still be
in progress when the calls return. On the host they are complete on return.

An *order* is the caller's position in that sense, taken by `order` or `stage` at the time of the call:
for a GPU, torch's current stream. It is opaque outside its slab, and is passed to threads that work
for the caller.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from featcache.errors import BackendUnavailable, FeatcacheError
from featcache.memory.words import Block, SessionWords
from featcache.ref import TensorSpec

Parts: TypeAlias = Sequence[tuple[TensorSpec, torch.Tensor]]
"""The tensors of one feature, each with its spec, which has its offset in the slot."""
Order: TypeAlias = Any
Words: TypeAlias = Any
"""Control words in the form that `signal` takes, from `adopt`."""
Word: TypeAlias = tuple[Words, int, int]
"""One control word, by words and index, and its new value."""


class Unreachable(BackendUnavailable):
    """This device can't access the slab's memory: its reads go through host memory."""


def uncopied(nbytes: int, error: RuntimeError) -> BackendUnavailable:
    """Return the error of a copy that torch could not make: mostly, there is no memory for it."""
    first = str(error).partition("\n")[0]
    return BackendUnavailable(f"torch could not make a copy of {nbytes} bytes: {first}")


@contextlib.contextmanager
def torch_copies(nbytes: int) -> Iterator[None]:
    """Raise torch's bare RuntimeError as `uncopied`; away from the hot paths, which do it inline."""
    try:
        yield
    except FeatcacheError:
        raise
    except RuntimeError as error:
        raise uncopied(nbytes, error) from error


class Segment(NamedTuple):
    """A piece of a slab's range with a descriptor of its own, which is sent to readers."""

    start_bytes: int
    size_bytes: int
    fd: int
    """The descriptor; it stays the slab's."""


class Plan(NamedTuple):
    """The kind of slab that a device gets, and the constraints on its sizes."""

    kind: str
    """The backend's name for it."""
    reason: str
    """Why this kind was chosen, where there was a choice."""
    ordinal: int
    """The device in this process; -1 is the host."""
    granularity_bytes: int
    """Sizes are multiples of it."""
    max_segments: int | None
    """The most segments that it may be cut into; None is any number."""


class PeerSlab(NamedTuple):
    """A slab as its owner described it to a client. No field is trusted."""

    kind: str
    device_name: str
    """``"cpu"`` or the UUID of the slab's GPU."""
    capacity_bytes: int
    """Bytes of the range."""
    committed_bytes: int
    """Bytes of it that have memory behind them."""
    handle: bytes
    """The legacy handle, or nothing."""
    fds: list[int]
    """The descriptors that came with it; the caller's."""


class Mapping(Protocol):
    """A slab as one process maps it."""

    device: torch.device
    """The device of `view` tensors."""
    deferred: bool
    """Whether a word may land after `signal` returned, as on a GPU's stream."""

    @property
    def end_bytes(self) -> int:
        """Bytes from the start that are mapped here."""

    @property
    def zero_copy(self) -> bool:
        """Whether a borrow yields a `view`; otherwise it yields a copy."""

    def can_copy_to(self, device: torch.device | None) -> bool:
        """Whether `read` can copy to this device (None: the mapping's own) now."""

    def enable_device(self, device: torch.device) -> None:
        """Make `can_copy_to` true. May block."""

    def order(self, device: torch.device | None = None) -> Order:
        """Return the caller's position in the order of a device, the mapping's own if None."""

    def blocking_read_bytes(self, nbytes: int, device: torch.device | None) -> int:
        """Return the bytes of a host copy that blocks a thread for as long as a read of `nbytes`."""

    def view(
        self, offset_bytes: int, spec: TensorSpec, device: torch.device | None = None
    ) -> torch.Tensor:
        """Return a tensor over the slab's own bytes, without a copy. It must not be written."""

    def empty(self, spec: TensorSpec, device: torch.device | None) -> torch.Tensor:
        """Return a new tensor for `read`, contiguous, on `device` or the mapping's own.

        Separate from `read` because memory is best allocated in the thread that will free it: malloc
        returns another thread's large blocks to the system, and faults them in again, each time.
        """

    def fetch(
        self, offset_bytes: int, spec: TensorSpec, device: torch.device | None, order: Order
    ) -> torch.Tensor:
        """Do `empty` and `read` in one call."""

    def read(self, offset_bytes: int, spec: TensorSpec, out: torch.Tensor, order: Order) -> None:
        """Copy the slab's bytes into a tensor of the spec's dtype and shape."""

    @property
    def writable(self) -> bool:
        """Whether `write` may be called: in the owner always, elsewhere after `open_for_writing`."""

    def open_for_writing(self, fds: Sequence[int]) -> None:
        """Map the slab for writing, by the descriptors that the owner sent for this. May block."""

    def warm(self, end_bytes: int) -> None:
        """Make first writes below `end_bytes`, committed now, as quick as later ones. May block."""

    def stage(self, parts: Parts) -> tuple[Parts, Order]:
        """Return the arguments of `write`: the parts, where it can copy from, and the caller's order."""

    def blocking_write_bytes(self, parts: Parts) -> int:
        """Return the bytes of a host copy that blocks a thread for as long as this `write`."""

    def write(
        self, offset_bytes: int, parts: Parts, order: Order, word: Word | None = None
    ) -> None:
        """Copy staged tensors to the offsets of their specs, counted from `offset_bytes`.

        Then `signal` a word, if one is given: one call costs less than two.
        """

    def adopt(self, block: Block, words: memoryview) -> Words:
        """Return some words of a block in the form that `signal` takes. May block."""

    def signal(self, words: Words, index: int, value: int, order: Order) -> None:
        """Store a control word behind all earlier work of this order."""

    def signal_many(self, words: Words, values: Sequence[tuple[int, int]], order: Order) -> None:
        """Store control words, each by its index and new value, as `signal` stores one."""

    def follow(self, order: Order, others: Sequence[Order]) -> Order:
        """Return an order that is behind all of these."""

    def can_follow(self, order: Order) -> bool:
        """Whether an order can be named at any later time, as one of those that `follow` stands behind."""

    def extend(self, start_bytes: int, size_bytes: int, fd: int) -> None:
        """Map a segment of the owner's. May block. The descriptor stays the caller's."""

    def cut(self, end_bytes: int) -> None:
        """Unmap the segments from `end_bytes` on: no work on them may be in progress. May block."""

    def finish(self) -> None:
        """Wait for all work of this process on the devices that map it. Blocks."""

    def close(self) -> None:
        """Close the mapping: no work on it may be in progress. Views keep their bytes readable."""

    def forget(self) -> None:
        """In a forked child, drop the descriptors and mappings that need no driver."""


class Slab(Mapping, Protocol):
    """The owner's side of a slab: a range of addresses, with memory behind a growing part of it."""

    kind: str
    """The kind's name, by which a reader finds the backend that maps it."""
    device_name: str
    """The device's name between processes: ``"cpu"`` or a GPU's UUID."""
    ordinal: int
    """The device in this process; -1 is the host."""
    handle: bytes
    """The handle by which a reader opens it where descriptors can't serve."""
    capacity_bytes: int
    """Bytes of the range."""
    quick_commit_bytes: int
    """Bytes that `commit` adds in a millisecond or two; 0 if a segment of any size is as quick."""

    def commit(self, start_bytes: int, stop_bytes: int, *, prefault: bool) -> None:
        """Commit memory to a range, or raise MemoryError with nothing changed. May block."""

    def decommit(self, start_bytes: int, stop_bytes: int) -> None:
        """Release the memory of a range. May block."""

    def descriptors(self) -> list[int]:
        """Return the descriptors that every reader needs; they stay the slab's."""

    def write_descriptors(self) -> list[int]:
        """Return the further descriptors that a writer needs; they stay the slab's."""

    def segments(self, start_bytes: int, stop_bytes: int) -> Sequence[Segment]:
        """Return the segments in a part of the range, in order, to be sent to readers."""


class PageWords(NamedTuple):
    """The words of a session's page as its mapping's `signal` takes them."""

    released: Words
    granted: Words
    written: Words
    ended: Words

    @classmethod
    def adopted(cls, mapping: Mapping, page: SessionWords) -> "PageWords":
        """Return a page's words in the form that a mapping made of them. May block."""
        return cls(*(mapping.adopt(page, words) for words in cls.plain(page)))

    @classmethod
    def plain(cls, page: SessionWords) -> "PageWords":
        """Return a page's words as they are: the CPU writes them."""
        return cls(page.released, page.granted, page.written, page.ended)
