"""What a slab is to the layers above: the same few calls for host memory and for a GPU.

Offsets and sizes are bytes from the slab's start. Everything that touches bytes is *stream ordered*:
`write`, then `signal`, promise that whoever sees the signal sees the bytes, although both may still
be on their way when they return. On the host nothing is ever on its way.

An *order* is the caller's place in that sense, as `order` or `stage` saw it when the call came in: for
a GPU the stream that was torch's current one. It is the slab's own and opaque to everybody else; a
thread that works for the caller is given it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from featcache.errors import BackendUnavailable
from featcache.memory.words import Block
from featcache.ref import TensorSpec

Parts: TypeAlias = Sequence[tuple[TensorSpec, torch.Tensor]]
"""The tensors of one feature, each with its place in the slot."""
Order: TypeAlias = Any
Words: TypeAlias = Any
"""Control words as `signal` takes them, from `adopt`."""
Word: TypeAlias = tuple[Words, int, int]
"""One of them, by its index, and what it is to say."""


class Unreachable(BackendUnavailable):
    """This device can't access the slab's memory: its reads go through host memory."""


class Segment(NamedTuple):
    """A piece of a slab's range that is sent to readers by itself."""

    start_bytes: int
    size_bytes: int
    fd: int
    """What they map it by; the slab's own."""


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
    """A slab as one process sees it, for reading."""

    @property
    def device(self) -> torch.device:
        """Where `view` tensors are."""

    @property
    def deferred(self) -> bool:
        """Whether a signal may land after `signal` returned (on a GPU's stream it does)."""

    @property
    def end_bytes(self) -> int:
        """Bytes from the start that are mapped here."""

    @property
    def zero_copy(self) -> bool:
        """Whether `view` is what a borrow lends; else it lends a copy."""

    def can_copy_to(self, device: torch.device | None) -> bool:
        """Whether `read` can copy to this device (None: the mapping's own) now."""

    def enable_device(self, device: torch.device) -> None:
        """Make `can_copy_to` true. May block."""

    def order(self, device: torch.device | None = None) -> Order:
        """Return the caller's place in the order of a device, the mapping's own if None."""

    def blocking_read_bytes(self, nbytes: int, device: torch.device | None) -> int:
        """How many bytes of host memory would hold up a thread as long as a read of `nbytes` does."""

    def view(
        self, offset_bytes: int, spec: TensorSpec, device: torch.device | None = None
    ) -> torch.Tensor:
        """Return a tensor over the slab's own bytes: no copy. Writing to it is not allowed."""

    def empty(self, spec: TensorSpec, device: torch.device | None) -> torch.Tensor:
        """Return a new tensor for `read`, contiguous, on `device` or the mapping's own.

        Separate from `read` because memory is best had in the thread that will let it go: malloc
        gives a thread's large blocks back to the system, and faults them in again, each time.
        """

    def fetch(
        self, offset_bytes: int, spec: TensorSpec, device: torch.device | None, order: Order
    ) -> torch.Tensor:
        """Do `empty` and `read` at once."""

    def read(self, offset_bytes: int, spec: TensorSpec, out: torch.Tensor, order: Order) -> None:
        """Copy the slab's bytes into a tensor of the spec's dtype and shape."""

    @property
    def writable(self) -> bool:
        """Whether `write` can be called: in the owner always, elsewhere after `open_for_writing`."""

    def open_for_writing(self, fds: Sequence[int]) -> None:
        """Map the slab for writing, by the descriptors that the owner sent for it. May block."""

    def stage(self, parts: Parts) -> tuple[Parts, Order]:
        """Return what `write` takes: the parts where it can copy from, and the caller's order."""

    def blocking_write_bytes(self, parts: Parts) -> int:
        """How many bytes of host memory would hold up a thread as long as this `write` does."""

    def write(
        self, offset_bytes: int, parts: Parts, order: Order, word: Word | None = None
    ) -> None:
        """Copy staged tensors to where their specs say, counted from `offset_bytes`.

        Then `signal` a word, if one is given: both at once cost less.
        """

    def adopt(self, block: Block, words: memoryview) -> Words:
        """Return some words of a block in the form that `signal` takes. May block."""

    def signal(self, words: Words, index: int, value: int, order: Order) -> None:
        """Store a control word behind everything that was asked for at this order."""

    def follow(self, order: Order, others: Sequence[Order]) -> Order:
        """Return an order that is behind all of these."""

    def extend(self, start_bytes: int, size_bytes: int, fd: int) -> None:
        """Map a segment that the owner made. May block. The descriptor stays the caller's."""

    def cut(self, end_bytes: int) -> None:
        """Unmap the segments from `end_bytes` on: nothing may be under way there. May block."""

    def finish(self) -> None:
        """Wait for everything that is under way on this process's devices. Blocks."""

    def close(self) -> None:
        """Let the mapping go: nothing may be under way on it. Views keep their bytes readable."""

    def forget(self) -> None:
        """Drop what can be dropped in a forked child."""


class Slab(Mapping, Protocol):
    """A slab as its owner has it: one range of addresses, memory behind a growing part of it."""

    @property
    def kind(self) -> str:
        """The backend's name, which a reader needs to map it."""

    @property
    def device_name(self) -> str:
        """The device by a name that other processes know: ``"cpu"`` or a GPU's UUID."""

    @property
    def handle(self) -> bytes:
        """What a reader opens it by where descriptors can't serve."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the range."""

    def commit(self, start_bytes: int, stop_bytes: int, *, prefault: bool) -> None:
        """Put memory behind a range. May block. Raise MemoryError, with nothing changed, if it can't."""

    def decommit(self, start_bytes: int, stop_bytes: int) -> None:
        """Give the memory behind a range back. May block."""

    def descriptors(self) -> list[int]:
        """Return the file descriptors that every reader needs; they stay the slab's own."""

    def write_descriptors(self) -> list[int]:
        """Return those that a session needs besides to write; they stay the slab's own."""

    def segments(self, start_bytes: int, stop_bytes: int) -> Sequence[Segment]:
        """Return the segments in a part of the range that are sent to readers, in order."""
