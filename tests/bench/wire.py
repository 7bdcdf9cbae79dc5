"""Shared by all loops: the payload, the touch, the answers, and the frames of the greeting."""

from __future__ import annotations

import socket
import struct
import zlib
from dataclasses import dataclass

import torch

SOURCES = 4
CONFIRM = struct.Struct("<qdq")
"""a reader's answer at the end of a phase: count, sum of touches, checksum"""
LENGTH = struct.Struct("<q")
FRAME = struct.Struct("<I")
"""the length before each ref of the systems that send refs of no fixed size"""
PHASES = ("warm", "verify", "calls", "trips", "pipe")


def make_sources(size: int) -> list[torch.Tensor]:
    """The tensors that are put in turn: random, the same in every run, warm."""
    generator = torch.Generator().manual_seed(size)
    return [torch.rand(size // 4, generator=generator) for _ in range(SOURCES)]


def touch(x: torch.Tensor) -> float:
    """Every reader's work on every feature."""
    return float(x[0].item() + x[-1].item())


def checksum(x: torch.Tensor) -> int:
    return zlib.crc32(x.numpy().data)


@dataclass(slots=True)
class Tally:
    """One reader's totals in one phase."""

    count: int = 0
    total: float = 0.0
    crc: int = 0

    def check(self, x: torch.Tensor) -> None:
        """Looks at all the bytes, and in the order in which they came."""
        self.crc = zlib.crc32(checksum(x).to_bytes(4, "little"), self.crc)

    def pack(self) -> bytes:
        return CONFIRM.pack(self.count, self.total, self.crc)


def expected(sources: list[torch.Tensor], count: int, *, checked: bool) -> Tally:
    """Every reader's right answer after `count` features."""
    tally = Tally(count=count)
    values = [touch(x) for x in sources]
    for n in range(count):
        if checked:
            tally.check(sources[n % len(sources)])
        else:
            tally.total += values[n % len(values)]
    return tally


def confirm(answers: list[bytes], wanted: Tally, phase: str) -> None:
    for index, data in enumerate(answers):
        if (seen := Tally(*CONFIRM.unpack(data))) != wanted:
            raise WrongContent(f"{phase}: reader {index} saw {seen}, not {wanted}")


class WrongContent(Exception):
    """A system lost a feature or handed out wrong bytes."""


def send_frame(sock: socket.socket, data: bytes) -> None:
    sock.sendall(LENGTH.pack(len(data)) + data)


def recv_exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = sock.recv(nbytes, socket.MSG_WAITALL)
    if len(data) != nbytes:
        raise ConnectionError("the other end has gone")
    return data


def recv_frame(sock: socket.socket) -> bytes:
    (nbytes,) = LENGTH.unpack(recv_exactly(sock, LENGTH.size))
    return recv_exactly(sock, nbytes) if nbytes else b""
