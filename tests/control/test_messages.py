"""Messages as they travel, and the lanes that their requests wait in."""

import msgspec
import pytest

from featcache.control import many, messages
from featcache.control.messages import encode
from featcache.control.wire import Lane

WELCOME = messages.Welcome(
    version=messages.VERSION,
    pool_id=bytes(16),
    session=1,
    slots=1,
    kind="host",
    device="cpu",
    capacity_bytes=0,
    committed_bytes=0,
    shrink_epoch=3,
    sibling_pool=bytes(16),
    sibling_endpoint="/there",
)


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (WELCOME, {"type": "welcome", "layout": 3, "kin": bytes(16), "kin_endpoint": "/there"}),
        (messages.UnmapTail(3, 4096), {"type": "retire", "layout": 3, "end_bytes": 4096}),
        (messages.TailUnmapped(3), {"type": "retired", "layout": 3}),
        (messages.KeyCommand(1, b"a", "pin"), {"type": "of_key", "request": 1, "what": "pin"}),
        (messages.ReleaseClaim(b"a", 2), {"type": "unclaim", "key": b"a", "claim": 2}),
        (messages.GiveUpReserved(1, 2, landed=True), {"type": "withdraw", "landed": True}),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_names_on_the_wire_are_not_those_in_the_code(
    message: msgspec.Struct, wire: dict[str, object]
) -> None:
    assert wire.items() <= msgspec.msgpack.decode(encode(message)).items()


def test_no_request_shares_a_lane_with_those_that_wait_for_its_effect() -> None:
    lanes = {kind: kind.lane for kind in messages.REQUESTS}
    never = {kind for kind, lane in lanes.items() if lane is None}
    assert never == {messages.Publish, many.PublishMany}
    found = {kind for kind, lane in lanes.items() if lane is Lane.FIND}
    assert found == {messages.Find, messages.Share}
    assert [kind for kind, lane in lanes.items() if lane is Lane.COPY] == [messages.Relay]
    rooms = {kind for kind, lane in lanes.items() if lane is Lane.ROOM}
    assert rooms == {messages.Reserve, messages.Upload, many.ReserveMany}


def test_requests_that_copy_through_the_host_say_so() -> None:
    copies = {kind for kind in messages.REQUESTS if kind.copies}
    assert copies == {messages.Relay, messages.Upload, messages.HostPool}
