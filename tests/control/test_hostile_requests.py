"""Forged requests and answers about keys and reservations: refused, or ignored.

An owner among such sessions serves the others and loses nothing; a client of such an owner names the
fault, goes on, and leaks nothing.
"""

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import featcache
from control.peers import Peer, frame
from control.test_hostile_owners import SLOTS, owner_that, welcome_of
from featcache import (
    AttachRefused,
    FeatcacheError,
    FeatureCache,
    FeatureClient,
    FeatureRef,
    KeyNotFound,
    MalformedRef,
    OwnerLost,
    PoolFull,
)
from featcache.control import channel, messages
from featcache.control.messages import Goodbye, ProtocolError, encode
from featcache.memory.host.slab import HostMapping, HostSlab
from featcache.memory.words import GRANTS, Header, OwnerWords, SessionWords
from featcache.ref import TensorSpec
from support.caches import KIB, Gate, filled, pair, small, spent, steps, until
from support.keyed import (
    CAPACITY,
    ONE,
    claims,
    grants,
    nothing_lost,
    page_of,
    pool_of,
    queued,
    reserved,
    seeking,
    sought,
)
from support.slabs import same

BYTES = TensorSpec(None, "uint8", (KIB,), 0)


# --- peers of an owner ---------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def session(owner: FeatureCache) -> AsyncIterator[Peer]:
    """A session of a peer that says whatever it likes, and goodbye in the end if it still can."""
    before = owner.statistics().sessions
    with Peer.connect(owner.endpoint) as peer:
        peer.greet()
        assert (await peer.message())["type"] == "welcome"
        yield peer
        with contextlib.suppress(OSError):
            peer.send(frame(encode(Goodbye())))
            await peer.hung_up()
            await until(lambda: owner.statistics().sessions == before)


def say(peer: Peer, message: Any) -> None:
    peer.send(frame(encode(message)))


async def ask(peer: Peer, message: Any) -> dict[str, Any]:
    say(peer, message)
    return await peer.message()


async def refused(peer: Peer, message: Any, error: str) -> None:
    answer = await ask(peer, message)
    assert (answer["type"], answer["error"]) == ("reply", error), answer
    assert answer["request"] == message.request


def reserve(number: int, nbytes: int = KIB, **changes: Any) -> messages.Reserve:
    fields: dict[str, Any] = {"readers": 1, "ttl_s": None, "key": None, "waits": False}
    return messages.Reserve(number, nbytes, **(fields | changes))


async def room(peer: Peer, number: int, nbytes: int = KIB, **changes: Any) -> tuple[int, int]:
    """Reserve a slot; return it with its generation."""
    answer = await ask(peer, reserve(number, nbytes, **changes))
    assert answer["type"] == "reserved", answer
    return answer["slot"], answer["generation"]


def publish(number: int, slot: int, generation: int, *specs: TensorSpec) -> messages.Publish:
    return messages.Publish(number, slot, generation, specs or (BYTES,))


async def serves(owner: FeatureCache, client: FeatureClient) -> None:
    """The owner does its work for another as ever."""
    await client.put(filled(8, 3), key="works")
    assert same(await client.get("works"), filled(8, 3))
    assert same(await client.get_or_put("works", lambda: filled(1)), filled(8, 3))
    assert await client.evict("works")


TOO_EARLY: dict[str, Any] = {
    "find": messages.Find(1, b"a"),
    "find that waits": messages.Find(1, b"a", waits=True, makes=True),
    "of key": messages.KeyCommand(1, b"a", "evict"),
    "reserve": reserve(1),
    "publish": publish(1, 0, 1),
    "write": messages.OpenForWriting(1),
    "withdraw": messages.GiveUpReserved(0, 1, landed=True),
    "unclaim": messages.ReleaseClaim(b"a", 1),
    "cancel": messages.Cancel(1),
    "host pool": messages.HostPool(1),
    "upload": messages.Upload(1, 1, 1, None, None, waits=False, ref=b""),
}


@pytest.mark.parametrize("name", TOO_EARLY)
async def test_before_the_hello(name: str) -> None:
    async with pair() as (owner, client):
        await client.put(filled(8), key="a")
        with Peer.connect(owner.endpoint) as peer:
            say(peer, TOO_EARLY[name])
            await peer.hung_up()
        assert owner.statistics().sessions == 1
        assert await client.contains("a")
        await serves(owner, client)
        await nothing_lost(owner)


WRONG: dict[str, dict[str, Any]] = {
    "no key": {"type": "find", "request": 1},
    "empty key": {"type": "find", "request": 1, "key": b""},
    "key too long": {"type": "find", "request": 1, "key": b"k" * 1025},
    "key that is text": {"type": "find", "request": 1, "key": "k"},
    "negative request": {"type": "find", "request": -1, "key": b"k"},
    "request too large": {"type": "find", "request": 1 << 63, "key": b"k"},
    "no such verb": {"type": "of_key", "request": 1, "key": b"k", "what": "burn"},
    "negative size": {"type": "reserve", "request": 1, "nbytes": -1, "readers": 1, "waits": False},
    "no names": {
        "type": "reserve",
        "request": 1,
        "nbytes": 1,
        "readers": [],
        "ttl_s": None,
        "key": None,
        "waits": False,
    },
    "names that are none": {
        "type": "reserve",
        "request": 1,
        "nbytes": 1,
        "readers": [""],
        "ttl_s": None,
        "key": None,
        "waits": False,
    },
    "ttl of nothing": {
        "type": "reserve",
        "request": 1,
        "nbytes": 1,
        "readers": 1,
        "ttl_s": 0.0,
        "key": None,
        "waits": False,
    },
    "ttl that is no number": {
        "type": "reserve",
        "request": 1,
        "nbytes": 1,
        "readers": 1,
        "ttl_s": float("nan"),
        "key": None,
        "waits": False,
    },
    "no specs": {"type": "publish", "request": 1, "slot": 0, "generation": 1, "specs": []},
    "negative slot": {"type": "withdraw", "slot": -1, "generation": 1, "landed": True},
    "an owner's message": {"type": "granted", "request": 1, "index": 0, "serial": 1, "ref": b""},
}


@pytest.mark.parametrize("name", WRONG)
async def test_an_invalid_message_ends_the_connection(name: str) -> None:
    async with pair() as (owner, client):
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            assert (await peer.message())["type"] == "welcome"
            peer.send(frame(msgspec.msgpack.encode(WRONG[name])))
            await peer.hung_up()
        await serves(owner, client)
        await nothing_lost(owner)


async def test_what_a_session_may_not_reserve(no_leaks: None) -> None:
    async with pair(readers=4, **ONE) as (owner, client), session(owner) as peer:
        for nbytes in (CAPACITY + 1, 1 << 40, (1 << 63) - 1):
            for waits in (False, True):
                await refused(peer, reserve(1, nbytes, waits=waits), "FeatureTooLarge")
        for readers in (0, 5, 1 << 40, ["a", "a"], ["a", "b", "c", "d", "e"]):
            for waits in (False, True):
                await refused(peer, reserve(2, readers=readers, waits=waits), "SettingsError")
        await refused(peer, reserve(3, readers=5, key=b"a"), "SettingsError")
        assert (reserved(owner), owner.statistics().slots_used) == (0, 0)
        await room(peer, 4, readers=0, key=b"a")  # with a key it may owe none
        await room(peer, 5, 0)
        await room(peer, 6, ttl_s=float("inf"))
        await serves(owner, client)
        assert reserved(owner) == 3
        await refused(peer, reserve(7, CAPACITY), "PoolFull")
    async with pair(**ONE) as (owner, client):
        async with session(owner) as peer:
            await room(peer, 1, CAPACITY)
            assert owner.statistics().used_bytes == CAPACITY
        await spent(owner)  # what it reserved goes with its goodbye
        await serves(owner, client)


async def test_what_a_session_may_not_publish(no_leaks: None) -> None:
    """Each is refused and nothing comes of it; what is right is accepted after all that."""
    async with pair(tensors=4) as (owner, client), session(owner) as peer:
        slot, generation = await room(peer, 1, key=b"a", readers=0)
        stale = [
            (slot, generation + 1),
            (slot, generation - 1),
            (slot + 1, generation),
            (1 << 40, generation),
            (slot, (1 << 63) - 1),
        ]
        for other, number in stale:
            await refused(peer, publish(2, other, number), "StaleRef")
        specs: list[tuple[TensorSpec, ...]] = [
            (TensorSpec(None, "uint8", (KIB + 1,), 0),),
            (TensorSpec(None, "uint8", (KIB,), 1),),
            (TensorSpec(None, "uint8", (1,), KIB),),
            (TensorSpec(None, "float32", (KIB,), 0),),
            (TensorSpec(None, "float32", (1,), 2),),
            (TensorSpec(None, "uint8", (1 << 40, 1 << 40), 0),),
            (TensorSpec(None, "uint8", (0, 1 << 40, 1 << 40), 0),),
            (TensorSpec(None, "pickle", (1,), 0),),
            (TensorSpec(None, "", (1,), 0),),
            (TensorSpec("a", "uint8", (1,), 0), TensorSpec("a", "uint8", (1,), 256)),
            (TensorSpec("a", "uint8", (1,), 0), TensorSpec(None, "uint8", (1,), 256)),
        ]
        for wrong in specs:
            await refused(peer, publish(3, slot, generation, *wrong), "MalformedRef")
        many = [TensorSpec(f"{n}", "uint8", (1,), 0) for n in range(5)]
        await refused(peer, publish(3, slot, generation, *many), "SettingsError")
        assert not await client.contains("a")
        assert reserved(owner) == 1
        page_of(owner, 2).words.written[slot] = generation
        answer = await ask(peer, publish(4, slot, generation))
        assert answer["type"] == "published"
        assert len(bytes_of(await client.get("a"))) == KIB
        await refused(peer, publish(5, slot, generation), "StaleRef")  # twice
        say(
            peer, messages.GiveUpReserved(slot, generation, landed=True)
        )  # and it is too late for that
        await serves(owner, client)
        assert await client.contains("a")
        await nothing_lost(owner)


def bytes_of(feature: Any) -> bytes:
    assert isinstance(feature, torch.Tensor)
    return feature.numpy().tobytes()


async def test_another_sessions_slot_is_not_touched(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    gate = Gate()
    async with pair(inline_bytes=0) as (owner, client), session(owner) as peer:
        monkeypatch.setattr(HostMapping, "write", gate.wrap(HostMapping.write))
        putting = asyncio.create_task(client.put(filled(KIB, 7), key="a"))
        await until(gate.entered.is_set)
        ((index, slot),) = page_of(owner, 1).reserved.items()
        await refused(peer, publish(1, index, slot.generation), "StaleRef")
        for landed in (True, False):
            say(peer, messages.GiveUpReserved(index, slot.generation, landed))
        say(peer, messages.Discard(2, index, slot.generation))  # which waits: it may be published
        page_of(owner, 2).words.written[index] = slot.generation  # the word is in its own page
        pool_of(owner).collect()
        assert list(page_of(owner, 1).reserved) == [index]
        assert pool_of(owner).words.published[index] != slot.generation
        gate.open()
        await putting
        assert (await peer.message())["error"] is None
        assert same(await owner.get("a"), filled(KIB, 7))
        await nothing_lost(owner)


async def test_slots_of_others_are_not_given_up(no_leaks: None) -> None:
    async with pair() as (owner, client), session(owner) as peer:
        ref = await client.put(filled(KIB, 5), key="a", readers=1)
        slot, generation = await room(peer, 1)
        for wrong in (
            (slot, generation + 1),
            (ref.slot, ref.generation),
            (1 << 40, 1),
            (slot, 0),
        ):
            for landed in (True, False):
                say(peer, messages.GiveUpReserved(*wrong, landed))
        await refused(peer, publish(2, slot + 1, 1), "StaleRef")  # all those were heard
        assert reserved(owner) == 1
        for _ in range(3):
            say(peer, messages.GiveUpReserved(slot, generation, landed=True))
        await until(lambda: not reserved(owner))
        assert owner.statistics().slots_used == 1
        assert same(await client.get(ref), filled(KIB, 5))
        await nothing_lost(owner)


async def test_bytes_that_a_session_never_writes_are_given_up_when_it_ends(no_leaks: None) -> None:
    """It says that they are on their way: until it goes nobody gets their room, and readers wait."""
    async with pair(**ONE) as (owner, client):
        async with session(owner) as peer:
            slot, generation = await room(peer, 1, CAPACITY // 2, key=b"a", readers=0)
            whole = TensorSpec(None, "uint8", (CAPACITY // 2,), 0)
            await ask(peer, publish(2, slot, generation, whole))
            other = await room(peer, 3, CAPACITY // 2)
            say(peer, messages.GiveUpReserved(*other, landed=False))
            await until(lambda: not reserved(owner))
            waiting = asyncio.create_task(client.get("a"))
            await until(lambda: grants(owner) == 1)
            with pytest.raises(PoolFull):
                await client.put(filled(CAPACITY // 2), on_full="raise", readers=1)
            assert not waiting.done()
        with pytest.raises(KeyNotFound):
            await waiting
        await spent(owner)
        await serves(owner, client)


async def test_claims_of_others_are_not_ended(no_leaks: None) -> None:
    async with pair() as (owner, client), session(owner) as peer:
        go, made = asyncio.Event(), []

        async def make() -> torch.Tensor:
            made.append(1)
            await go.wait()
            return filled(8, len(made))

        making = asyncio.create_task(client.get_or_put("a", make))
        await until(lambda: claims(owner) == 1)
        beside = asyncio.create_task(owner.get_or_put("a", make))
        await sought(owner, 1)
        for number in range(20):
            say(peer, messages.ReleaseClaim(b"a", number))
            say(peer, messages.ReleaseClaim(b"b", number))
        await refused(peer, messages.Find(1, b"b"), "KeyNotFound")  # all those were heard
        await steps(5)
        once = len(made)
        go.set()
        assert same(await making, filled(8, 1))
        await beside
        assert once == 1
        await nothing_lost(owner)


async def test_a_claim_that_is_ended_and_never_made(no_leaks: None) -> None:
    async with pair() as (owner, client):
        async with session(owner) as peer:
            answer = await ask(peer, messages.Find(1, b"a", makes=True))
            assert answer["type"] == "may_make"
            waiting = asyncio.create_task(client.get_or_put("a", lambda: filled(8, 2)))
            await sought(owner, 1)
            for _ in range(3):
                say(peer, messages.ReleaseClaim(b"a", answer["claim"]))
            assert same(await waiting, filled(8, 2))
            assert (await ask(peer, messages.Find(2, b"c", makes=True)))["type"] == "may_make"
            waiting = asyncio.create_task(client.get_or_put("c", lambda: filled(8, 3)))
            await sought(owner, 1)
        assert same(await waiting, filled(8, 3)), "its goodbye ended its claim"
        await nothing_lost(owner)


async def test_cancels_of_unknown_requests_are_ignored(no_leaks: None) -> None:
    async with pair() as (owner, client), session(owner) as peer:
        waiting = asyncio.create_task(client.get("a", timeout=20))
        await sought(owner, 1)
        say(peer, messages.Find(7, b"a", waits=True))
        await sought(owner, 2)
        for number in range(7):  # the client's own numbers are among them
            say(peer, messages.Cancel(number))
        await refused(peer, messages.Find(8, b"b"), "KeyNotFound")
        assert seeking(owner) == 2
        for _ in range(3):
            say(peer, messages.Cancel(7))
        answer = await peer.message()
        assert (answer["request"], answer["error"]) == (7, "FeatcacheError")
        assert seeking(owner) == 1
        await client.put(filled(8), key="a")
        await waiting
        await nothing_lost(owner)


async def test_one_number_for_two_requests_in_progress() -> None:
    async with pair() as (owner, client):
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            await peer.message()
            say(peer, messages.Find(1, b"a", waits=True))
            await sought(owner, 1)
            say(peer, messages.Find(1, b"b", waits=True))
            await peer.hung_up()
        await until(lambda: not seeking(owner))
        await serves(owner, client)
        await nothing_lost(owner)


@pytest.mark.parametrize("end", ["goodbye", "hang up"])
async def test_a_session_that_ends_while_it_waits(end: str) -> None:
    """Its places go; what it has been given stays its own as long as its process may use it."""
    async with pair(**ONE) as (owner, client):
        await owner.put(filled(CAPACITY // 2), key="kept")
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            await peer.message()
            answer = await ask(peer, messages.Find(1, b"kept"))
            assert answer["type"] == "granted"
            mine = await room(peer, 2, CAPACITY // 2)
            say(peer, reserve(3, CAPACITY, waits=True))
            say(peer, messages.Find(4, b"a", waits=True, makes=False))
            say(peer, messages.Find(5, b"b", waits=True, makes=True))
            await queued(owner, 1)
            await until(lambda: (seeking(owner), claims(owner)) == (1, 1))
            if end == "goodbye":
                say(peer, Goodbye())
            else:
                peer.sock.shutdown(socket.SHUT_RDWR)
            await peer.hung_up()
        await queued(owner, 0)
        await until(lambda: not seeking(owner))
        if end == "goodbye":
            await until(lambda: not (grants(owner) or reserved(owner) or claims(owner)))
            await nothing_lost(owner)
            await serves(owner, client)
        else:
            assert (grants(owner), reserved(owner)) == (1, 1)
            assert page_of(owner, 2).reserved[mine[0]].generation == mine[1]


async def test_a_session_that_takes_all_it_may_keeps_nobody_else_from_theirs() -> None:
    async with pair(grants=8, waiters=16, slots=64) as (owner, client), session(owner) as peer:
        await owner.put(filled(8, 4), key="a")
        for number in range(8):
            assert (await ask(peer, messages.Find(number, b"a")))["type"] == "granted"
        await refused(peer, messages.Find(9, b"a"), "PoolFull")
        for number in range(100, 116):
            say(peer, messages.Find(number, b"absent", waits=True))
        await sought(owner, 16)
        await refused(peer, messages.Find(200, b"absent", waits=True), "PoolFull")
        assert same(await client.get("a"), filled(8, 4))
        await serves(owner, client)
        for number in range(100, 116):
            say(peer, messages.Cancel(number))
            await peer.message()
        granted = page_of(owner, 2).words.granted
        for index, grant in page_of(owner, 2).grants.items():
            granted[index] = grant.serial
        await until(lambda: not grants(owner))
        await nothing_lost(owner)


async def test_a_session_that_reads_none_of_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its answers hand over and can't reach it is taken back, or goes with its session."""
    monkeypatch.setattr(channel, "_MAX_QUEUED", 1024)  # before it has reserved all slots there are
    async with pair(grants=64) as (owner, client):
        await owner.put(filled(8, 4), key="a")
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            assert (await peer.message())["type"] == "welcome"
            asks = [messages.Find(n, b"a") for n in range(64)] + [reserve(100)]
            with pytest.raises(ConnectionError):
                await peer.flood(b"".join(frame(encode(message)) for message in asks))
        await until(lambda: owner.statistics().sessions == 2)
        assert grants(owner) <= 64
        await serves(owner, client)


async def test_uploads_that_are_forged(no_leaks: None) -> None:
    async with pair() as (owner, client), session(owner) as peer:
        ref = await client.put(filled(KIB, 6), readers=1)
        forged: list[tuple[bytes, int, str]] = [
            (b"", KIB, "MalformedRef"),
            (b"fR\x01garbage", KIB, "MalformedRef"),
            (ref.to_bytes(), KIB, "UnknownPool"),
            (msgspec.structs.replace(ref, pool_id=bytes(16)).to_bytes(), KIB, "UnknownPool"),
            (ref.to_bytes(), 1 << 40, "FeatureTooLarge"),
        ]
        for data, nbytes, error in forged:
            upload = messages.Upload(1, nbytes, 1, None, None, waits=False, ref=data)
            await refused(peer, upload, error)
        assert same(await client.get(ref), filled(KIB, 6))
        await spent(owner)


async def test_noise_of_every_kind_at_once(no_leaks: None) -> None:
    """Hundreds of well-formed requests about things that are not its own: nothing of others changes."""
    async with pair(**ONE) as (owner, client):
        ref = await client.put(filled(KIB, 8), key="a", readers=1)
        await client.pin("a")
        async with client.borrow("a") as view, session(owner) as peer:
            numbers = itertools.count()
            for slot, generation in itertools.product(range(8), range(8)):
                say(peer, messages.GiveUpReserved(slot, generation, landed=bool(slot % 2)))
                say(peer, messages.ReleaseClaim(b"a", generation))
                say(peer, messages.Cancel(generation))
                say(peer, publish(next(numbers), slot, generation))
                say(peer, messages.KeyCommand(next(numbers), b"a", "contains"))
                say(peer, messages.Relay(next(numbers), ref.to_bytes()[:-1]))
                for _ in range(3):
                    await peer.message()
            assert same(view, filled(KIB, 8))
            assert owner.statistics().pinned_bytes == KIB
        assert same(await client.get(ref), filled(KIB, 8))
        await nothing_lost(owner)


# --- owners of a client --------------------------------------------------------------------------

POOL = bytes(range(16))
HOST_CAPACITY = 64 << 10


class Furnished:
    """What an owner that says whatever it likes sends along, and can still write."""

    def __init__(self) -> None:
        self.words, words_fd = OwnerWords.create(SLOTS)
        self.words.header[Header.CAPACITY] = HOST_CAPACITY
        self.page, page_fd = SessionWords.create(SLOTS)
        self.slab = HostSlab(HOST_CAPACITY, huge_pages=False)
        self._own = [os.pidfd_open(os.getpid()), words_fd, page_fd, os.eventfd(0)]
        self.fds = self._own + self.slab.descriptors()

    def close(self) -> None:
        self.slab.close()
        for fd in self._own:
            os.close(fd)

    def make_live(self, ref: FeatureRef) -> None:
        """Have the words say what a ref says."""
        self.words.make_live(ref.slot, ref.generation, ref.offset_bytes, ref.nbytes)
        self.words.published[ref.slot] = ref.generation


Answering = Callable[[dict[str, Any], Furnished], Any]
"""What is answered to a request: a message, a message with descriptors, or nothing."""


async def next_message(peer: Peer) -> dict[str, Any]:
    """What a client says next; one that hung up, for what it was told, has said goodbye."""
    try:
        return await peer.message()
    except AssertionError:
        return {"type": "goodbye"}


@contextlib.asynccontextmanager
async def client_of(
    runtime_dir: Path, *answers: Answering
) -> AsyncIterator[tuple[FeatureClient, Furnished]]:
    """A client of an owner that answers its requests so, one after the other, and no more after that."""
    furnished = Furnished()

    async def act(peer: Peer) -> None:
        await peer.message()
        peer.send(frame(welcome_of(), len(furnished.fds)), furnished.fds)
        turns: Iterator[Answering] = iter(answers)
        while (message := await next_message(peer))["type"] != "goodbye":
            if message["type"] in {"withdraw", "unclaim", "cancel"}:
                continue
            answering = next(turns, None)
            if answering is None:
                continue
            answer = answering(message, furnished)
            fds: list[int] = []
            if isinstance(answer, tuple):
                answer, fds = answer
            peer.send(frame(encode(answer), len(fds)), fds)
        with contextlib.suppress(OSError):
            peer.send(frame(encode(messages.Farewell())))
        await peer.hung_up()

    try:
        async with (
            owner_that(act, runtime_dir) as endpoint,
            featcache.connect(endpoint, settings=small()) as client,
        ):
            yield client, furnished
    finally:
        furnished.close()


def ref_of(**changes: Any) -> FeatureRef:
    fields: dict[str, Any] = {
        "pool_id": POOL,
        "endpoint": "",
        "slot": 1,
        "generation": 1,
        "offset_bytes": 256,
        "nbytes": KIB,
        "specs": (BYTES,),
    }
    return FeatureRef(**(fields | changes))


def granted(ref: FeatureRef | bytes, index: int = 0, serial: int = 1) -> Answering:
    data = ref if isinstance(ref, bytes) else ref.to_bytes()
    return lambda ask, _: messages.Granted(ask["request"], index, serial, data)


def entitled(ref: FeatureRef, index: int = 0, serial: int = 1) -> Answering:
    """A grant of what the words say too."""

    def answer(ask: dict[str, Any], furnished: Furnished) -> messages.Granted:
        furnished.make_live(ref)
        return messages.Granted(ask["request"], index, serial, ref.to_bytes())

    return answer


def reply(**changes: Any) -> Answering:
    return lambda ask, _: messages.Reply(ask["request"], **changes)


def may_make(ask: dict[str, Any], _: Furnished) -> messages.ClaimGranted:
    return messages.ClaimGranted(ask["request"], 3)


def a_slot(slot: int = 1, generation: int = 1, offset_bytes: int = 0) -> Answering:
    return lambda ask, _: messages.Reserved(ask["request"], slot, generation, offset_bytes)


def published(ask: dict[str, Any], _: Furnished) -> Any:
    return messages.Published(ask["request"])


def writable(ask: dict[str, Any], furnished: Furnished) -> Any:
    return messages.WriteDescriptors(ask["request"]), furnished.slab.write_descriptors()


Use = Callable[[FeatureClient], Awaitable[Any]]
USES: dict[str, Use] = {
    "get": lambda client: client.get("a"),
    "waiting get": lambda client: client.get("a", timeout=20),
    "borrow": lambda client: client.borrow("a").__aenter__(),
    "get or put": lambda client: client.get_or_put("a", lambda: filled(8)),
}
NONSENSE: dict[str, tuple[Answering, type[FeatcacheError]]] = {
    "no ref": (granted(b""), MalformedRef),
    "garbage for a ref": (granted(b"fR\x01" + bytes(40)), MalformedRef),
    "a ref of another pool": (entitled(ref_of(pool_id=bytes(16))), MalformedRef),
    "a slot that there is not": (granted(ref_of(slot=SLOTS)), MalformedRef),
    "a slot far from any": (granted(ref_of(slot=(1 << 32) - 1)), MalformedRef),
    "an extent that is not its slot's": (granted(ref_of()), MalformedRef),
    "yes": (reply(flag=True), ProtocolError),
    "a slot to write": (a_slot(), ProtocolError),
    "a mapping to write": (writable, ProtocolError),
}


@pytest.mark.usefixtures("no_key_table")
@pytest.mark.parametrize("answer", NONSENSE)
async def test_a_lookup_that_is_answered_with(answer: str, runtime_dir: Path) -> None:
    answering, error = NONSENSE[answer]
    for use in USES.values():
        async with client_of(runtime_dir, answering) as (client, _):
            with pytest.raises(error):
                await use(client)
            assert [
                handle.attachment.holds for handle in client._opened().registry.connections
            ] == [0]


@pytest.mark.usefixtures("no_key_table")
@pytest.mark.parametrize("use", ["get", "waiting get", "borrow"])
async def test_a_claim_that_was_not_requested(use: str, runtime_dir: Path) -> None:
    async with client_of(runtime_dir, may_make) as (client, _):
        with pytest.raises(ProtocolError, match="claim"):
            await USES[use](client)


async def test_an_extent_beyond_the_slab_is_never_read(runtime_dir: Path, no_leaks: None) -> None:
    """The words say so too: it is waited for like a segment that is yet to come."""
    for changes in (
        {"offset_bytes": HOST_CAPACITY},
        {"offset_bytes": HOST_CAPACITY - 256},
        {"offset_bytes": 1 << 47},
    ):
        async with client_of(runtime_dir, entitled(ref_of(**changes))) as (client, _):
            with pytest.raises(featcache.GetTimeout):
                await client.get("a", timeout=0.05)


@pytest.mark.usefixtures("no_key_table")
async def test_a_grant_of_a_generation_that_is_over(runtime_dir: Path) -> None:
    ref = ref_of()

    def old(ask: dict[str, Any], furnished: Furnished) -> messages.Granted:
        furnished.make_live(ref_of(generation=2))
        return messages.Granted(ask["request"], 0, 1, ref.to_bytes())

    async with client_of(runtime_dir, old, reply(error="KeyNotFound", text="gone")) as (client, _):
        with pytest.raises(KeyNotFound, match="gone"):
            await client.get("a")


@pytest.mark.parametrize("index", [GRANTS, (1 << 63) - 1])
async def test_a_grant_whose_word_is_beyond_the_page(index: int, runtime_dir: Path) -> None:
    """On a GPU its payment would be a store to wherever that is."""
    assert issubclass(await raised_by_grant_at(index, runtime_dir), FeatcacheError)


async def raised_by_grant_at(index: int, runtime_dir: Path) -> type:
    async with client_of(runtime_dir, entitled(ref_of(), index)) as (client, _):
        (result,) = await asyncio.gather(client.get("a"), return_exceptions=True)
        kind = type(result)
        del result
    return kind


@pytest.mark.usefixtures("no_key_table")
async def test_a_grant_that_is_given_out_twice(runtime_dir: Path) -> None:
    assert issubclass(await raised_by_two_of_one_grant(runtime_dir), FeatcacheError)


async def raised_by_two_of_one_grant(runtime_dir: Path) -> type:
    answer = entitled(ref_of())
    async with client_of(runtime_dir, answer, answer) as (client, _):
        borrow = client.borrow("a")
        await borrow.__aenter__()
        (result,) = await asyncio.gather(client.get("a"), return_exceptions=True)
        kind = type(result)
        del result
        with contextlib.suppress(KeyError):
            await borrow.__aexit__(None, None, None)
    return kind


ANSWERS: dict[str, Answering] = {
    "a grant": granted(ref_of()),
    "a claim": may_make,
    "a slot to write": a_slot(),
    "a mapping to write": writable,
    "yes": reply(flag=True),
}
QUESTIONS: dict[str, Use] = {
    "contains": lambda client: client.contains("a"),
    "evict": lambda client: client.evict("a"),
    "pin": lambda client: client.pin("a"),
    "unpin": lambda client: client.unpin("a"),
}


@pytest.mark.usefixtures("no_key_table")
@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if answer != "yes"])
async def test_a_question_that_is_answered_with(answer: str, runtime_dir: Path) -> None:
    for question in QUESTIONS.values():
        async with client_of(runtime_dir, ANSWERS[answer]) as (client, _):
            with pytest.raises(ProtocolError):
                await question(client)


@pytest.mark.parametrize("use", ["get", "contains", "discard", "reserve", "publish"])
async def test_descriptors_with_answers_that_carry_none_are_closed(
    use: str, runtime_dir: Path
) -> None:
    before = pipes()
    await with_descriptors(use, runtime_dir)
    assert pipes() == before


def pipes() -> int:
    """How many ends of pipes this process has open."""
    found = Path("/proc/self/fd").iterdir()
    return sum(link(entry).startswith("pipe:") for entry in found)


def link(entry: Path) -> str:
    try:
        return os.readlink(entry)  # noqa: PTH115 - a pipe is no path
    except FileNotFoundError:  # the descriptor of the listing
        return ""


async def with_descriptors(use: str, runtime_dir: Path) -> None:
    """Have requests answered with descriptors; those that come are closed in the end all the same."""
    here, there = os.pipe()

    def beside(answering: Answering) -> Answering:
        return lambda ask, furnished: (answering(ask, furnished), [here, there])

    uses: dict[str, tuple[Use, list[Answering]]] = {
        "get": (USES["get"], [beside(entitled(ref_of()))]),
        "contains": (QUESTIONS["contains"], [beside(reply(flag=True))]),
        "discard": (lambda client: client.discard(ref_of()), [beside(reply())]),
        "reserve": (lambda client: client.put(filled(KIB)), [writable, beside(a_slot()), reply()]),
        "publish": (
            lambda client: client.put(filled(KIB), key="a"),
            [writable, a_slot(), beside(published)],
        ),
    }
    do, answers = uses[use]
    async with client_of(runtime_dir, *answers) as (client, _):
        with contextlib.suppress(FeatcacheError):  # it may be taken for a fault of the owner's
            await do(client)
    os.close(here)
    os.close(there)


# --- owners of a writer --------------------------------------------------------------------------


Descriptors = Callable[[Furnished], list[int]]


def wrong_size(_: Furnished) -> list[int]:
    fd = os.memfd_create("wrong")
    os.ftruncate(fd, HOST_CAPACITY + 4096)
    return [fd]


DESCRIPTORS: dict[str, Descriptors] = {
    "none": lambda _: [],
    "two": lambda furnished: [os.dup(fd) for fd in furnished.slab.write_descriptors() * 2],
    "one of another size": wrong_size,
    "an eventfd": lambda _: [os.eventfd(0)],
    "a folder": lambda _: [os.open("/", os.O_RDONLY)],
}


@pytest.mark.parametrize("what", DESCRIPTORS)
async def test_a_mapping_to_write_that_is_none(what: str, runtime_dir: Path) -> None:
    sent: list[int] = []

    def answer(ask: dict[str, Any], furnished: Furnished) -> Any:
        sent[:] = DESCRIPTORS[what](furnished)
        return messages.WriteDescriptors(ask["request"]), sent

    async with client_of(runtime_dir, answer) as (client, _):
        with pytest.raises(AttachRefused):
            await client.put(filled(KIB))
    for fd in sent:
        os.close(fd)


async def test_a_mapping_to_write_that_may_only_be_read(runtime_dir: Path) -> None:
    def answer(ask: dict[str, Any], furnished: Furnished) -> Any:
        return messages.WriteDescriptors(ask["request"]), furnished.slab.descriptors()

    async with client_of(runtime_dir, answer) as (client, _):
        (result,) = await asyncio.gather(client.put(filled(KIB)), return_exceptions=True)
        kind = type(result)
        del result
    assert issubclass(kind, FeatcacheError)


@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if answer != "a mapping to write"])
async def test_a_writer_that_is_answered_with(
    answer: str, runtime_dir: Path, no_leaks: None
) -> None:
    async with client_of(runtime_dir, ANSWERS[answer], ANSWERS[answer]) as (client, _):
        for _ in range(2):
            with pytest.raises(ProtocolError):
                await client.put(filled(KIB))


@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if answer != "a slot to write"])
async def test_a_put_that_is_answered_with(answer: str, runtime_dir: Path, no_leaks: None) -> None:
    async with client_of(runtime_dir, writable, ANSWERS[answer]) as (client, _):
        with pytest.raises(ProtocolError):
            await client.put(filled(KIB))


@pytest.mark.parametrize("answer", ANSWERS)
async def test_a_publish_that_is_answered_with(
    answer: str, runtime_dir: Path, no_leaks: None
) -> None:
    async with client_of(runtime_dir, writable, a_slot(), ANSWERS[answer]) as (client, _):
        with pytest.raises(ProtocolError):
            await client.put(filled(KIB), key="a")
        assert client.statistics().puts == 0


BEYOND: dict[str, Answering] = {
    "slot beyond the table": a_slot(slot=SLOTS),
    "slot far beyond": a_slot(slot=(1 << 63) - 1),
    "room beyond the slab": a_slot(offset_bytes=HOST_CAPACITY),
    "room across its end": a_slot(offset_bytes=HOST_CAPACITY - 256),
    "room far beyond": a_slot(offset_bytes=(1 << 63) - 1),
}


@pytest.mark.parametrize("answer", BEYOND)
async def test_room_that_is_none(answer: str, runtime_dir: Path, no_leaks: None) -> None:
    """A slot beyond the table would be a word stored elsewhere; room beyond the slab never comes."""
    assert issubclass(await raised_by_room(BEYOND[answer], runtime_dir), FeatcacheError)


async def raised_by_room(answer: Answering, runtime_dir: Path) -> type:
    async with client_of(runtime_dir, writable, answer, reply()) as (client, _):
        putting = asyncio.create_task(client.put(filled(KIB)))
        await asyncio.wait([putting], timeout=10.0)
        putting.cancel()
        (result,) = await asyncio.gather(putting, return_exceptions=True)
        kind = type(result)
        del result
    return kind


@pytest.mark.usefixtures("no_key_table")
async def test_errors_that_an_owner_answers_are_as_they_are_named(runtime_dir: Path) -> None:
    told = [
        ("PoolFull", featcache.PoolFull),
        ("KeyTimeout", featcache.KeyTimeout),
        ("OwnerLost", OwnerLost),
        ("SystemExit", FeatcacheError),
        ("__all__", FeatcacheError),
        ("", FeatcacheError),
    ]
    for name, kind in told:
        async with client_of(runtime_dir, reply(error=name, text="as told")) as (client, _):
            with pytest.raises(FeatcacheError, match="as told") as caught:
                await client.get("a")
            assert type(caught.value) is kind


async def test_an_owner_that_goes_in_the_middle_of_a_put(runtime_dir: Path, no_leaks: None) -> None:
    async def act(peer: Peer) -> None:
        await peer.message()
        furnished = Furnished()
        try:
            peer.send(frame(welcome_of(), len(furnished.fds)), furnished.fds)
            ask = await peer.message()
            answer, fds = writable(ask, furnished)
            peer.send(frame(encode(answer), len(fds)), fds)
            ask = await peer.message()
            peer.send(frame(encode(a_slot()(ask, furnished))))
            assert (await peer.message())["type"] == "publish"
        finally:
            furnished.close()

    async with owner_that(act, runtime_dir) as endpoint, featcache.connect(endpoint) as client:
        with pytest.raises(OwnerLost):
            await client.put(filled(KIB), key="a")
