"""Features of one word: every word of one tells its key, its size and its version, the last one inverted.

So a reader, which can't know which version it is to find, can tell of every byte whether it belongs there:
the whole feature is of one version, of the key that was asked for, and as long as it was put.
"""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Container
from itertools import accumulate
from typing import Final

import attrs
import torch

KEYS: Final = 1024
NAMES: Final = [f"key-{number}" for number in range(KEYS)]
OWNERS, OWNERS_TOO, LASTING_WRITERS, WRITERS, MADE = range(5)
"""Who puts a key: one task of the owner, another one, a client that is never killed, one that is, whoever
wants it first. No two that put one key at once: the older feature might be published last."""
_WHO: Final = (OWNERS,) * 12 + (OWNERS_TOO, LASTING_WRITERS, WRITERS, MADE)
_SIZE_AT: Final = 12
_VERSION_AT: Final = 33
HEAD_MASK: Final = (1 << _VERSION_AT) - 1
_MASK: Final = (1 << 64) - 1
FACTOR: Final = 0x9E3779B97F4A7C15  # odd: the words of two heads differ at many places
INVERSE: Final = pow(FACTOR, -1, 1 << 64)
SALT: Final = 0x243F6A8885A308D3
_word: Final = struct.Struct("=Q")
LEAST_BYTES: Final = 2 * _word.size


def who_puts(number: int) -> int:
    """Who puts a key."""
    return _WHO[number % len(_WHO)]


def head(number: int, nbytes: int) -> int:
    """What the words of all versions of such a feature tell."""
    return number | nbytes << _SIZE_AT


def word_of(number: int, nbytes: int, version: int) -> int:
    """The word that fills a feature, unsigned."""
    return ((head(number, nbytes) | version << _VERSION_AT) * FACTOR + SALT) & _MASK


def signed(word: int) -> int:
    """The same bits as torch's 64-bit integers have them."""
    return word - (1 << 64) if word >> 63 else word


def bytes_of(number: int, nbytes: int, version: int) -> bytes:
    """The feature, of any length of at least two words."""
    word = word_of(number, nbytes, version)
    body = _word.pack(word) * (nbytes // _word.size)
    return body[: nbytes - _word.size] + _word.pack(word ^ _MASK)


def make(number: int, nbytes: int, version: int, device: str) -> torch.Tensor:
    """The feature as a tensor: bytes on the CPU, words on a GPU, which counts them there."""
    if device == "cpu":
        return torch.frombuffer(bytearray(bytes_of(number, nbytes, version)), dtype=torch.uint8)
    word = signed(word_of(number, nbytes, version))
    feature = torch.full((nbytes // _word.size,), word, dtype=torch.int64, device=device)
    feature[-1] = ~word
    return feature


def version_of(number: int, data: bytes) -> int:
    """The version of a feature of a key that was read, or -1 if a byte of it is wrong."""
    if len(data) < LEAST_BYTES:
        return -1
    told = (_word.unpack_from(data)[0] - SALT) * INVERSE & _MASK
    version = int(told >> _VERSION_AT)
    return version if data == bytes_of(number, len(data), version) else -1


@attrs.frozen
class Lengths:
    """How long features are: mostly short, by chance, those of keys that are made by their number."""

    unit_bytes: int
    """The shortest; the longest is 256 times that."""
    step_bytes: int

    def by(self, chance: random.Random) -> int:
        """A length in bytes."""
        most = chance.choices((16, 64, 256), (86, 12, 2))[0]
        nbytes = int(self.unit_bytes * most ** chance.random())
        return max(LEAST_BYTES, nbytes // self.step_bytes * self.step_bytes)

    def of_made(self, number: int) -> int:
        """The length of a key that whoever wants it makes."""
        return self.by(random.Random(number))


class Ledger:
    """Which versions of each key were put, in shared memory, and who stopped where.

    Each number is written by one process at a time.
    """

    def __init__(self, places: int, steps: int) -> None:
        pools, tables = 2, 2
        self._steps = steps
        words = pools * tables * KEYS
        memory = memoryview(mmap.mmap(-1, (words + places * steps) * 8)).cast("q")
        tables_of = [memory[at : at + KEYS] for at in range(0, words, KEYS)]
        self.begun, self.done = tables_of[:pools], tables_of[pools:]
        """Of each pool, by key: the version whose put began last, and the last one that has ended.

        A later lookup finds no version before that one. Of keys that a process puts which may be killed none
        is said to have ended: what the next one puts may be overtaken by what the dead one had sent.
        """
        self._stops = memory[words:]
        for table in self.begun:
            for number in range(KEYS):
                table[number] = who_puts(number) == MADE

    def stopped(self, place: int, step: int) -> None:
        """Count a stop at a step."""
        at = place * self._steps + step
        self._stops[at] = self._stops[at] + 1

    def stops(self, step: int) -> int:
        """The stops at a step, of all places."""
        return sum(self._stops[step :: self._steps])


class Choice:
    """Keys by chance, a few much more often than most."""

    def __init__(self, chance: random.Random, among: Container[int] | None = None) -> None:
        wanted = range(KEYS) if among is None else among
        ranks = list(range(KEYS))
        random.Random(1).shuffle(ranks)  # the same ones are popular with all
        numbers = [number for number in ranks if number in wanted]
        weights = list(accumulate(1 / (rank + 2) ** 1.1 for rank in range(len(numbers))))
        self._numbers = chance.choices(numbers, cum_weights=weights, k=1 << 12)
        self._at = 0

    def next(self, count: int) -> list[int]:
        """The next keys."""
        if self._at + count > len(self._numbers):
            self._at = 0
        self._at += count
        return self._numbers[self._at - count : self._at]

    def one(self) -> int:
        """The next key."""
        return self.next(1)[0]
