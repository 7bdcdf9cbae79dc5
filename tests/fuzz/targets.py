"""The targets: what comes of any bytes is a valid object or an error of the tree, and nothing else.

Each takes bytes and returns whether something was decoded. What decodes is encoded again and must
come back equal. The first bytes of an input choose what is done with the rest.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import socket
import struct
import zlib
from array import array
from collections.abc import Callable
from typing import Any, Final

import msgspec
import torch

import featcache
from featcache import FeatcacheError, FeatureCache, FeatureRef, MalformedRef
from featcache.control.channel import Channel, ChannelState
from featcache.control.descriptors import MAX_DESCRIPTORS, close_all
from featcache.control.messages import (
    VERSION,
    ProtocolError,
    decode_from_client,
    decode_from_owner,
    encode,
)
from featcache.control.observing import decode_for_observer, decode_from_observer
from featcache.ref import MAX_REF_BYTES

outcomes: Final[set[object]] = set()
"""What messages were found to be, or why none: their decoder is in C, where coverage sees nothing."""
_LIMIT_BYTES: Final = 4096
_HEADER: Final = struct.Struct("<2sBBI")
_SPEC_FIELDS: Final = 4


def _expect(holds: object, what: str) -> None:
    if not holds:
        raise AssertionError(what)


# --- refs ----------------------------------------------------------------------------------------


def sealed(body: bytes) -> bytes:
    """These bytes as a ref with a valid checksum."""
    return b"fR\x01" + zlib.crc32(body).to_bytes(4, "little") + body


def ref(data: bytes) -> bool:
    """Decode bytes as a ref: as they are, under a right checksum, from a pickle, or field by field."""
    ways = (FeatureRef.from_bytes, _of_sealed, _of_pickle, _of_fields)
    try:
        found = ways[data[0] % len(ways) if data else 0](data[1:])
    except MalformedRef:
        return False
    if found is None:
        return False
    wire = found.to_bytes()
    _expect(len(wire) <= MAX_REF_BYTES, "a ref longer than a ref may be")
    for again in (FeatureRef.from_bytes(wire), pickle.loads(pickle.dumps(found))):
        _expect(again == found, "a ref that comes back as another")
        _expect(hash(again) == hash(found), "equal refs of unequal hashes")
    for spec in found.specs:
        _expect(spec.offset_bytes + spec.nbytes <= found.nbytes, "a tensor outside its extent")
    return True


def _of_sealed(body: bytes) -> FeatureRef:
    return FeatureRef.from_bytes(sealed(body))


def _of_pickle(body: bytes) -> FeatureRef:
    rebuild: Callable[[bytes], FeatureRef] = _A_REF.__reduce__()[0]
    return rebuild(sealed(body))


def _of_fields(body: bytes) -> FeatureRef | None:
    """Make a ref by hand of whatever objects the bytes are."""
    try:
        fields = msgspec.msgpack.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(fields, list) or len(fields) != len(FeatureRef.__struct_fields__):
        return None
    # A ref that equals a known one is not looked at again, and to Python True equals 1.
    featcache.ref._sound.clear()
    if isinstance(fields[-1], list):
        fields[-1] = tuple(_spec(spec) for spec in fields[-1])
    return FeatureRef(*fields)


def _spec(spec: Any) -> Any:
    if not isinstance(spec, list) or len(spec) != _SPEC_FIELDS:
        return spec
    name, dtype, shape, offset_bytes = spec
    return featcache.ref.TensorSpec(
        name, dtype, tuple(shape) if isinstance(shape, list) else shape, offset_bytes
    )


# --- messages ------------------------------------------------------------------------------------


_DECODERS: Final = (
    decode_from_client,
    decode_from_owner,
    decode_from_observer,
    decode_for_observer,
)


def message(data: bytes) -> bool:
    """Decode bytes as a message of a client, of an owner, of an observer, or to one."""
    decode: Callable[[bytes], Any] = _DECODERS[data[0] % len(_DECODERS) if data else 0]
    try:
        found = decode(data[1:])
    except ProtocolError as error:
        outcomes.add(re.sub(r"\d+|'[^']*'|`[^`]*`", "", str(error)))
        return False
    outcomes.add(type(found).__name__)
    # By their text: what is not a number is not equal to itself.
    again = repr(decode(encode(found)))
    _expect(again == repr(found), "a message that comes back as another")
    return True


# --- frames --------------------------------------------------------------------------------------


class FrameModel:
    """What a channel should make of a stream: the frames in it, and whether it breaks the protocol."""

    def __init__(self) -> None:
        self.frames: list[tuple[bytes, int]] = []
        self.broken = False
        self._data = b""
        self._descriptors = 0

    def take(self, data: bytes, descriptors: int) -> None:
        """Take what one read brings."""
        self._data += data
        self._descriptors += descriptors
        if self._descriptors > 2 * MAX_DESCRIPTORS:
            self.broken = True
        while not self.broken and self._data:
            header, size = self._data[: _HEADER.size], _HEADER.size
            if len(header) < size:
                self.broken = header[:2] != b"fc"[: len(header)]
                return
            magic, version, count, length = _HEADER.unpack(header)
            if (
                (magic, version) != (b"fc", VERSION)
                or length > _LIMIT_BYTES
                or count > MAX_DESCRIPTORS
            ):
                self.broken = True
            elif len(self._data) < size + length:
                return
            elif count > self._descriptors:
                self.broken = True
            else:
                self.frames.append((self._data[size : size + length], count))
                self._data = self._data[size + length :]
                self._descriptors -= count


_LOOP: Final = asyncio.new_event_loop()


def frames(data: bytes) -> bool:
    """Send a stream in pieces, with descriptors, through a channel; compare with the model.

    The input is a list of pieces: their length in a byte, the number of their descriptors in another.
    """
    return _LOOP.run_until_complete(_frames(data))


async def _frames(data: bytes) -> bool:
    here, there = socket.socketpair()
    null = os.open("/dev/null", os.O_RDONLY)
    before = _open_count()
    got: list[tuple[bytes, int]] = []
    lost: list[Exception | None] = []

    def on_message(payload: bytes, fds: list[int]) -> None:
        got.append((payload, len(fds)))
        close_all(fds)

    channel, model = Channel(here, _LIMIT_BYTES, on_message, lost.append), FrameModel()
    try:
        while len(data) > 2 and channel.state is ChannelState.OPEN:
            size, count = data[0], data[1] % (MAX_DESCRIPTORS + 8)
            piece, data = data[2 : 2 + size], data[2 + size :]
            if not piece:
                continue
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [null] * count))
            there.sendmsg([piece], [rights] if count else [])
            channel._readable()
            if count > MAX_DESCRIPTORS:
                model.broken = True
            else:
                model.take(piece, count)
    finally:
        channel.close()
        there.close()
        left = _open_count() - before + 2  # both ends are closed
        os.close(null)
    _expect(got == model.frames, "other frames than those that were sent")
    _expect(bool(lost) == model.broken, "lost where nothing is broken, or the reverse")
    _expect(all(isinstance(error, ProtocolError) for error in lost), "lost for another reason")
    _expect(len(lost) <= 1, "lost twice")
    _expect(left == 0, f"{left} descriptors left")
    return bool(got)


def _open_count() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted only


# --- forged refs against a live owner --------------------------------------------------------------

_A_REF: Final = FeatureRef(
    bytes(16), "/e.sock", 1, 1, 0, 8, (featcache.ref.TensorSpec(None, "uint8", (8,), 0),)
)
_FIELDS: Final = struct.Struct("<BiiQQ")


class LiveOwner:
    """An owner with a few features, of which one is read by refs that are forged."""

    def __init__(self) -> None:
        self.cache: FeatureCache = featcache.create(capacity="1MiB", segment="1MiB")
        _LOOP.run_until_complete(self.cache.open())
        self._put()

    def _put(self) -> None:
        async def put() -> FeatureRef:
            features = [torch.full((999,), number, dtype=torch.uint8) for number in range(3)]
            refs = [await self.cache.put(feature, ttl=None) for feature in features]
            for ref in (refs[0], refs[2]):
                await self.cache.discard(ref)
            return refs[1]

        self._ref = _LOOP.run_until_complete(put())

    def read(self, data: bytes) -> bool:
        """Read by a forged ref; only another view of the same extent may give bytes."""
        forged = self._forged(data)
        if forged is None:
            return False

        async def read() -> Any:
            return self.cache.get_nowait(forged)

        try:
            found = _LOOP.run_until_complete(read())
        except FeatcacheError:
            return False
        same = ("pool_id", "slot", "generation", "offset_bytes", "nbytes")
        for name in same:
            _expect(getattr(forged, name) == getattr(self._ref, name), f"bytes of another {name}")
        parts = found.values() if isinstance(found, dict) else [found]
        for part in parts:
            _expect(
                all(byte == 1 for byte in part.contiguous().view(-1).view(torch.uint8)), "wrong"
            )
        self._put()
        return True

    def _forged(self, data: bytes) -> FeatureRef | None:
        """Change the fields of the live ref by numbers of the input, its specs by the rest."""
        if len(data) < _FIELDS.size:
            return None
        which, slot, generation, offset_bytes, nbytes = _FIELDS.unpack_from(data)
        ref, rest = self._ref, data[_FIELDS.size :]
        changes: dict[str, Any] = {
            "slot": ref.slot + slot,
            "generation": ref.generation + generation,
            "offset_bytes": offset_bytes,
            "nbytes": nbytes,
        }
        chosen = {
            name: value for at, (name, value) in enumerate(changes.items()) if which >> at & 1
        }
        try:
            if rest:
                chosen["specs"] = msgspec.msgpack.decode(
                    rest, type=tuple[featcache.ref.TensorSpec, ...]
                )
            return FeatureRef.from_bytes(msgspec.structs.replace(ref, **chosen).to_bytes())
        except (MalformedRef, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None


_live: LiveOwner | None = None


def live(data: bytes) -> bool:
    """Read by a forged ref, at an owner that is made at the first call."""
    global _live  # noqa: PLW0603 - one owner for all inputs: to make one takes milliseconds
    if _live is None:
        _live = LiveOwner()
    return _live.read(data)


def close() -> None:
    """Close the live owner."""
    global _live  # noqa: PLW0603 - see live
    if _live is not None:
        _LOOP.run_until_complete(_live.cache.aclose())
        _live = None


TARGETS: Final[dict[str, Callable[[bytes], bool]]] = {
    "ref": ref,
    "message": message,
    "frames": frames,
    "live": live,
}
