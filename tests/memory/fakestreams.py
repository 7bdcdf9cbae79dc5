"""Streams that do what they were given when a test says so: FIFO queues, ordered by events.

Until then it is "in flight", as it might be on a GPU for as long as it likes.
"""

import ctypes
import itertools
from collections import deque
from dataclasses import dataclass, field

from memory.fakememory import FakeMemory
from memory.fakepages import Broken, Code, Refused, refuse_unless


@dataclass(eq=False)
class _Mark:
    """One record of an event; past when its stream has come to it."""

    stream: "Stream"
    past: bool = False


@dataclass(eq=False)
class _Wait:
    mark: _Mark


@dataclass(eq=False)
class _Copy:
    ordinal: int
    target: int
    source: int
    nbytes: int
    staged: bytes | None = None
    """What was at a pageable source when the copy was enqueued: the driver takes it at once."""
    to_host: bool = False

    def ranges(self) -> list[tuple[int, int]]:
        ends = [*([] if self.to_host else [self.target])]
        ends += [self.source] if self.staged is None else []
        return [(end, self.nbytes) for end in ends]


@dataclass(eq=False)
class _Word:
    ordinal: int
    address: int
    value: int


@dataclass(eq=False)
class Stream:
    raw: int
    ordinal: int
    ours: bool
    """Made by a call; else torch's, or the default one."""
    work: "deque[_Mark | _Wait | _Copy | _Word]" = field(default_factory=deque)


class FakeStreams:
    """The streams and events of one process."""

    def __init__(self, memory: FakeMemory) -> None:
        self._memory = memory
        self._numbers = itertools.count(0x5000)
        self.streams: dict[tuple[int, int], Stream] = {}
        self.events: dict[int, _Mark | None] = {}
        self._event_ordinals: dict[int, int] = {}

    def new(self, ordinal: int, *, ours: bool) -> int:
        raw = next(self._numbers)
        self.streams[ordinal, raw] = Stream(raw, ordinal, ours)
        return raw

    def find(self, raw: int, ordinal: int, *, foreign: bool = False) -> Stream:
        """Return a stream of the current context; 0 is its default one. `foreign` ones may be others'."""
        if raw == 0:
            return self.streams.setdefault((ordinal, 0), Stream(0, ordinal, ours=False))
        for stream in self.streams.values():
            if stream.raw == raw and (foreign or stream.ordinal == ordinal):
                return stream
        raise Refused(Code.CUDA_ERROR_INVALID_HANDLE)

    def end(self, raw: int, ordinal: int) -> None:
        stream = self.find(raw, ordinal)
        if not stream.ours:
            raise Broken(f"stream {raw:#x} is destroyed, and is not ours")
        self.drain(stream)  # its work is still done, only nobody can ask for it any more
        del self.streams[stream.ordinal, raw]

    # --- what streams are given -------------------------------------------------------------------

    def copy(self, stream: Stream, target: int, source: int, nbytes: int) -> None:
        memory, ordinal = self._memory, stream.ordinal
        copy = _Copy(ordinal, target, source, nbytes)
        if memory.is_device(source):
            memory.reach(ordinal, source, nbytes, write=False)
        else:
            copy.staged = ctypes.string_at(source, nbytes)
        if memory.is_device(target):
            memory.reach(ordinal, target, nbytes, write=True)
        else:
            copy.to_host = True
        if copy.to_host and copy.staged is not None:
            raise Broken(f"neither {target:#x} nor {source:#x} is a device's address")
        stream.work.append(copy)
        if copy.to_host:  # to pageable memory: the driver returns when it is done
            self.drain(stream)

    def word(self, stream: Stream, address: int, value: int) -> None:
        refuse_unless(address % 8 == 0)
        self._memory.reach(stream.ordinal, address, 8, write=True)
        stream.work.append(_Word(stream.ordinal, address, value))

    def event(self, ordinal: int) -> int:
        number = next(self._numbers)
        self.events[number] = None
        self._event_ordinals[number] = ordinal
        return number

    def record(self, event: int, stream: Stream) -> None:
        refuse_unless(event in self.events, Code.CUDA_ERROR_INVALID_HANDLE)
        same = self._event_ordinals[event] == stream.ordinal
        refuse_unless(same, Code.CUDA_ERROR_INVALID_HANDLE)
        mark = self.events[event] = _Mark(stream)
        stream.work.append(mark)

    def wait(self, stream: Stream, event: int) -> None:
        refuse_unless(event in self.events, Code.CUDA_ERROR_INVALID_HANDLE)
        mark = self.events[event]
        if mark is not None:
            stream.work.append(_Wait(mark))

    def drop(self, event: int) -> None:
        refuse_unless(event in self.events, Code.CUDA_ERROR_INVALID_HANDLE)
        del self.events[event]

    # --- how they do it -----------------------------------------------------------------------------

    def in_flight(self, address: int, size: int) -> bool:
        """Whether work that is not done yet touches these addresses."""
        for stream in self.streams.values():
            for work in stream.work:
                ranges = (
                    work.ranges()
                    if isinstance(work, _Copy)
                    else [(work.address, 8)]
                    if isinstance(work, _Word)
                    else []
                )
                if any(at < address + size and address < at + n for at, n in ranges):
                    return True
        return False

    def run(self, stream: Stream) -> None:
        """Have a stream do what it can without any other's help."""
        while stream.work:
            head = stream.work[0]
            if isinstance(head, _Wait) and not head.mark.past:
                return
            self._do(stream.work.popleft())

    def step(self, stream: Stream) -> None:
        """Have a stream do one piece of its work."""
        self._do(stream.work.popleft())

    def drain(self, stream: Stream) -> None:
        """Have a stream do it all, and others what it waits for."""
        while stream.work:
            self.run(stream)
            if stream.work:
                head = stream.work[0]
                assert isinstance(head, _Wait), "only a wait stops a stream"
                self._until(head.mark)

    def _until(self, mark: _Mark) -> None:
        while not mark.past:
            self.run(mark.stream)
            if not mark.past:
                head = mark.stream.work[0]
                assert isinstance(head, _Wait), "only a wait stops a stream"
                self._until(head.mark)

    def _do(self, work: _Mark | _Wait | _Copy | _Word) -> None:
        memory = self._memory
        if isinstance(work, _Mark):
            work.past = True
        elif isinstance(work, _Copy):
            source: bytes | int | None = work.staged
            if source is None:
                source = memory.reach(work.ordinal, work.source, work.nbytes, write=False)
            target = work.target
            if not work.to_host:
                target = memory.reach(work.ordinal, target, work.nbytes, write=True)
            ctypes.memmove(target, source, work.nbytes)
        elif isinstance(work, _Word):
            at = memory.reach(work.ordinal, work.address, 8, write=True)
            ctypes.c_uint64.from_address(at).value = work.value
