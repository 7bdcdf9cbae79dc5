"""Relays that no client of this library asks for: an answer at most, and nobody else is harmed."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import torch

import featcache
from control.peers import Peer, frame
from featcache import FeatureCache, FeatureRef, SettingsError
from featcache.control import dispatch as requests
from featcache.control.messages import Relay, encode
from featcache.ref import TensorSpec
from support.caches import KIB, MIB, filled, small, tensor, until
from support.hosted import all_spent, has_host_pool, serving, store, through_host

pytestmark = pytest.mark.usefixtures("no_leaks")

BYTE = TensorSpec(None, "uint8", (1,), 0)
MOST = 64
"""Relays that were once all that a session might have under way."""


@contextlib.asynccontextmanager
async def owner_and_peer(**changes: Any) -> AsyncIterator[tuple[FeatureCache, Peer]]:
    """An owner with short lives of copies, and a session with no manners."""
    chosen: dict[str, Any] = {"relay_ttl": 0.05} | changes
    async with featcache.create(settings=small(**chosen)) as owner:
        with Peer.connect(owner.endpoint) as peer:
            peer.greet()
            welcome = await peer.message()
            assert (welcome["type"], welcome["relays"]) == ("welcome", True)
            yield owner, peer


def ask(peer: Peer, ref: FeatureRef | bytes, number: int = 1) -> None:
    data = ref if isinstance(ref, bytes) else ref.to_bytes()
    peer.send(frame(encode(Relay(number, data))))


async def serves(owner: FeatureCache) -> None:
    """Others are served, directly and through the host."""
    for settings in (small(), through_host()):
        async with featcache.connect(owner.endpoint, settings=settings) as client:
            ref = await owner.put(filled(KIB, 7))
            assert torch.equal(tensor(await client.get(ref)), filled(KIB, 7))
    await all_spent(owner)


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (b"", "MalformedRef"),
    "garbage": (b"fR\x01" + bytes(40), "MalformedRef"),
    "cut short": (lambda ref: ref.to_bytes()[:-1], "MalformedRef"),
    "damaged": (lambda ref: ref.to_bytes()[:-1] + b"\xff", "MalformedRef"),
    "another pool": ({"pool_id": bytes(16)}, "UnknownPool"),
    "no such slot": ({"slot": (1 << 32) - 1}, "StaleRef"),
    "a free slot": ({"slot": 5}, "StaleRef"),
    "another generation": ({"generation": 77}, "StaleRef"),
    "further on": ({"offset_bytes": 256}, "MalformedRef"),
    "far outside": ({"offset_bytes": 1 << 47}, "MalformedRef"),
    "longer": ({"nbytes": 2 * KIB}, "MalformedRef"),
    "shorter": ({"nbytes": 1, "specs": (BYTE,)}, "MalformedRef"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_refs_that_are_none(name: str) -> None:
    change, kind = WRONG[name]
    async with owner_and_peer() as (owner, peer):
        ref = await owner.put(filled(KIB, 3))
        if isinstance(change, dict):
            wrong = msgspec.structs.replace(ref, **change)
        else:
            wrong = change(ref) if callable(change) else change
        ask(peer, wrong, 9)
        answer = await peer.message()
        assert (answer["type"], answer["request"]) == ("reply", 9)
        assert answer["error"] == kind
        assert answer["text"]
        assert answer["ref"] == b""
        assert owner.statistics().relayed == 0
        assert not has_host_pool(owner)
        assert torch.equal(tensor(await owner.get(ref)), filled(KIB, 3))
        await serves(owner)


async def test_stale_refs() -> None:
    async with owner_and_peer() as (owner, peer):
        paid, discarded = await owner.put(filled(KIB)), await owner.put(filled(KIB))
        await owner.get(paid)
        await owner.discard(discarded)
        for number, ref in enumerate((paid, discarded)):
            if ref is paid:
                owner._opened().pool.collect()
            ask(peer, ref, number)
            answer = await peer.message()
            assert (answer["request"], answer["error"]) == (number, "StaleRef")
        await serves(owner)


async def test_who_asks_for_what_it_does_not_hold() -> None:
    """It gets a copy that owes one read and goes by itself; the feature is owed as before."""
    async with owner_and_peer() as (owner, peer):
        ref = await owner.put(filled(KIB, 3))
        for number in range(3):
            ask(peer, ref, number)
            there = FeatureRef.from_bytes((await peer.message())["ref"])
            assert there.pool_id == serving(owner).pool.pool_id
            assert there.specs == ref.specs
        assert store(owner).puts == owner.statistics().relayed == 3
        await until(lambda: store(owner).expired == 3)
        assert owner.statistics().slots_used == 1
        assert torch.equal(tensor(await owner.get(ref)), filled(KIB, 3))
        await serves(owner)


async def test_a_ref_with_other_tensors_than_were_put() -> None:
    """Its extent is right, so it is answered: what it makes of its copy is its own affair."""
    async with owner_and_peer() as (owner, peer):
        ref = await owner.put(filled(KIB, 3))
        ask(peer, msgspec.structs.replace(ref, specs=(BYTE,), endpoint="/elsewhere"))
        there = FeatureRef.from_bytes((await peer.message())["ref"])
        assert there.specs == (BYTE,)
        assert there.endpoint == serving(owner).pool.endpoint
        assert tensor(await owner.get(there)).tolist() == [3]
        await owner.get(ref)
        await serves(owner)


def as_long_as(limit_bytes: int, ref: FeatureRef) -> FeatureRef:
    """The ref with names so long that a message that asks for it is of just this many bytes."""

    def with_last(length: int) -> FeatureRef:
        names = ["a" * 250, "b" * 250, "c" * 250, "d" * length]
        specs = tuple(TensorSpec(name, "uint8", (1,), 0) for name in names)
        return msgspec.structs.replace(ref, specs=specs, endpoint="")

    made = with_last(100 + limit_bytes - len(encode(Relay(1, with_last(100).to_bytes()))))
    assert len(encode(Relay(1, made.to_bytes()))) == limit_bytes
    return made


async def test_an_answer_that_is_too_long_to_send() -> None:
    """The copy's ref has an endpoint, which what was asked with had not: it is longer than may be."""
    async with owner_and_peer(message_bytes=KIB) as (owner, peer):
        ref = await owner.put(filled(KIB, 3))
        ask(peer, as_long_as(KIB, ref))
        answer = await peer.message()
        assert (answer["request"], answer["error"]) == (1, "SettingsError")
        assert "message_bytes" in answer["text"]
        await owner.get(ref)
        await serves(owner)


async def test_a_question_that_is_too_long_to_send() -> None:
    names = [f"{n}".ljust(200, "x") for n in range(6)]
    feature = {name: filled(1, n) for n, name in enumerate(names)}
    async with (
        featcache.create(settings=small()) as owner,
        featcache.connect(owner.endpoint, settings=through_host(message_bytes=KIB)) as client,
    ):
        ref = await owner.put(feature)
        for use in (client.get(ref), client.borrow(ref).__aenter__()):
            with pytest.raises(SettingsError, match="message_bytes"):
                await use
        await client.release(ref)
        await all_spent(owner)


async def test_relays_of_the_host_pool_itself() -> None:
    """It is in host memory already: there is nothing to copy it to."""
    async with owner_and_peer() as (owner, peer):
        ref = await owner.put(filled(KIB, 3))
        ask(peer, ref)
        there = FeatureRef.from_bytes((await peer.message())["ref"])
        with Peer.connect(there.endpoint) as second:
            second.greet()
            assert (await second.message())["relays"] is False
            ask(second, there)
            assert (await second.message())["error"] == "BackendUnavailable"
        ask(peer, there)  # and the slab's owner does not copy what is not in the slab
        assert (await peer.message())["error"] == "UnknownPool"
        await owner.get(ref)
        await serves(owner)


# --- how many ------------------------------------------------------------------------------------


async def late(owner: FeatureCache) -> FeatureRef:
    """A ref whose bytes do not come for now: a relay of it stays under way."""
    ref = await owner.put(filled(KIB, 3))
    owner._opened().pool.words.published[ref.slot] = 0
    return ref


def in_progress(owner: FeatureCache) -> int:
    return sum(len(session.copies) for session in owner._opened().main.server.sessions.values())


async def test_as_many_as_may_be_are_answered() -> None:
    async with owner_and_peer(relay_ttl=5.0) as (owner, peer):
        ref = await late(owner)
        for number in range(MOST):
            ask(peer, ref, number)
        await until(lambda: in_progress(owner) == MOST)
        owner._opened().pool.words.published[ref.slot] = ref.generation
        answers = [await peer.message() for _ in range(MOST)]
        assert {answer["request"] for answer in answers} == set(range(MOST))
        assert all(answer["error"] is None for answer in answers)
        assert len({answer["ref"] for answer in answers}) == MOST
        await until(lambda: in_progress(owner) == 0)


async def test_many_more_are_answered() -> None:
    async with owner_and_peer(relay_ttl=5.0) as (owner, peer):
        ref = await late(owner)
        for number in range(2 * MOST):
            ask(peer, ref, number)
        await until(lambda: in_progress(owner) == 2 * MOST)
        owner._opened().pool.words.published[ref.slot] = ref.generation
        answers = [await peer.message() for _ in range(2 * MOST)]
        assert {answer["request"] for answer in answers} == set(range(2 * MOST))
        assert all(answer["error"] is None for answer in answers)
        await until(lambda: in_progress(owner) == 0)


async def test_more_than_may_be_end_this_session_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requests, "_MAX_COPIES", 2 * MOST)
    async with owner_and_peer() as (owner, peer):
        ref = await late(owner)
        for number in range(2 * MOST + 1):
            ask(peer, ref, number)
        await peer.hung_up()
        await until(lambda: in_progress(owner) == 0)  # nobody could get their answers
        owner._opened().pool.words.published[ref.slot] = ref.generation
        await owner.get(ref)
        assert owner.statistics().relayed == 0
        await serves(owner)
        assert owner.statistics().sessions == 1  # quarantined: its process, this one, is alive


async def test_many_requests_of_one_number() -> None:
    async with owner_and_peer() as (owner, peer):
        ref = await owner.put(filled(KIB, 3))
        for _ in range(10):
            ask(peer, ref, 5)
        await peer.hung_up()
        await until(lambda: in_progress(owner) == 0)
        await owner.get(ref)
        await serves(owner)


@pytest.mark.parametrize("what", ["bytes", "room"])
async def test_a_session_that_goes_leaves_no_relay_behind(what: str) -> None:
    """It hangs up; when it is known to be gone, what was begun for it ends."""
    async with owner_and_peer(relay_ttl=30.0) as (owner, peer):
        if what == "bytes":
            ref = await late(owner)
        else:
            ref = await owner.put(filled(MIB, 3))
            ask(peer, ref)
            await peer.message()
        ask(peer, ref, 2)
        await until(lambda: in_progress(owner) == 1)
        if what == "room":
            await until(lambda: len(store(owner).queue) == 1)
        (session,) = owner._opened().main.server.sessions.values()
        owner._opened().main.server._on_death(session)  # as its pidfd would say
        await until(lambda: not session.copies)
        assert owner.statistics().sessions == 0
        assert not has_host_pool(owner) or not store(owner).queue
        await peer.hung_up()
        owner._opened().pool.words.published[ref.slot] = ref.generation
        await owner.get(ref)
        await until(lambda: owner.statistics().used_bytes == 0)


async def test_relays_before_the_hello() -> None:
    async with featcache.create(settings=small()) as owner:
        ref = await owner.put(filled(KIB))
        with Peer.connect(owner.endpoint) as peer:
            ask(peer, ref)
            assert (await peer.message())["type"] == "refused"
            await peer.hung_up()
        await owner.get(ref)
        await serves(owner)
