"""Features whose content is a function of their number, made and checked where they are.

Word *i* of feature *n* is ``n * STEP + i`` (64 bits, wrapping), cut off at the feature's length, so
that every word tells which feature it belongs to and where in it. Wrong bytes are counted by the GPU itself,
into a counter for each stream: nothing waits for a feature, and none goes unseen.
"""

from __future__ import annotations

import contextlib
import math
import random
from contextlib import AbstractContextManager
from typing import Any

import torch

STEP = 0x9E3779B97F4A7C15  # odd and irregular: no two features have a word in common
POISON = 0xA5
_WORD = 8
_cuda: Any = torch.cuda  # half of its functions have no types


def _start(number: int) -> int:
    value = number * STEP & (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def log_uniform(random_: random.Random, least: int, most: int) -> int:
    """A size in bytes, as often between 1 and 2 KiB as between 1 and 2 MiB; odd ones too."""
    return int(math.exp(random_.uniform(math.log(least), math.log(most + 0.5))))


class Patterns:
    """Fills and checks features of up to `max_feature_bytes` on one device, on streams in rotation."""

    def __init__(self, device: str, max_feature_bytes: int, streams: int = 1) -> None:
        self.device = torch.device(device)
        words = -(-max_feature_bytes // _WORD)
        self._places = torch.arange(words, dtype=torch.int64, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            self._streams: list[Any] = [_cuda.Stream(self.device) for _ in range(streams)]
        else:
            self._streams = [None] * streams
        self._turn = 0
        self._buffers = [torch.empty_like(self._places) for _ in self._streams]
        self._wrong = [
            torch.zeros((), dtype=torch.int64, device=self.device) for _ in self._streams
        ]
        self.settle()

    def next_stream(self) -> AbstractContextManager[Any]:
        """Make the next stream the current one for a block; on the CPU there is none."""
        self._turn = (self._turn + 1) % len(self._streams)
        stream = self._streams[self._turn]
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

    def drowse(self, milliseconds: float) -> None:
        """Keep the current stream busy, so that later work on it comes late."""
        if self.device.type == "cuda":
            _cuda._sleep(int(milliseconds * 1.7e6))

    def fill(self, number: int, nbytes: int) -> torch.Tensor:
        """The feature, in this stream's own buffer: the stream's next `fill` overwrites it."""
        words = -(-nbytes // _WORD)
        buffer = self._buffers[self._turn]
        torch.add(self._places[:words], _start(number), out=buffer[:words])
        return buffer.view(torch.uint8)[:nbytes]

    def room(self, nbytes: int) -> torch.Tensor:
        """This stream's own buffer, to read into."""
        return self._buffers[self._turn].view(torch.uint8)[:nbytes]

    def check(self, number: int, found: Any) -> None:
        """Count the bytes of `found` that are not the feature's, in the order of this stream."""
        words = -(-found.numel() // _WORD)
        expected = (self._places[:words] + _start(number)).view(torch.uint8)[: found.numel()]
        self._wrong[self._turn] += torch.ne(found, expected).sum()

    def settle(self) -> None:
        """Wait for all work on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wrong_bytes(self) -> int:
        """How many bytes were wrong until now, once all that was asked is done."""
        self.settle()
        return sum(int(wrong.item()) for wrong in self._wrong)
