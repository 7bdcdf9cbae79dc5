"""An owner among peers that do not keep to the protocol: it serves the others, and loses nothing."""

import asyncio
import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

import featcache
from control.peers import Peer, frame, hello, own_pidfd
from featcache import AttachRefused, FeatureCache
from featcache.control.descriptors import MAX_DESCRIPTORS
from featcache.control.messages import VERSION, Closing, Discard, Goodbye, Hello, encode
from support.caches import KIB, filled, pair, small, spent, until

pytestmark = pytest.mark.usefixtures("no_leaks")


def handshakes(owner: FeatureCache) -> int:
    state = owner._life.engine
    assert state is not None
    return len(state.main.server._greeting)


@contextlib.contextmanager
def impatient(owner: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the peers that connect now little time for their hello; the others have the usual."""
    assert owner._life.engine is not None
    with monkeypatch.context() as patch:
        patch.setattr(owner._life.engine.main.server, "_settings", small(attach_timeout=0.05))
        yield


async def serves(owner: FeatureCache) -> None:
    """The owner still does its work for others."""
    async with featcache.connect(owner.endpoint) as client:
        await client.get(await owner.put(filled(KIB)))
        async with client.borrow(await owner.put(filled(8 * KIB))):
            pass
    await spent(owner)


def send_hello_with(peer: Peer, descriptors: list[int]) -> None:
    peer.send(frame(encode(Hello(VERSION, None, "cpu")), len(descriptors)), descriptors)


def hello_of(**changes: Any) -> bytes:
    """A hello with wrong fields, as msgpack."""
    fields = {"type": "hello", "version": VERSION, "name": None, "device": "cpu"} | changes
    return msgspec.msgpack.encode(fields)


def two_pidfds(peer: Peer) -> None:
    with own_pidfd() as one, own_pidfd() as two:
        send_hello_with(peer, [one, two])


def an_eventfd(peer: Peer) -> None:
    fd = os.eventfd(0)
    send_hello_with(peer, [fd])
    os.close(fd)


def a_file(peer: Peer) -> None:
    with Path(__file__).open() as file:
        send_hello_with(peer, [file.fileno()])


def its_own_socket(peer: Peer) -> None:
    send_hello_with(peer, [peer.sock.fileno()])


def too_many_descriptors(peer: Peer) -> None:
    with own_pidfd() as pidfd:
        peer.send(hello(), [pidfd] * (MAX_DESCRIPTORS + 36))


def descriptors_without_end(peer: Peer) -> None:
    with own_pidfd() as pidfd:
        for byte in frame(b"", 1)[:4]:
            peer.send(bytes([byte]), [pidfd] * MAX_DESCRIPTORS)


def with_pidfd(payload: bytes) -> Callable[[Peer], None]:
    def act(peer: Peer) -> None:
        with own_pidfd() as pidfd:
            peer.send(frame(payload, 1), [pidfd])

    return act


def says(data: bytes) -> Callable[[Peer], None]:
    return lambda peer: peer.send(data)


def says_and_hangs_up(data: bytes) -> Callable[[Peer], None]:
    def act(peer: Peer) -> None:
        peer.send(data)
        peer.sock.shutdown(socket.SHUT_WR)

    return act


BEFORE: dict[str, Callable[[Peer], None]] = {
    "http": says(b"GET / HTTP/1.1\r\n\r\n"),
    "one wrong byte": says(b"X"),
    "zeros": says(bytes(1000)),
    "noise": says(b"fc" + os.urandom(5000)),
    "wrong magic": says(frame(b"", magic=b"fC")),
    "frame of another version": says(frame(b"", version=VERSION + 1)),
    "frame too long": says(frame(b"", length=(64 << 10) + 1)),
    "frame far too long": says(frame(b"", length=(1 << 32) - 1)),
    "too many descriptors announced": says(frame(b"", MAX_DESCRIPTORS + 1)),
    "descriptors that did not come": says(frame(encode(Hello(VERSION, None, "cpu")), 1)),
    "empty message": says(frame(b"")),
    "not msgpack": says(frame(b"\xc1\xc1\xc1")),
    "unknown message": says(frame(msgspec.msgpack.encode({"type": "login"}))),
    "an owner's message": says(frame(encode(Closing()))),
    "a list": says(frame(msgspec.msgpack.encode([1, 2]))),
    "deeply nested": says(frame(b"\x91" * 60_000)),
    "goodbye first": says(frame(encode(Goodbye()))),
    "discard first": says(frame(encode(Discard(1, 0, 1)))),
    "no pidfd": says(frame(encode(Hello(VERSION, None, "cpu")))),
    "two pidfds": two_pidfds,
    "an eventfd as pidfd": an_eventfd,
    "a file as pidfd": a_file,
    "a socket as pidfd": its_own_socket,
    "too many descriptors": too_many_descriptors,
    "descriptors without end": descriptors_without_end,
    "hello of another version": with_pidfd(hello_of(version=VERSION + 1)),
    "version of another type": with_pidfd(hello_of(version="1")),
    "name too long": with_pidfd(hello_of(name="n" * 257)),
    "empty name": with_pidfd(hello_of(name="")),
    "name that is no text": with_pidfd(hello_of(name=b"\xff")),
    "text that is no UTF-8": with_pidfd(hello_of(name="abcd").replace(b"abcd", b"\xff" * 4)),
    "no device": with_pidfd(hello_of(device=None)),
    "hang up at once": lambda peer: peer.sock.shutdown(socket.SHUT_RDWR),
    "hang up in a header": says_and_hangs_up(b"fc\x01"),
    "hang up in a message": says_and_hangs_up(hello()[:-3]),
}


@pytest.mark.parametrize("name", BEFORE)
async def test_before_the_hello(name: str) -> None:
    with capture_logs() as logs:
        async with pair(attach_timeout=20.0) as (owner, _):
            with Peer.connect(owner.endpoint) as peer:
                BEFORE[name](peer)
                await peer.hung_up()
            await until(lambda: handshakes(owner) == 0)
            assert owner.statistics().sessions == 1
            await serves(owner)
    refused = [entry for entry in logs if entry["event"] == "featcache.peer.refused"]
    if not name.startswith("hang up"):  # a probe whether the endpoint is live is no event
        assert len(refused) == 1
        assert refused[0]["pid"] == os.getpid()
        assert refused[0]["reason"] != "no Hello within attach_timeout"


async def test_another_version_is_told_so() -> None:
    async with pair() as (owner, _):
        with Peer.connect(owner.endpoint) as peer:
            BEFORE["hello of another version"](peer)
            answer = await peer.message()
            assert answer["type"] == "refused"
            assert f"version {VERSION + 1}" in answer["reason"]
            await peer.hung_up()


@pytest.mark.parametrize("said", [b"", b"f", frame(b"", length=9)[:5], hello()[:-1]], ids=len)
async def test_silence(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as (owner, _):
        with impatient(owner, monkeypatch), Peer.connect(owner.endpoint) as peer:
            if said:
                peer.send(said)
            assert (await peer.message())["reason"] == "no Hello within attach_timeout"
            await peer.hung_up()
        assert handshakes(owner) == 0
        await serves(owner)


async def test_a_hello_in_single_bytes_is_a_hello() -> None:
    async with pair() as (owner, _):
        with Peer.connect(owner.endpoint) as peer, own_pidfd() as pidfd:
            for n, byte in enumerate(hello("slow")):
                peer.send(bytes([byte]), [pidfd] if n == 0 else [])
                await asyncio.sleep(0)
            assert (await peer.message())["type"] == "welcome"
            peer.send(frame(encode(Goodbye())))
            assert (await peer.message())["type"] == "farewell"
            await peer.hung_up()
        await until(lambda: owner.statistics().sessions == 1)


async def test_what_a_session_is_given() -> None:
    async with pair() as (owner, _):
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            welcome = await peer.message()
            assert welcome["version"] == VERSION
            assert welcome["capacity_bytes"] == owner.statistics().capacity_bytes
            assert len(peer.received) == 5  # pidfd, words, page, eventfd, slab
            _, words, _, _, slab = peer.received
            with pytest.raises(PermissionError):  # sealed
                os.pwrite(words, b"x", 0)
            with pytest.raises(OSError, match="Bad file descriptor"):  # opened for reading
                os.pwrite(slab, b"x", 0)
            peer.send(frame(encode(Goodbye())))
            await peer.hung_up()


AFTER: dict[str, Callable[[Peer], None]] = {
    "garbage": says(b"garbage"),
    "second hello": lambda peer: peer.greet(),
    "second hello with another name": lambda peer: peer.greet("other"),
    "not msgpack": says(frame(b"\xc1")),
    "frame too long": says(frame(b"", length=1 << 31)),
    "wrong discard": says(
        frame(msgspec.msgpack.encode({"type": "discard", "request": -1, "slot": 0}))
    ),
    "too many descriptors": too_many_descriptors,
    "hang up": lambda peer: peer.sock.shutdown(socket.SHUT_RDWR),
}


@pytest.mark.parametrize("name", AFTER)
async def test_after_the_hello(name: str) -> None:
    """Its process lives and may be reading: the session is set aside, not ended."""
    with capture_logs() as logs:
        async with pair() as (owner, _):
            with Peer.connect(owner.endpoint) as peer:
                peer.greet("tp9")
                assert (await peer.message())["type"] == "welcome"
                AFTER[name](peer)
                await peer.hung_up()
            assert owner.statistics().sessions == 2
            await serves(owner)
            with pytest.raises(AttachRefused, match="tp9"):
                await featcache.connect(owner.endpoint, name="tp9").open()
            await until(lambda: "featcache.reader.quarantined" in [one["event"] for one in logs])
    events = [entry["event"] for entry in logs]
    assert events.count("featcache.reader.quarantined") == 1
    assert "featcache.reader.lost" not in events


async def test_a_peer_that_never_reads_its_answers() -> None:
    async with pair() as (owner, _):
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            assert (await peer.message())["type"] == "welcome"
            with pytest.raises(ConnectionError):
                await peer.flood(frame(encode(Discard(1, 0, 1))) * 50)
        await until(lambda: owner.statistics().sessions == 2)
        await serves(owner)


@pytest.mark.parametrize(
    ("slot", "generation"), [(0, 1), (63, 1), (64, 1), (1 << 62, 1), (0, (1 << 63) - 1), (0, 0)]
)
async def test_discards_of_what_is_not_there(slot: int, generation: int) -> None:
    async with pair() as (owner, _):
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            await peer.message()
            peer.send(frame(encode(Discard(7, slot, generation))))
            reply = await peer.message()
            assert (reply["request"], reply["error"]) == (7, "StaleRef")
            peer.send(frame(encode(Goodbye())))
            await peer.hung_up()
        await serves(owner)


async def test_many_requests_in_one_write() -> None:
    async with pair() as (owner, _):
        with Peer.connect(owner.endpoint) as peer:
            refs = [await owner.put(filled(1), readers=9) for _ in range(5)]
            discards = [
                frame(encode(Discard(n, ref.slot, ref.generation))) for n, ref in enumerate(refs)
            ]
            with own_pidfd() as pidfd:
                peer.send(hello() + b"".join(discards) + frame(encode(Goodbye())), [pidfd])
            answers = [(await peer.message())["type"] for _ in range(7)]
            assert answers == ["welcome", *["reply"] * 5, "farewell"]
        await spent(owner)


async def test_messages_after_goodbye_are_not_heard() -> None:
    async with pair() as (owner, _):
        ref = await owner.put(filled(1))
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            await peer.message()
            late = frame(encode(Discard(1, ref.slot, ref.generation)))
            peer.send(frame(encode(Goodbye())) + late)
            assert (await peer.message())["type"] == "farewell"
            await peer.hung_up()
        assert owner.statistics().slots_used == 1
        await owner.release(ref)
        await serves(owner)


# --- bounds --------------------------------------------------------------------------------------


async def test_sessions_have_a_bound() -> None:
    async with pair(sessions=2) as (owner, _):
        async with featcache.connect(owner.endpoint):
            with pytest.raises(AttachRefused, match="sessions"):
                await featcache.connect(owner.endpoint).open()
        async with featcache.connect(owner.endpoint):
            pass


async def test_handshakes_in_progress_have_a_bound() -> None:
    with capture_logs() as logs:
        async with pair(sessions=2, attach_timeout=1.5) as (owner, _):
            peers = [Peer.connect(owner.endpoint) for _ in range(6)]
            await until(
                lambda: (
                    handshakes(owner) == 2
                    and sum(entry["event"] == "featcache.peer.refused" for entry in logs) == 4
                )
            )
            await until(lambda: handshakes(owner) == 0)
            for peer in peers:
                await peer.hung_up()
                peer.close()
            await serves(owner)


async def test_out_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept fails; the owner says so, and goes on when there are some again."""
    async with featcache.create(settings=small()) as owner:
        state = owner._life.engine
        assert state is not None
        with capture_logs() as logs, monkeypatch.context() as patch:

            class Full:
                def fileno(self) -> int:
                    return real.fileno()

                def accept(self) -> None:
                    raise OSError(24, "Too many open files")

            real = state.main.server._sock
            patch.setattr(state.main.server, "_sock", Full())
            with Peer.connect(owner.endpoint):
                await until(lambda: logs)
        assert "Too many open files" in logs[0]["reason"]
        await serves(owner)


# --- who the peer is -----------------------------------------------------------------------------


@pytest.fixture
def dead_pidfd() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    pidfd = os.pidfd_open(process.pid)
    process.wait()
    yield pidfd
    os.close(pidfd)


async def test_a_pidfd_of_a_process_that_is_dead(dead_pidfd: int) -> None:
    with capture_logs() as logs:
        async with featcache.create(settings=small()) as owner:
            with Peer.connect(owner.endpoint) as peer:
                send_hello_with(peer, [dead_pidfd])
                await peer.hung_up()
            await until(lambda: owner.statistics().readers_lost == 1)
            assert owner.statistics().sessions == 0
            await serves(owner)
    assert "featcache.reader.lost" in [entry["event"] for entry in logs]


NOBODY = 65534
KNOCK = f"""
import os, socket, sys
os.setgid({NOBODY}); os.setuid({NOBODY})
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sys.exit(0 if sock.recv(100) == b"" else 3)
"""


@pytest.fixture
def open_to_all(runtime_dir: Path) -> Path:
    """An endpoint in a folder that everybody may enter."""
    runtime_dir.chmod(0o755)
    return runtime_dir / "open"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_users_process_is_sent_away_without_a_word(open_to_all: Path) -> None:
    endpoint = str(open_to_all)
    with capture_logs() as logs:
        async with featcache.create(endpoint=endpoint, settings=small()) as owner:
            os.chmod(endpoint, 0o666)  # noqa: PTH101, S103 - as if somebody had opened it to all
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", KNOCK, endpoint)
            assert await process.wait() == 0
            await serves(owner)
    (refused,) = [entry for entry in logs if entry["event"] == "featcache.peer.refused"]
    assert f"uid {NOBODY}" in refused["reason"]
    assert refused["pid"] == process.pid


async def test_the_uid_is_checked_by_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a stand-in for the kernel's answer, for runs that are not root's."""
    async with featcache.create(settings=small()) as owner:
        with monkeypatch.context() as patch:
            patch.setattr("featcache.control.credentials._credentials", lambda _: (1, NOBODY))
            with pytest.raises(AttachRefused, match=f"uid {NOBODY}"):
                await featcache.connect(owner.endpoint).open()
            with Peer.connect(owner.endpoint) as peer:
                await peer.hung_up()
        await serves(owner)


async def test_received_descriptors_do_not_survive_an_exec() -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - numbers are what is compared
    async with pair() as (owner, client):
        await client.get(await owner.put(filled(1)))
        found = set(os.listdir("/proc/self/fd")) - before  # noqa: PTH208
        flags = {}
        for entry in found:
            try:
                flags[entry] = fcntl.fcntl(int(entry), fcntl.F_GETFD)
            except OSError:  # the listing's own
                continue
        assert len(flags) >= 8
        assert all(flag & fcntl.FD_CLOEXEC for flag in flags.values())
