"""The socket that other hosts come in at: real TCP, and peers that mean harm."""

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import uvloop

import featcache
from featcache import FeatureCache, SettingsError, events
from featcache.errors import AttachRefused, OwnerLost
from featcache.reach import messages
from featcache.reach.handshake import Conversation, Phase, Role
from featcache.reach.messages import Place, decode_from_home, encode
from featcache.reach.secret import parse_address
from reach.hosts import KEY, hosts, listening, quick
from support.caches import KIB, filled, spent, tensor, until

HOST = b"h" * 16


class Dialer:
    """A host of the test's own, which says what it likes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes
    ) -> None:
        self.talk = Conversation(Role.DIALER, key, HOST)
        self.reader, self.writer = reader, writer
        self.got: list[Any] = []

    async def open(self) -> None:
        while self.talk.phase is not Phase.OPEN:
            await self.step()

    async def step(self) -> bool:
        """Send what is due and take what comes; False at the end of the connection."""
        self.writer.write(self.talk.take_outgoing())
        data = await self.reader.read(1 << 16)
        self.got += [decode_from_home(payload) for payload in self.talk.receive(data)]
        return bool(data)

    async def ask(self, message: Any) -> Any:
        """Return the next message that comes."""
        self.talk.send(encode(message))
        while not self.got:
            assert await self.step(), "the home closed the connection"
        return self.got.pop(0)

    async def refused(self, payload: bytes) -> bool:
        """Whether the home ends the connection at this payload."""
        self.talk.send(payload)
        with contextlib.suppress(ConnectionError):
            while await self.step():
                pass
        return True


@contextlib.asynccontextmanager
async def dialing(owner: FeatureCache, key: str = KEY) -> AsyncIterator[Dialer]:
    assert owner.address is not None
    where = parse_address(owner.address)
    reader, writer = await asyncio.open_connection(where.host, where.port)
    try:
        yield Dialer(reader, writer, key.encode())
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.contextmanager
def refusals() -> Any:
    told: list[str] = []

    def hook(event: events.Event) -> None:
        if isinstance(event, events.PeerRefused):
            told.append(event.reason)

    events.add_hook(hook)
    try:
        yield told
    finally:
        events.remove_hook(hook)


def look(slot: int = 0, generation: int = 1, nbytes: int = KIB, **changes: Any) -> messages.Look:
    place = Place(b"p" * 16, slot, generation)
    asked = messages.Look(1, place, 0, nbytes, reader=1, name=None, epoch=0)
    return msgspec.structs.replace(asked, **changes)


async def test_a_peer_that_says_nothing_is_sent_away_in_time() -> None:
    async with listening() as home, dialing(home) as peer:
        with refusals() as told:
            assert b"no handshake within" in await peer.reader.read()
        assert any("no handshake" in each for each in told)


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"fN\x63\0\0\0\0\0"])
async def test_a_peer_of_another_kind_is_sent_away(greeting: bytes) -> None:
    async with listening() as home, dialing(home) as peer:
        peer.writer.write(greeting)
        await peer.reader.read()
        assert peer.reader.at_eof()


async def test_a_peer_without_the_key_learns_nothing() -> None:
    async with listening() as home, dialing(home, "another key, as long as it is") as peer:
        with refusals() as told, pytest.raises(AttachRefused, match="keys"):
            await peer.open()
        await until(lambda: any("keys" in each for each in told))


async def test_handshakes_are_limited_in_number() -> None:
    async with listening(peers=2, peer_timeout=5.0) as home, contextlib.AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(dialing(home)) for _ in range(2)]
        for each in silent:
            each.writer.write(each.talk.take_outgoing())
            assert await each.reader.read(8)
        third = await stack.enter_async_context(dialing(home))
        with pytest.raises(AttachRefused, match="handshake already"):
            await third.open()
        silent[0].writer.close()
        beyond = home._opened().beyond
        assert beyond is not None
        assert beyond._listener is not None
        greeting = beyond._listener._greeting
        await until(lambda: len(greeting) == 1)
        fourth = await stack.enter_async_context(dialing(home))
        await fourth.open()


async def test_hosts_are_limited_in_number() -> None:
    async with listening(peers=1) as home, dialing(home) as first:
        await first.open()
        async with dialing(home) as second:
            await second.open()
            assert not await second.reader.read()
        assert isinstance(await first.ask(messages.Beat(1, [])), messages.Alive)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        encode({"type": "look"}),
        encode(messages.Found(1, 0, [], 1, b"")),
        encode(messages.Beat(1, [])) + b"x",
        encode({"type": "beat", "number": -1, "names": []}),
        encode({"type": "beat", "number": 1, "names": ["n"] * 2000}),
        encode({"type": "pay", "host": b"short", "payments": []}),
    ],
)
async def test_a_message_that_is_none_ends_the_connection(payload: bytes) -> None:
    async with listening() as home, dialing(home) as peer:
        await peer.open()
        assert await peer.refused(payload)
        async with dialing(home) as other:
            await other.open()
            assert isinstance(await other.ask(messages.Beat(1, [])), messages.Alive)


async def test_no_number_of_a_peer_is_believed() -> None:
    async with listening() as home, dialing(home) as peer:
        ref = await home.put(filled(KIB), readers=5)
        await peer.open()
        true = Place(ref.pool_id, ref.slot, ref.generation)
        huge = (1 << 63) - 1
        wrong = {
            "UnknownPool": look(),
            "MalformedRef": look(place=true, offset_bytes=256),
            "StaleRef": look(place=Place(ref.pool_id, 0, huge)),
        }
        for error, request in wrong.items():
            answer = await peer.ask(request)
            assert isinstance(answer, messages.Failed)
            assert answer.error == error
        far_slot = await peer.ask(look(place=Place(ref.pool_id, huge, 1)))
        assert far_slot.error == "StaleRef"
        for number, place in enumerate((Place(b"p" * 16, 0, 1), Place(ref.pool_id, huge, huge))):
            paid = await peer.ask(messages.Pay(HOST, [messages.Payment(number, place, huge, None)]))
            assert paid == messages.Paid([number], [place])
        for note in (messages.Drop(true, 1), messages.Cancel(77), messages.NameLost("nobody")):
            peer.talk.send(encode(note))
        assert isinstance(await peer.ask(messages.Beat(1, [])), messages.Alive)
        slot = home._opened().pool.store.find(ref.slot, ref.generation)
        assert slot.reads_left == 5


async def test_a_look_says_where_the_bytes_are_and_pins_them() -> None:
    async with listening() as home, dialing(home) as peer:
        ref = await home.put(filled(KIB))
        await peer.open()
        place = Place(ref.pool_id, ref.slot, ref.generation)
        found = await peer.ask(look(place=place, offset_bytes=ref.offset_bytes))
        assert isinstance(found, messages.Found)
        assert sum(found.pieces) == KIB
        assert found.metadata
        await home.discard(ref)
        assert home.statistics().slots_used == 1
        assert await peer.ask(messages.Pay(HOST, [messages.Payment(1, place, 1, None)])) == (
            messages.Paid([1], [place])
        )
        await spent(home)


async def test_the_same_host_may_come_back_before_its_first_connection_is_missed() -> None:
    async with listening() as home, dialing(home) as first, dialing(home) as second:
        ref = await home.put(filled(KIB))
        await first.open()
        place = Place(ref.pool_id, ref.slot, ref.generation)
        await first.ask(look(place=place, offset_bytes=ref.offset_bytes))
        await second.open()
        assert not await first.reader.read()
        paid = await second.ask(messages.Pay(HOST, [messages.Payment(1, place, 1, None)]))
        assert paid.gone == [place]


async def test_an_address_in_use_is_told() -> None:
    async with listening() as home:
        assert home.address is not None
        with pytest.raises(SettingsError, match=r"listen=.* is in use: name another port"):
            await featcache.create(listen=home.address, cluster_key=KEY).open()


def test_an_address_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEATCACHE_CLUSTER_KEY", raising=False)
    with pytest.raises(SettingsError, match="FEATCACHE_CLUSTER_KEY"):
        featcache.create(listen="127.0.0.1:0")
    monkeypatch.setenv("FEATCACHE_CLUSTER_KEY", KEY)
    featcache.create(listen="127.0.0.1:0")


async def test_without_the_data_plane_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from featcache.owner import beyond
    from featcache.reach import nixl_plane, plane

    monkeypatch.setattr(beyond, "make_plane", plane.make_plane)
    monkeypatch.setattr(nixl_plane, "_MODULES", ("featcache_has_no_such_module",))
    with pytest.raises(featcache.BackendUnavailable, match=r"^other hosts.*featcache\[reach\]"):
        await listening().open()


def certificate(folder: Path) -> dict[str, str]:
    """A self-signed certificate of 127.0.0.1, trusted by itself."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    try:
        subprocess.run(
            [*made, "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2", *subject],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return {"tls_cert": str(cert), "tls_key": str(key), "tls_ca": str(cert)}


async def test_hosts_speak_tls_where_they_have_certificates(tmp_path: Path) -> None:
    tls = certificate(tmp_path)
    async with (
        listening(**tls) as home,
        featcache.create(settings=quick(**tls), cluster_key=KEY) as reader,
    ):
        ref = await home.put(filled(KIB, 3))
        assert torch.equal(tensor(await reader.get(ref)), filled(KIB, 3))
        async with dialing(home) as plain:
            plain.writer.write(plain.talk.take_outgoing())
            with contextlib.suppress(ConnectionError):
                assert b"fN" not in await plain.reader.read()
        assert home.address is not None
        stranger = ssl.create_default_context(cafile=tls["tls_ca"])
        where = parse_address(home.address)
        got = b""
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            read, write = await asyncio.open_connection(where.host, where.port, ssl=stranger)
            write.write(Conversation(Role.DIALER, KEY.encode(), HOST).take_outgoing())
            got = await read.read()
        assert not got  # it has shown no certificate


async def test_handshakes_of_tls_are_limited_in_number(tmp_path: Path) -> None:
    tls = certificate(tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        home = await stack.enter_async_context(listening(peers=2, peer_timeout=30.0, **tls))
        silent = [await stack.enter_async_context(dialing(home)) for _ in range(2)]
        beyond = home._opened().beyond
        assert beyond is not None
        assert beyond._listener is not None
        securing = beyond._listener._securing
        await until(lambda: len(securing) == 2)
        with refusals() as told:
            third = await stack.enter_async_context(dialing(home))
            with contextlib.suppress(ConnectionError):
                assert not await third.reader.read()
            assert [each for each in told if "handshake already" in each]
        silent[0].writer.close()
        await until(lambda: len(securing) == 1)
        reader = featcache.create(settings=quick(**tls), cluster_key=KEY)
        await stack.enter_async_context(reader)
        got = await reader.get(await home.put(filled(KIB, 3)))
        assert torch.equal(tensor(got), filled(KIB, 3))
        await until(lambda: len(securing) == 1)  # the one that still says nothing


async def test_a_peer_that_says_nothing_under_tls_is_sent_away_in_time(tmp_path: Path) -> None:
    async with (
        listening(**certificate(tmp_path)) as home,
        dialing(home) as peer,
    ):
        with refusals() as told:
            with contextlib.suppress(ConnectionError):
                assert not await peer.reader.read()
            await until(lambda: any("no TLS" in each for each in told))


async def test_an_owner_closes_while_a_peer_is_in_its_tls_handshake(tmp_path: Path) -> None:
    async with listening(peer_timeout=30.0, **certificate(tmp_path)) as home, dialing(home) as peer:
        beyond = home._opened().beyond
        assert beyond is not None
        assert beyond._listener is not None
        securing = beyond._listener._securing
        await until(lambda: len(securing) == 1)
        await home.aclose()
        with contextlib.suppress(ConnectionError):
            assert not await peer.reader.read()


async def test_what_is_no_tls_is_told(tmp_path: Path) -> None:
    async with listening(**certificate(tmp_path)) as home, dialing(home) as plain:
        with refusals() as told:
            plain.writer.write(plain.talk.take_outgoing())
            with contextlib.suppress(ConnectionError):
                await plain.reader.read()
            await until(lambda: any("no TLS" in each for each in told))


@pytest.mark.parametrize("has_tls", [False, True])
def test_hosts_read_each_other_under_uvloop(has_tls: bool, tmp_path: Path) -> None:
    tls = certificate(tmp_path) if has_tls else {}

    async def read() -> None:
        async with (
            listening(**tls) as home,
            featcache.create(settings=quick(**tls), cluster_key=KEY) as reader,
        ):
            got = await reader.get(await home.put(filled(KIB, 3)))
            assert torch.equal(tensor(got), filled(KIB, 3))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(read())


async def test_a_reader_that_trusts_another_authority_does_not_come_in(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    async with (
        listening(**certificate(tmp_path / "one")) as home,
        featcache.create(
            settings=quick(**certificate(tmp_path / "two")), cluster_key=KEY
        ) as reader,
    ):
        ref = await home.put(filled(KIB))
        with pytest.raises(OwnerLost):
            await reader.get(ref)


async def test_two_hosts_read_each_other() -> None:
    async with listening() as one, listening() as two:
        there, here = await one.put(filled(KIB, 1)), await two.put(filled(KIB, 2))
        assert torch.equal(tensor(await two.get(there)), filled(KIB, 1))
        assert torch.equal(tensor(await one.get(here)), filled(KIB, 2))
        await spent(one)
        await spent(two)


async def test_nothing_is_made_for_other_hosts_unless_it_is_asked_for() -> None:
    async with featcache.create(settings=quick()) as owner:
        assert owner.address is None
        assert (await owner.put(filled(KIB))).address == ""
    async with hosts() as both:
        assert both.reader.address is None
