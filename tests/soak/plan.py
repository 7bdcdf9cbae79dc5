"""The places of a soak: which processes there are, what each does, which pool it is at."""

from __future__ import annotations

import enum
import socket
from pathlib import Path
from typing import Final

import attrs

from featcache import Settings
from soak.board import Board

TTL_S: Final = 2.0
MIB: Final = 1 << 20


class Role(enum.Enum):
    """What a process does. `soak.workers.SCRIPTS` has the script of each."""

    OWNER = "owner"
    READER = "reader"
    BORROWER = "borrower"
    RELAYED = "reader through the host"
    ROAMER = "reader of any pool"
    MAKER = "by key"
    WRITER = "writer"
    BLOCKING = "blocking"
    FICKLE = "cancels"
    FORGER = "forged refs"
    VANDAL = "forged frames"
    KEYED = "by key, itself"
    KEYED_ON_DEVICE = "by key, itself, checked on the device"
    KEYED_THREADS = "by key, itself, in threads"
    KEYED_BLOCKING = "by key, itself, blocking"
    KEYED_WRITER = "puts by key"


@attrs.frozen
class Place:
    """A place that one process after another has."""

    number: int
    role: Role
    pool: int
    """0 is the pool of the owner that lasts, 1 that of the owner that is killed too."""
    name: str | None = None
    mortal: bool = True
    """Whether it is killed; stopped and limited is every one."""

    @property
    def reads(self) -> bool:
        """Whether refs are sent to it."""
        readers = (
            Role.READER,
            Role.BORROWER,
            Role.RELAYED,
            Role.ROAMER,
            Role.BLOCKING,
            Role.FORGER,
        )
        return self.role in readers

    def __str__(self) -> str:
        return f"{self.number} ({self.name or self.role.value}, pool {self.pool})"


_CAST: Final[tuple[tuple[Role, int, str | None, bool], ...]] = (
    (Role.OWNER, 0, None, False),
    (Role.OWNER, 1, None, True),
    (Role.READER, 0, "tp0", True),
    (Role.READER, 0, "tp1", True),
    (Role.BORROWER, 0, "tp2", True),
    (Role.READER, 0, None, True),
    (Role.BORROWER, 0, None, False),
    (Role.RELAYED, 0, "tp3", True),
    (Role.MAKER, 0, None, True),
    (Role.MAKER, 0, None, True),
    (Role.WRITER, 0, None, True),
    (Role.BLOCKING, 0, None, True),
    (Role.FICKLE, 0, None, True),
    (Role.FICKLE, 0, None, False),
    (Role.FORGER, 0, None, True),
    (Role.VANDAL, 0, None, True),
    (Role.READER, 1, "tp4", True),
    (Role.MAKER, 1, None, True),
    (Role.WRITER, 1, None, False),
    (Role.ROAMER, 1, None, False),
)


def cast() -> list[Place]:
    """All places. The owners come first."""
    return [
        Place(number, role, pool, name, mortal)
        for number, (role, pool, name, mortal) in enumerate(_CAST)
    ]


@attrs.frozen
class Sizes:
    """How large slabs and features are: those of a GPU take long enough to be killed in their copies."""

    capacity_bytes: int
    segment_bytes: int
    spill_bytes: int
    most_words: int
    key_words: int

    @classmethod
    def of(cls, device: str) -> Sizes:
        """The sizes for a device."""
        if device == "cpu":
            return cls(32 * MIB, 4 * MIB, 16 * MIB, MIB // 8, 32 << 10 >> 3)
        return cls(2048 * MIB, 128 * MIB, 512 * MIB, 64 * MIB // 8, 8 * MIB // 8)

    def settings(self) -> Settings:
        """The settings of owners and clients."""
        return Settings(
            capacity=self.capacity_bytes,
            initial=self.segment_bytes,
            segment=self.segment_bytes,
            idle=1.0,
            ttl=TTL_S,
            relay_ttl=TTL_S,
            slots=1024,
            sessions=512,
            log_interval=3600.0,
        )


@attrs.define
class Mail:
    """One mailbox a place, filled with messages (`content.pack`) by whoever puts.

    It is the place's own, not the process's: what a process that was killed had not taken out, the next
    one takes.
    """

    boxes: list[tuple[socket.socket, socket.socket]]

    @classmethod
    def open(cls, places: int) -> Mail:
        """Make the mailboxes, which forked processes inherit."""
        boxes = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(places)]
        for box in boxes:
            for end in box:
                end.setblocking(False)
        return cls(boxes)

    def send(self, place: Place, message: bytes) -> bool:
        """Send, unless the mailbox is full."""
        try:
            self.boxes[place.number][0].send(message)
        except OSError:  # full, or a limit on this process
            return False
        return True

    def inbox(self, place: Place) -> socket.socket:
        """The end that a place reads."""
        return self.boxes[place.number][1]


@attrs.frozen
class World:
    """All that the processes of a soak share."""

    seed: int
    device: str
    folder: Path
    places: list[Place]
    board: Board
    mail: Mail
    sizes: Sizes

    def endpoint(self, pool: int) -> str:
        """Where a pool's owner listens."""
        return str(self.folder / f"pool{pool}.sock")

    def readers(self, pool: int) -> list[Place]:
        """The places that refs of a pool are sent to."""
        return [
            place
            for place in self.places
            if place.reads and (place.pool == pool or place.role is Role.ROAMER)
        ]
