"""Frames: ``fc``, a version byte, how many descriptors belong to it, the payload's length, the payload.

The length has four bytes, little-endian.
"""

import enum
import struct
from typing import Final

from featcache.control.descriptors import MAX_DESCRIPTORS, Received
from featcache.control.messages import VERSION, ProtocolError

_HEADER: Final = struct.Struct("<2sBBI")
HEADER_BYTES: Final = _HEADER.size
pack_header, _unpack_header = _HEADER.pack, _HEADER.unpack_from
COUNT_AT: Final = 3
"""The offset of the number of descriptors in the header."""
MAGIC: Final = b"fc"
_WRONG_MAGIC: Final = "the peer does not speak featcache's protocol"


class Batching(enum.Enum):
    """When a frame that is sent reaches the socket.

    ::

        NONE ──read of several frames──→ READ ──they are handled──→ NONE
                                           │ requester
                                           ↓
        NONE ←──the loop's turn ends── TURN ──`send_next`──→ TURN_BEGUN ──the turn ends──→ NONE

    NONE: at once. READ: frames are gathered until those of the read are handled. TURN: the turn of the
    loop in which the tasks that were answered run; the first request goes at once, so that the peer has
    work, and the next (TURN_BEGUN) are gathered until the turn ends, before which none of these tasks
    could take an answer. A read of several frames within a turn returns to the state it found.
    """

    NONE = "none"
    READ = "read"
    TURN = "turn"
    TURN_BEGUN = "turn begun"


def frame_end(data: bytes | bytearray, start: int, limit_bytes: int, received: Received) -> int:
    """Return the end of the frame at `start`; 0 while it is not whole. `received` has the descriptors.

    A header is checked before its payload comes, and its magic before the header is whole: a peer
    of another kind or version is refused at its first bytes.
    """
    left = len(data) - start
    if left < HEADER_BYTES:
        if data[start : start + 2] != MAGIC[:left]:
            raise ProtocolError(_WRONG_MAGIC)
        return 0
    magic, version, count, length_bytes = _unpack_header(data, start)
    if magic != MAGIC:
        raise ProtocolError(_WRONG_MAGIC)
    if version != VERSION:
        raise ProtocolError(f"the peer speaks version {version}, this is version {VERSION}")
    if length_bytes > limit_bytes or count > MAX_DESCRIPTORS:
        raise ProtocolError(f"a frame of {length_bytes} bytes is over {limit_bytes}")
    if left < HEADER_BYTES + length_bytes:
        return 0
    if count and not received.has(count):
        raise ProtocolError("a message came without its descriptors")
    return start + HEADER_BYTES + int(length_bytes)
