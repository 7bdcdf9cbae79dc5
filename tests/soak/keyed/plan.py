"""The places of the keyed storm, its slab, and what its processes share."""

from __future__ import annotations

from typing import Final

import attrs

from featcache import Settings
from soak.keyed.words import Ledger, Lengths
from soak.plan import MIB, Place, Role, Sizes, World

TTL_S: Final = 0.05
_CAST: Final[tuple[tuple[Role, int, bool], ...]] = (
    (Role.OWNER, 0, False),
    (Role.OWNER, 1, True),
    (Role.KEYED, 0, True),
    (Role.KEYED, 0, False),
    (Role.KEYED_THREADS, 0, True),
    (Role.KEYED_BLOCKING, 0, True),
    (Role.KEYED_ON_DEVICE, 0, True),
    (Role.KEYED_WRITER, 0, True),
    (Role.KEYED_WRITER, 0, False),
    (Role.KEYED, 1, True),
)


def cast() -> list[Place]:
    """All places. The owners come first; on GPUs places take them by turns."""
    return [
        Place(number, role, pool, None, mortal) for number, (role, pool, mortal) in enumerate(_CAST)
    ]


def lengths_of(device: str) -> Lengths:
    """How long features are: on a GPU of whole words."""
    return Lengths(256, 1) if device == "cpu" else Lengths(4096, 8)


@attrs.frozen
class KeyedSizes(Sizes):
    """A slab that holds about half of what is put."""

    @classmethod
    def of(cls, device: str) -> KeyedSizes:
        """The sizes for a device."""
        if device == "cpu":
            return cls(MIB, MIB // 8, 0, 0, 0)
        return cls(16 * MIB, 2 * MIB, 0, 0, 0)

    def settings(self) -> Settings:
        """The settings of owners and clients."""
        return Settings(
            capacity=self.capacity_bytes,
            initial=self.segment_bytes,
            segment=self.segment_bytes,
            idle=0.1,
            ttl=TTL_S,
            slots=2048,
            sessions=512,
            log_interval=3600.0,
        )


@attrs.frozen
class KeyedWorld(World):
    """All that the processes share."""

    ledger: Ledger
    between_s: float
    """Mean time between two steps at which a reader stops or kills itself."""
