"""A client among listeners that are no owners, or bad ones: it says so, and leaks nothing."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import featcache
from control.peers import Peer, frame
from featcache import (
    AttachRefused,
    BackendUnavailable,
    FeatureRef,
    OwnerLost,
    OwnerUnreachable,
    UnknownPool,
)
from featcache.control.messages import VERSION, Closing, Farewell, Refused, Welcome, encode
from featcache.memory.host.slab import HostSlab
from featcache.memory.words import GRANTS, OwnerWords, SessionWords
from featcache.ref import TensorSpec
from support.caches import filled, pair, small, until

pytestmark = pytest.mark.usefixtures("no_leaks")

SLOTS = 8
CAPACITY = 64 << 10
Act = Callable[[Peer], Awaitable[None]]


@contextlib.asynccontextmanager
async def owner_that(act: Act, runtime_dir: Path) -> AsyncIterator[str]:
    """A listener that does `act` with who connects first."""
    endpoint = str(runtime_dir / "hostile")
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(endpoint)
        listener.listen()

        async def serve() -> None:
            sock, _ = await loop.sock_accept(listener)
            with Peer(sock) as peer:
                await act(peer)

        task = asyncio.create_task(serve())
        try:
            yield endpoint
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            os.unlink(endpoint)  # noqa: PTH108 - ASYNC240 wants no Path here


def welcome_of(**changes: Any) -> bytes:
    fields = {
        "type": "welcome",
        "version": VERSION,
        "pool_id": bytes(range(16)),
        "session": 1,
        "slots": SLOTS,
        "kind": "host",
        "device": "cpu",
        "capacity_bytes": CAPACITY,
        "committed_bytes": 0,
        "layout": 0,
        "handle": b"",
        "relays": False,
        "kin": None,
        "kin_endpoint": "",
        "endpoint": "",
        "grants": GRANTS,
        "message_bytes": 64 << 10,
        "tensors": 256,
        "readers": 1024,
    }
    return msgspec.msgpack.encode(fields | changes)


@contextlib.contextmanager
def furniture(**sizes: int) -> Any:
    """What an owner sends along: pidfd, words, page, eventfd, slab."""
    slots = sizes.get("slots", SLOTS)
    _, words = OwnerWords.create(slots)
    _, page = SessionWords.create(sizes.get("page_slots", slots))
    slab = HostSlab(sizes.get("capacity", CAPACITY), huge_pages=False)
    own = [os.pidfd_open(os.getpid()), words, page, os.eventfd(0)]
    try:
        yield own + slab.descriptors()
    finally:
        slab.close()
        for fd in own:
            os.close(fd)


async def silent(peer: Peer) -> None:
    await peer.hung_up()


async def hangs_up(peer: Peer) -> None:
    pass


async def hangs_up_after_hello(peer: Peer) -> None:
    await peer.message()


def answers(data: bytes) -> Act:
    async def act(peer: Peer) -> None:
        await peer.message()
        peer.send(data)
        await peer.hung_up()

    return act


def welcomes(
    choose: Callable[[list[int]], list[int]] = list,
    sizes: dict[str, int] | None = None,
    **fields: Any,
) -> Act:
    async def act(peer: Peer) -> None:
        await peer.message()
        with furniture(**(sizes or {})) as fds:
            chosen = choose(fds)
            peer.send(frame(welcome_of(**fields), len(chosen)), chosen)
        await peer.hung_up()

    return act


HOSTILE: dict[str, tuple[Act, str]] = {
    "says nothing": (silent, "did not answer within"),
    "hangs up": (hangs_up, "gone"),
    "hangs up after the hello": (hangs_up_after_hello, "socket closed"),
    "half a header": (answers(b"fc\x01"), "did not answer within"),
    "half a message": (answers(frame(welcome_of())[:-1]), "did not answer within"),
    "garbage": (answers(b"HTTP/1.1 400 Bad Request\r\n"), "does not speak"),
    "another version's frame": (answers(frame(b"", version=VERSION + 1)), f"version {VERSION + 1}"),
    "frame too long": (answers(frame(b"", length=1 << 30)), "over"),
    "not msgpack": (answers(frame(b"\xc1")), "not a valid message"),
    "deeply nested": (answers(frame(b"\x91" * 60_000)), "not a valid message"),
    "unknown message": (
        answers(frame(msgspec.msgpack.encode({"type": "hi"}))),
        "not a valid message",
    ),
    "text that is no UTF-8": (
        answers(frame(encode(Refused("abcd")).replace(b"abcd", b"\xff\xff\xff\xff"))),
        "not a valid message",
    ),
    "refusal": (answers(frame(encode(Refused("not today")))), "not today"),
    "farewell": (answers(frame(encode(Farewell()))), "unexpected Farewell"),
    "closing": (answers(frame(encode(Closing()))), "closed the pool"),
    "another version": (welcomes(version=VERSION + 1), f"version {VERSION + 1}"),
    "short pool id": (welcomes(pool_id=b"short"), "not a valid message"),
    "no slots": (welcomes(slots=0), "not a valid message"),
    "too many slots": (welcomes(slots=1 << 40), "not a valid message"),
    "negative capacity": (welcomes(capacity_bytes=-1), "not a valid message"),
    "no descriptors": (welcomes(lambda fds: []), "without descriptors"),
    "fewer than announced": (answers(frame(welcome_of(), 3)), "without its descriptors"),
    "only a pidfd": (welcomes(lambda fds: fds[:1]), "without its descriptors"),
    "no slab": (welcomes(lambda fds: fds[:4]), "descriptor"),
    "two slabs": (welcomes(lambda fds: [*fds, fds[4]]), "one descriptor"),
    "no pidfd but a memfd": (welcomes(lambda fds: [fds[1], *fds[1:]]), "not a pidfd"),
    "words of another size": (welcomes(sizes={"slots": 3000, "page_slots": SLOTS}), "bytes where"),
    "a page of another size": (welcomes(sizes={"page_slots": 3000}), "bytes where"),
    "words with other slots": (welcomes(slots=SLOTS + 1), "slots, where"),
    "words and page in the wrong order": (
        welcomes(lambda fds: [fds[0], fds[2], fds[1], *fds[3:]]),
        "bytes where",
    ),
    "slab of another size": (welcomes(capacity_bytes=2 * CAPACITY), "bytes where"),
    "slab of another kind": (welcomes(kind="cuda"), "kind 'cuda'"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_owner(name: str, runtime_dir: Path) -> None:
    act, message = HOSTILE[name]
    # Short only where it is sure to be met.
    limit_s = 0.3 if "did not answer" in message else 20.0
    async with owner_that(act, runtime_dir) as endpoint:
        with pytest.raises((AttachRefused, BackendUnavailable), match=message):
            await featcache.connect(endpoint, settings=small(attach_timeout=limit_s)).open()
    async with pair() as (owner, client):  # and the next owner is served as ever
        await client.get(await owner.put(filled(1)))


async def test_it_does_not_even_accept(runtime_dir: Path) -> None:
    endpoint = str(runtime_dir / "deaf")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(endpoint)
        listener.listen(0)
        settings = small(attach_timeout=0.1)
        for _ in range(3):  # the later ones find the backlog full
            with pytest.raises(AttachRefused, match="did not answer"):
                await featcache.connect(endpoint, settings=settings).open()
    os.unlink(endpoint)  # noqa: PTH108 - ASYNC240 wants no Path here


LATER: dict[str, bytes] = {
    "garbage": b"garbage",
    "not msgpack": frame(b"\xc1"),
    "a second welcome": frame(welcome_of()),
    "a refusal": frame(encode(Refused("after all"))),
    "closing": frame(encode(Closing())),
    "nothing": b"",
}


@pytest.mark.parametrize("name", LATER)
async def test_an_owner_that_turns_hostile(name: str, runtime_dir: Path) -> None:
    turn = asyncio.Event()

    async def act(peer: Peer) -> None:
        await peer.message()
        with furniture() as fds:
            peer.send(frame(welcome_of(), len(fds)), fds)
        await turn.wait()
        if LATER[name]:
            peer.send(LATER[name])
            await peer.hung_up()

    async with owner_that(act, runtime_dir) as endpoint:
        spec = TensorSpec(None, "uint8", (1,), 0)
        ref = FeatureRef(bytes(range(16)), endpoint, 0, 1, 0, 1, (spec,))
        async with featcache.connect(endpoint) as client:
            discard = asyncio.create_task(client.discard(ref))
            await asyncio.sleep(0)
            turn.set()
            with pytest.raises(OwnerLost):
                await discard
            await until(lambda: client.statistics().sessions == 0)
            with pytest.raises(OwnerLost):
                await client.get(ref)


async def test_answers_to_no_request_are_dropped(runtime_dir: Path) -> None:
    asked = asyncio.Event()

    async def act(peer: Peer) -> None:
        await peer.message()
        with furniture() as fds:
            peer.send(frame(welcome_of(), len(fds)), fds)
        request = (await peer.message())["request"]
        for number in (request + 1, 0, request, request):
            reply = {"type": "reply", "request": number, "error": "os.system", "text": "boo"}
            peer.send(frame(msgspec.msgpack.encode(reply)))
        asked.set()
        assert (await peer.message())["type"] == "goodbye"
        peer.send(frame(encode(Farewell())))
        await peer.hung_up()

    async with owner_that(act, runtime_dir) as endpoint:
        spec = TensorSpec(None, "uint8", (1,), 0)
        ref = FeatureRef(bytes(range(16)), endpoint, 0, 1, 0, 1, (spec,))
        async with featcache.connect(endpoint) as client:
            with pytest.raises(featcache.FeatcacheError, match="boo") as caught:
                await client.discard(ref)
            assert type(caught.value) is featcache.FeatcacheError  # no class of the peer's choosing
            assert asked.is_set()


# --- nobody there --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "stale", "file", "folder", "below a file"])
async def test_where_nobody_listens(kind: str, runtime_dir: Path) -> None:
    path = runtime_dir / "endpoint"
    if kind == "stale":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("precious")
        if kind == "below a file":
            path /= "below"
    expected = OwnerUnreachable if kind in {"missing", "stale"} else AttachRefused
    with pytest.raises(expected, match="endpoint"):
        await featcache.connect(str(path)).open()
    async with pair() as (owner, _), featcache.connect() as client:
        ref = msgspec.structs.replace(await owner.put(filled(1)), endpoint=str(path))
        with pytest.raises(expected, match="endpoint"):
            await client.get(FeatureRef.from_bytes(ref.to_bytes()))


async def test_a_socket_of_another_kind(runtime_dir: Path) -> None:
    endpoint = str(runtime_dir / "datagrams")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(endpoint)
        with pytest.raises(AttachRefused, match="can't reach"):
            await featcache.connect(endpoint).open()


async def error_of(endpoint: str) -> Exception:
    """The error of a get of a forged ref with this endpoint."""
    spec = TensorSpec(None, "uint8", (1,), 0)
    data = FeatureRef(bytes(16), endpoint, 0, 1, 0, 1, (spec,)).to_bytes()
    async with featcache.connect(settings=small()) as client:
        try:
            await client.get(FeatureRef.from_bytes(data))
        except Exception as error:  # noqa: BLE001 - the tests look at it
            return error
    raise AssertionError("it was served")


@pytest.mark.parametrize("endpoint", ["", "no/such/socket", "\0abstract", "/run/a\0b"], ids=ascii)
async def test_endpoints_that_a_forged_ref_may_have(endpoint: str) -> None:
    assert isinstance(await error_of(endpoint), featcache.FeatcacheError)


async def test_a_forged_ref_with_an_endpoint_that_is_too_long() -> None:
    with pytest.raises(featcache.MalformedRef):
        await error_of("/" + "é" * 106)


async def test_a_forged_ref_that_leads_to_another_pool() -> None:
    async with pair() as (owner, _), featcache.connect() as client:
        ref = await owner.put(filled(1))
        forged = msgspec.structs.replace(ref, pool_id=bytes(16))
        with pytest.raises(UnknownPool):
            await client.get(FeatureRef.from_bytes(forged.to_bytes()))
        await client.get(ref)


LISTEN = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
sock, _ = listener.accept()
assert sock.recv(100) == b"", "it said something to a stranger"
"""


@pytest.fixture
def theirs(runtime_dir: Path) -> Iterator[str]:
    """The endpoint of a listener that runs as another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    runtime_dir.chmod(0o755)
    folder = runtime_dir / "theirs"
    folder.mkdir()
    folder.chmod(0o777)
    endpoint = str(folder / "socket")
    with subprocess.Popen([sys.executable, "-c", LISTEN, endpoint], stdout=subprocess.PIPE) as it:
        assert it.stdout is not None
        assert it.stdout.readline() == b"ready\n"
        yield endpoint
    assert it.returncode == 0


async def test_another_users_listener_is_not_spoken_to(theirs: str) -> None:
    with pytest.raises(AttachRefused, match="uid 65534"):
        await featcache.connect(theirs).open()


def test_the_welcome_is_what_these_tests_forge() -> None:
    fields = set(msgspec.msgpack.decode(welcome_of())) - {"type"}
    assert fields == set(Welcome.__struct_encode_fields__)
