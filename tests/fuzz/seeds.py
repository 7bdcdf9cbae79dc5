"""The inputs that fuzzing starts from: one valid form of each thing that is decoded."""

from __future__ import annotations

import struct
from typing import Any, Final, get_args

import msgspec

from featcache import FeatureRef, observation, statistics
from featcache.control import far, many, messages, observing, rooms
from featcache.ref import TensorSpec

_BARE: Final = FeatureRef(
    bytes(range(16)), "/e.sock", 7, 3, 512, 48, (TensorSpec(None, "bfloat16", (2, 12), 0),)
)
_PACKED: Final = FeatureRef(
    *(bytes(16), "/e.sock", 1, (1 << 63) - 1, 1 << 40, 1024),
    (TensorSpec("pixel", "float32", (4, 8), 0), TensorSpec("ü", "int64", (), 256)),
)
_SPEC: Final = (TensorSpec(None, "uint8", (8,), 0),)
_PUT: Final[tuple[Any, ...]] = (1, 256, ["tp0"], 2.5, b"key", True)


_KEY = observation.KeyView(
    key=b"a", nbytes=256, age_s=1.0, unused_s=1.0, hits=0, pinned=False, reads=0, ref="1:1"
)
_POOL = observation.PoolView(
    pool="00",
    endpoint="/e.sock",
    name=None,
    kind="host",
    device="cpu",
    version="0",
    protocol=messages.VERSION,
    pid=1,
    uptime_s=1.0,
    level="normal",
    holders=(),
    remedy="",
    statistics=statistics.Statistics(),
    observers=1,
    unpaid_refs=0,
    unpaid=(),
    waiting=(),
)

_HOME = observation.HomeView(
    address="10.0.0.7:7400",
    pool="00",
    state="connected",
    reason="",
    fetched=2,
    fetched_bytes=512,
    failed=1,
    dials_failed=0,
    in_progress=0,
    quarantined=0,
    quarantined_bytes=0,
    unacknowledged=1,
    last_s=0.001,
    mean_s=0.002,
    longest_s=0.003,
    total_s=0.004,
    round_trip_s=None,
    silent_s=0.5,
)
_READING_HOST = observation.ReadingHostView(
    host="00",
    address="10.0.0.8:40000",
    state="away",
    named=1,
    names=("tp0",),
    reading=1,
    reading_bytes=256,
    requests=0,
    reads=3,
    told_bytes=768,
    lease_s=9.5,
    silent_s=0.5,
    reads_paid=0,
)


def all_messages() -> list[tuple[int, msgspec.Struct]]:
    """A message of each kind, and who sends it: 0 a client, 1 an owner."""
    client: list[msgspec.Struct] = [
        messages.Hello(messages.VERSION, "tp0", "cpu"),
        messages.Goodbye(),
        messages.Discard(1, 2, 3),
        messages.Relay(1, _BARE.to_bytes()),
        messages.Find(1, b"key", True, True),
        messages.Cancel(1),
        messages.ReleaseClaim(b"key", 2),
        messages.Share(1, b"key", ["tp0", "tp1"], 2.5, True),
        many.FindMany(1, [b"key", b"other"], 4096),
        many.ContainsMany(1, [b"key", b"other"]),
        messages.KeyCommand(1, b"key", "pin"),
        messages.Reserve(*_PUT),
        many.ReserveMany(1, [256, 512], [1, 0], [], None, True, 2.5),
        many.PublishMany(1, [(2, 3, _PACKED.specs, b"key"), (4, 5, _SPEC, None)]),
        messages.HostPool(1),
        messages.Upload(1, 256, 2, None, None, False, _BARE.to_bytes()),
        messages.Publish(1, 2, 3, _PACKED.specs),
        rooms.PublishUnkeyed(1, 2, _SPEC, rooms.PutTerms(8, ["tp0"], 2.5)),
        messages.GiveUpReserved(1, 2, landed=True),
        messages.OpenForWriting(1),
        messages.TailUnmapped(1),
        far.Bring(1, _BARE.to_bytes()),
        far.EndFar(1, _BARE.to_bytes(), "release"),
    ]
    owner: list[msgspec.Struct] = [
        messages.Welcome(messages.VERSION, bytes(16), 1, 64, "host", "cpu", 1 << 20, 1 << 20),
        messages.Refused("why"),
        messages.Reply(1, "PoolFull", "why"),
        messages.Granted(1, 2, 3, _BARE.to_bytes()),
        many.GrantedMany(1, [(2, 3, _BARE.to_bytes()), None]),
        many.Contained(1, [True, False]),
        messages.ClaimGranted(1, 2),
        messages.Reserved(1, 2, 3, 256),
        many.ReservedMany(1, [(2, 3, 256), (4, 5, 512)]),
        messages.Published(1, (rooms.Room(1, 2, 256, 512),)),
        rooms.Rooms((rooms.Room(1, 2, 256, 512),)),
        messages.WriteDescriptors(1),
        messages.Segments(0, [1 << 20]),
        messages.UnmapTail(1, 4096),
        messages.Farewell(),
        messages.Closing(),
    ]
    observer: list[msgspec.Struct] = [
        messages.Goodbye(),
        observing.Observe(1),
        observing.ListSessions(1, -1),
        observing.ListHosts(1, "h10.0.0.7:7400"),
        observing.ListKeys(1, "size", "", 9),
        observing.MapSlab(1, 64),
        observing.Evict(1, b"key"),
    ]
    to_observer: list[msgspec.Struct] = [
        observing.ObserverWelcome(messages.VERSION, bytes(16), "/e.sock", 1 << 16),
        messages.Refused("why"),
        messages.Closing(),
        messages.Reply(1, flag=True),
        observing.Observed(1, _POOL),
        observing.SessionList(1, (), more=False),
        observing.HostList(1, (_HOME,), (_READING_HOST,), None),
        observing.KeyList(1, observation.KeysPage(keys=(_KEY,), total=1, next="1:61")),
        observing.SlabCells(1, 1 << 20, 1 << 16, b"kf", b"\xff\0", bytes(8)),
    ]
    senders = (client, owner, observer, to_observer)
    return [(who, message) for who, sent in enumerate(senders) for message in sent]


def missing() -> set[str]:
    """The kinds of message that have no seed."""
    unions = (messages.FromClient, messages.FromOwner, observing.FromObserver, observing.FromOwner)
    kinds = {kind for union in unions for kind in get_args(union)}
    return {kind.__name__ for kind in kinds - {type(message) for _, message in all_messages()}}


def _frame(payload: bytes, count: int = 0) -> bytes:
    frame = struct.pack("<2sBBI", b"fc", messages.VERSION, count, len(payload)) + payload
    return bytes([len(frame), count]) + frame


def seeds() -> dict[str, list[bytes]]:
    """The seeds of each target."""
    wire = [ref.to_bytes() for ref in (_BARE, _PACKED)]
    hello, goodbye = messages.encode(all_messages()[0][1]), messages.encode(messages.Goodbye())
    fields = struct.Struct("<BiiQQ")
    return {
        "ref": [b"\0" + data for data in wire]
        + [bytes([way]) + data[7:] for way in (1, 2, 3) for data in wire],
        "message": [bytes([who]) + messages.encode(message) for who, message in all_messages()],
        "frames": [_frame(hello, 1), _frame(hello, 1) + _frame(goodbye) * 2, _frame(b"")],
        "live": [
            fields.pack(0, 0, 0, 0, 0),
            fields.pack(3, 1, 1, 0, 0),
            fields.pack(12, 0, 0, 1024, 256),
            fields.pack(0, 0, 0, 0, 0) + msgspec.msgpack.encode(_SPEC),
        ],
    }
