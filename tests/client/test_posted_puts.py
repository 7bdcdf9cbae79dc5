"""Puts that are posted in the session's page: no system call, heard before whatever comes later."""

import asyncio
import gc
import socket
from collections.abc import Callable
from typing import Any

import pytest

import featcache
import featcache.blocking
from client.test_rooms_ahead import far_end, practised, rooms, server_of, writer_of
from featcache import FeatureCache, FeatureClient, FeatureRef, StaleRef
from featcache.control.channel import Channel
from featcache.control.messages import Discard, Goodbye, encode
from featcache.control.rooms import PublishUnkeyed
from featcache.memory import post_ring
from featcache.memory.words import POST_BYTES, POSTS, Posts
from support.caches import KIB, filled, pair, small, spent, steps, until
from support.keyed import CAPACITY, ONE, nothing_lost, page_of, party, pool_of, reserved
from support.slabs import same

PATIENT: dict[str, Any] = {"recycle_interval": 60.0}
"""A pool whose owner looks for nothing by itself."""


class Calls:
    """Counts what one session's socket and doorbell are called for."""

    def __init__(self, client: FeatureClient, patch: pytest.MonkeyPatch) -> None:
        writer = writer_of(client)
        channel, posts = writer.connection.link._channel, writer._posts
        self.sent = self.rung = 0
        bell, send = posts._bell, Channel.send

        def ring() -> None:
            self.rung += 1
            bell()

        def sends(this: Channel, *arguments: Any) -> None:
            self.sent += this is channel
            send(this, *arguments)

        patch.setattr(posts, "_bell", ring)
        patch.setattr(Channel, "send", sends)


def unheard(owner: FeatureCache, session: int = 1) -> bool:
    return bool(page_of(owner, session).posts)


# --- calls ------------------------------------------------------------------------------------------


async def test_a_put_makes_no_call_and_those_of_a_turn_ring_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair() as (owner, client):
        await practised(owner, client)
        calls = Calls(client, monkeypatch)
        refs = [await client.put(filled(KIB, number)) for number in range(3)]
        assert (calls.sent, calls.rung) == (0, 0)
        assert unheard(owner)
        await steps(3)
        assert (calls.sent, calls.rung) == (0, 1)
        for number, ref in enumerate(refs):
            assert same(await owner.get(ref), filled(KIB, number))
        await nothing_lost(owner)


async def test_a_put_before_the_loop_waits_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(**PATIENT) as (owner, client):
        await practised(owner, client)
        calls = Calls(client, monkeypatch)
        for number in range(1, 4):
            ref = await client.put(filled(KIB))
            await until(lambda: not reserved(owner) and not unheard(owner))
            assert (calls.sent, calls.rung) == (0, number)
            await owner.release(ref)
            await spent(owner)


async def test_a_row_without_a_turn_rings_when_half_of_its_rooms_are_used() -> None:
    """So that new rooms can come while the others are used: the loop is not asked for anything."""
    async with pair(rooms_ahead=8) as (owner, client):
        await practised(owner, client)
        await until(lambda: rooms(owner) == 8)
        puts, rung = 0, list[int]()
        posts = writer_of(client)._posts
        bell = posts._bell

        def ring() -> None:
            rung.append(puts)
            bell()

        posts._bell = ring
        while puts < 7:
            puts += 1
            await client.put(filled(KIB))
        assert rung == [4]
        await steps(3)
        assert rung == [4, 7]


async def test_what_a_frame_made_heard_rings_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(**PATIENT) as (owner, client):
        await practised(owner, client)
        calls = Calls(client, monkeypatch)
        ref = await client.put(filled(KIB))
        writer_of(client).connection.link.discard_soon(ref.slot, ref.generation)
        far_end(owner).read_rest(0)
        assert not unheard(owner)
        await steps(3)
        assert (calls.sent, calls.rung) == (1, 0)
        await spent(owner)


async def test_what_finds_no_place_in_the_ring_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_ring, "POSTS", 2)
    async with pair(**PATIENT) as (owner, client):
        await practised(owner, client)
        calls = Calls(client, monkeypatch)
        refs = [await client.put(filled(KIB, number)) for number in range(3)]
        assert calls.sent == 1
        far_end(owner).read_rest(0)
        assert not reserved(owner)
        for number, ref in enumerate(refs):
            assert same(await owner.get(ref), filled(KIB, number))
        before = calls.sent
        refs = [await client.put(filled(KIB, number)) for number in range(2)]
        assert calls.sent == before, "the ring is empty again"
        for number, ref in enumerate(refs):
            assert same(await owner.get(ref), filled(KIB, number))
        await nothing_lost(owner)


async def test_what_is_too_long_for_the_ring_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(**PATIENT) as (owner, client):
        await practised(owner, client)
        calls = Calls(client, monkeypatch)
        first = await client.put(filled(KIB, 1))
        names = [f"a reader with a rather long name, number {number}" for number in range(8)]
        second = await client.put(filled(KIB, 2), readers=names, ttl=None)
        assert (calls.sent, reserved(owner)) == (1, 0)
        far_end(owner).read_rest(0)
        assert pool_of(owner).words.live[first.slot] == first.generation
        assert pool_of(owner).words.live[second.slot] == second.generation


# --- heard in time --------------------------------------------------------------------------------


def hold(client: FeatureClient) -> None:
    """Have its loop not turn, as far as its posts know."""
    posts: Any = writer_of(client)._posts
    posts._call_soon = lambda _: None


async def held(owner: FeatureCache, client: FeatureClient, **terms: Any) -> FeatureRef:
    """A put of a client whose loop does not turn after it; its owner looks for nothing by itself."""
    await practised(owner, client)
    hold(client)
    ref = await client.put(filled(KIB, 7), **terms)
    assert unheard(owner)
    return ref


Use = Callable[[FeatureCache, FeatureClient, FeatureClient, FeatureRef], Any]
USES: dict[str, Use] = {
    "the owner's get": lambda owner, _, other, ref: owner.get(ref),
    "the owner's release": lambda owner, _, other, ref: owner.release(ref),
    "the owner's discard": lambda owner, _, other, ref: owner.discard(ref),
    "its own discard": lambda _, client, other, ref: client.discard(ref),
    "its own keyed put": lambda _, client, other, ref: client.put(filled(KIB), key="k"),
    "its own question": lambda _, client, other, ref: client.evict("k"),
    "another's get": lambda owner, _, other, ref: other.get(ref),
    "another's discard": lambda owner, _, other, ref: other.discard(ref),
}


@pytest.mark.parametrize("use", USES)
async def test_it_is_heard_by_whatever_needs_it(use: str) -> None:
    async with party(2, **PATIENT) as (owner, (client, other)):
        ref = await held(owner, client, readers=2)
        await asyncio.wait_for(USES[use](owner, client, other, ref), 20)
        assert not unheard(owner)


async def test_statistics_count_it() -> None:
    async with pair(**PATIENT) as (owner, client):
        await held(owner, client)
        assert owner.statistics().puts == 3


async def test_a_put_that_may_not_wait_finds_the_room_of_what_was_paid() -> None:
    async with pair(**PATIENT, **ONE) as (owner, client):
        await practised(owner, client)
        hold(client)
        ref = await client.put(filled(KIB), readers=1)
        await client.release(ref)
        assert unheard(owner)
        await owner.release(owner.put_nowait(filled(CAPACITY)))


async def test_the_timer_hears_it() -> None:
    """The loop of who put it is held, and nobody else comes by."""
    async with pair() as (owner, client):
        ref = await held(owner, client)
        await until(lambda: not unheard(owner))
        assert pool_of(owner).words.live[ref.slot] == ref.generation


async def test_many_sessions_are_heard_in_several_turns() -> None:
    async with party(6, **PATIENT, slots=512) as (owner, clients):
        for client in clients:
            await practised(owner, client)
        refs = [
            (number, await client.put(filled(KIB, number))) for number, client in enumerate(clients)
        ]
        for number, ref in refs:
            assert same(await owner.get(ref), filled(KIB, number))
        await until(lambda: not any(unheard(owner, number) for number in range(1, 7)))
        await nothing_lost(owner)


# --- the end of a session -----------------------------------------------------------------------------


async def test_a_goodbye_comes_behind_it() -> None:
    async with featcache.create(settings=small(**PATIENT)) as owner:
        async with featcache.connect(owner.endpoint, settings=small()) as client:
            ref = await held(owner, client)
        await until(lambda: owner.statistics().sessions == 0)
        assert same(await owner.get(ref), filled(KIB, 7))


async def test_a_socket_that_closes_loses_nothing_that_was_posted() -> None:
    async with pair(**PATIENT) as (owner, client):
        ref = await held(owner, client)
        writer_of(client).connection.link._channel._sock.shutdown(socket.SHUT_RDWR)
        await until(lambda: not unheard(owner))
        assert same(await owner.get(ref), filled(KIB, 7))


# That of the socket, which nobody closed: it is what is tested.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_was_closed_under_it_loses_nothing(no_leaks: None) -> None:
    async def puts(endpoint: str) -> FeatureRef:
        client = await featcache.connect(endpoint, settings=small()).open()
        for _ in range(2):
            await client.discard(await client.put(filled(KIB)))
        await until(lambda: bool(writer_of(client)._rooms._rooms))
        hold(client)
        return await client.put(filled(KIB, 7))

    with featcache.blocking.create(settings=small(**PATIENT)) as owner:
        ref = asyncio.run(puts(owner.endpoint))
        gc.collect()
        assert same(owner.get(ref, timeout=20), filled(KIB, 7))


# --- a peer's content ---------------------------------------------------------------------------------


def scribbled(client: FeatureClient, how: str) -> None:
    """Post what no session of this version posts."""
    attachment = writer_of(client).connection.attachment
    posts = attachment.posts
    if how == "a count that is too high":
        posts._header[Posts.POSTED] = posts.count + POSTS + 1
    elif how == "a count that falls":
        posts._header[Posts.POSTED] = 0
    elif how == "a huge count":
        posts._header[Posts.POSTED] = (1 << 64) - 1
    elif how == "a length beyond its entry":
        at = posts.count % POSTS * POST_BYTES
        posts._entries[at : at + 8] = (POST_BYTES - 7).to_bytes(8, "little")
        posts._header[Posts.POSTED] = posts.count + 1
    else:
        message = {
            "no message": b"\xc1" * 20,
            "nothing": b"",
            "a goodbye": encode(Goodbye()),
            "a request": encode(Discard(1, 0, 1)),
            "a truncated note": encode(PublishUnkeyed(1, 1, (), None))[:-2],
        }[how]
        assert posts.post(message)


HOSTILE = [
    *("a count that is too high", "a count that falls", "a huge count"),
    *("a length beyond its entry", "no message", "nothing", "a goodbye", "a request"),
    "a truncated note",
]


@pytest.mark.parametrize("heard", ["by the bell", "by a frame", "by the timer"])
@pytest.mark.parametrize("how", HOSTILE)
async def test_a_malformed_post_ends_the_session(how: str, heard: str) -> None:
    patient = PATIENT if heard != "by the timer" else {}
    async with party(2, **patient) as (owner, (client, other)):
        await practised(owner, client)
        ref = await client.put(filled(KIB, 7))
        await until(lambda: not unheard(owner)) if how == "a count that falls" else None
        scribbled(client, how)
        connection = writer_of(client).connection
        if heard == "by the bell":
            connection.ring()
        elif heard == "by a frame":
            connection.link.unpin_soon(b"k")
        await until(lambda: connection.link.lost is not None)
        assert owner.statistics().sessions == 2  # quarantined: its process lives
        assert server_of(owner).sessions[1].posts is None
        if "count" not in how and how != "a length beyond its entry":
            assert same(await owner.get(ref), filled(KIB, 7))  # it was posted before
        assert same(await owner.get(await other.put(filled(KIB, 1))), filled(KIB, 1))


async def test_a_post_for_a_slot_that_is_not_its_own_is_refused() -> None:
    """As such a frame is: the session goes on."""
    async with party(2) as (owner, (client, other)):
        await practised(owner, client)
        ref = await other.put(filled(KIB, 3))
        for slot, generation in ((ref.slot, ref.generation), (1 << 40, 1), (0, 1 << 62)):
            note = PublishUnkeyed(slot, generation, ref.specs, None)
            writer_of(client)._posts.post(note)
        assert same(await owner.get(ref), filled(KIB, 3))
        assert same(await owner.get(await client.put(filled(KIB, 4))), filled(KIB, 4))
        with pytest.raises(StaleRef):
            await owner.get(ref)
        await nothing_lost(owner)
