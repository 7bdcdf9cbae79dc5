"""What looks at the bytes that were read: on the CPU at once, on a device in the order of its streams."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from soak.board import Word
from soak.keyed.words import (
    HEAD_MASK,
    INVERSE,
    KEYS,
    NAMES,
    SALT,
    Choice,
    head,
    signed,
    version_of,
)
from soak.process import Process

_cuda: Any = torch.cuda  # half of its functions have no types
_STREAMS: Final = 3
_LOOK_S: Final = 0.5
_BEHIND: Final = 64
"""Reads that a stream may be behind, before the CPU waits for it."""
_NOWHERE: Final = contextlib.nullcontext()
_VERSION_AT: Final = HEAD_MASK.bit_length()


class Eyes:
    """The checks of one thread."""

    def __init__(self, me: Process) -> None:
        self.me = me
        ledger = me.world.ledger  # type: ignore[attr-defined]  # a KeyedWorld
        self.begun, self.done = ledger.begun[me.place.pool], ledger.done[me.place.pool]
        self.chance = random.Random(me.chance.random())
        self.choice = Choice(self.chance)

    def lane(self) -> AbstractContextManager[None]:
        """Read what follows on the next stream, where there are any."""
        return _NOWHERE

    def work(self) -> None:
        """Keep the current stream busy for a while, where there is one."""

    def finish(self) -> None:
        """Wait for what the current stream has to do, where there is one."""

    def check(self, number: int, found: Any, least: int) -> None:
        """Look at every byte of a feature, whose version is `least` or later."""
        raise NotImplementedError

    def settle(self, *, at_once: bool = False) -> None:
        """Count what was wrong until now; seldom, unless `at_once`."""

    def _wrong(self, number: int, what: str, word: Word = Word.WRONG) -> None:
        self.me.row.count(word)
        self.me.world.board.fault(f"{word.name} at {self.me.place}: {NAMES[number]}, {what}")


class HostEyes(Eyes):
    """Compares with the last that this thread has read under the key, or works out what it is."""

    def __init__(self, me: Process) -> None:
        super().__init__(me)
        self._last: list[tuple[bytes, int]] = [(b"", 0)] * KEYS

    def check(self, number: int, found: Any, least: int) -> None:
        """As `Eyes.check`, now."""
        data = found.numpy().tobytes()
        last, version = self._last[number]
        if data != last:
            version = version_of(number, data)
            if not 0 <= version <= self.begun[number]:
                self._wrong(number, f"{len(data)} bytes, {data[:24].hex()}…{data[-16:].hex()}")
                return
            self._last[number] = data, version
        if version < least:
            self._wrong(number, f"version {version} where {least} had been put", Word.STALE)


class DeviceEyes(Eyes):
    """Counts wrong words on the device itself, by streams that are late by chance."""

    def __init__(self, me: Process) -> None:
        super().__init__(me)
        device = torch.device(me.made_on)
        self._is_gpu = self.has_streams(device)
        if self._is_gpu:
            _cuda.set_device(device)  # of this thread
        self._streams: list[Any] = [
            _cuda.Stream(device) if self._is_gpu else None for _ in range(_STREAMS)
        ]
        self._counts = [torch.zeros(2, dtype=torch.int64, device=device) for _ in self._streams]
        if self._is_gpu:
            _cuda.synchronize(device)
        self._marks: list[Any] = [None] * _STREAMS
        self._since = [0] * _STREAMS
        self._turn = 0
        self._told = [0, 0]
        self._look_s = time.monotonic() + _LOOK_S

    @staticmethod
    def has_streams(device: torch.device) -> bool:
        """Whether a device has streams."""
        return device.type == "cuda"

    @contextlib.contextmanager
    def lane(self) -> Iterator[None]:
        """As `Eyes.lane`: the streams come by turns."""
        self._turn = turn = (self._turn + 1) % _STREAMS
        stream = self._streams[turn]
        with contextlib.nullcontext() if stream is None else _cuda.stream(stream):
            yield
            if stream is not None:
                self._bound(turn)
        self._turn = turn  # of a lane within a lane

    def _bound(self, turn: int) -> None:
        self._since[turn] += 1
        if self._since[turn] < _BEHIND:
            return
        self._since[turn] = 0
        if self._marks[turn] is not None:
            self._marks[turn].synchronize()
        self._marks[turn] = _cuda.Event()
        self._marks[turn].record()

    def work(self) -> None:
        """As `Eyes.work`: of a length by chance, so that what began first does not end first."""
        if self._is_gpu and self.chance.random() < 0.2:
            _cuda._sleep(int(1.7e6 * 0.5 * self.chance.random() ** 3))

    def finish(self) -> None:
        """As `Eyes.finish`."""
        if self._is_gpu:
            _cuda.current_stream().synchronize()

    def check(self, number: int, found: Any, least: int) -> None:
        """As `Eyes.check`, when the current stream comes to it."""
        whole = found.view(torch.int64) if found.numel() * found.itemsize % 8 == 0 else None
        if whole is None:  # an odd number of bytes: its last word is not aligned
            nbytes = found.numel()
            whole = torch.cat([found[: (nbytes - 8) // 8 * 8], found[-8:]]).view(torch.int64)
            tail = found[(nbytes - 8) // 8 * 8 : -8]
            bad = (tail != whole[:1].view(torch.uint8)[: tail.numel()]).sum()
        else:
            bad = torch.zeros((), dtype=torch.int64, device=found.device)
        word = whole[0]
        told = (word - signed(SALT)) * signed(INVERSE)
        bad = bad + (whole[:-1] != word).sum() + (whole[-1] != ~word)
        bad = bad + ((told & HEAD_MASK) != head(number, found.numel() * found.itemsize))
        version = (told >> _VERSION_AT) & (1 << (64 - _VERSION_AT)) - 1
        bad = bad + (version > self.begun[number])
        counts = self._counts[self._turn]
        counts[0] += bad
        counts[1] += version < least

    def settle(self, *, at_once: bool = False) -> None:
        """As `Eyes.settle`: this waits for the streams."""
        if not at_once and time.monotonic() < self._look_s:
            return
        if self._is_gpu:
            for stream in self._streams:
                stream.synchronize()
        sums = [sum(int(count[at]) for count in self._counts) for at in range(2)]
        for at, word in enumerate((Word.WRONG, Word.STALE)):
            if sums[at] > self._told[at]:
                self._wrong(0, f"among the last {_LOOK_S} s: {sums[at] - self._told[at]}", word)
        self._told = sums
        self._look_s = time.monotonic() + _LOOK_S


def eyes_of(me: Process) -> Eyes:
    """The eyes that fit a place."""
    on_device = me.device is not None or me.place.role.value.endswith("device")
    return DeviceEyes(me) if on_device else HostEyes(me)
