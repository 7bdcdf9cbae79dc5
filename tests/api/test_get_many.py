"""`get_many` and `contains_many`: many members for little more than one, all of them or none."""

import asyncio
import itertools
from typing import Any

import pytest
import torch

import featcache
from featcache import (
    FeatcacheError,
    FeatureRef,
    FeatureTooLarge,
    GetTimeout,
    KeyNotFound,
    KeyTimeout,
    PoolFull,
    SettingsError,
    StaleRef,
    UnknownPool,
)
from featcache.control.channel import Channel
from featcache.memory.key_table import UNKNOWN
from featcache.session.arguments import MAX_MEMBERS
from featcache.session.hits import KeyHits
from featcache.session.offload import Offload
from support.caches import KIB, filled, pair, small, spent, tensor, until
from support.hosted import all_spent, relayed
from support.keyed import grants, nothing_lost, page_of, pool_of
from support.slabs import Place, copy_of, same, same_dict

BASE = torch.arange(720, dtype=torch.float32)


@pytest.fixture(params=["owner", "client"])
def who(request: pytest.FixtureRequest) -> int:
    """Who reads: an index into (owner, client)."""
    return ["owner", "client"].index(request.param)


def values(features: list[Any]) -> list[int]:
    """The first byte of each."""
    return [int(tensor(feature)[0]) for feature in features]


def sent(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The frames that are sent from now on."""
    frames: list[object] = []
    for name in ("send", "send_next"):
        send = getattr(Channel, name)

        def counted(self: Channel, payload: bytes, *fds: Any, send: Any = send) -> None:
            frames.append(payload)
            send(self, payload, *fds)

        monkeypatch.setattr(Channel, name, counted)
    return frames


async def test_refs_and_keys_are_read_in_their_order(place: Place) -> None:
    async with place.open() as (owner, reader):
        device = place.slab.device
        pictures = {"x": BASE.to(device), "y": BASE.to(device)[:3]}
        refs = [copy_of(await owner.put((BASE + n).to(device))) for n in range(4)]
        await owner.put(pictures, key="d")
        await owner.put((BASE * 2).to(device), key="k")
        members: list[FeatureRef | str | bytes] = [
            refs[0],
            "k",
            refs[1],
            b"d",
            refs[2],
            "k",
            refs[3],
        ]
        found = await reader.get_many(members)
        for index, expected in {
            0: BASE,
            1: BASE * 2,
            2: BASE + 1,
            5: BASE * 2,
            6: BASE + 3,
        }.items():
            assert same(found[index], expected)
            assert tensor(found[index]).device == place.device
        assert same_dict(found[3], {"x": BASE, "y": BASE[:3]})
        await nothing_lost(owner)


async def test_nothing_is_asked_for_of_nothing(who: int) -> None:
    async with pair() as both:
        assert await both[who].get_many([]) == []
        assert await both[who].contains_many([]) == []


async def test_many_refs_are_read_without_a_message_and_many_keys_by_one(monkeypatch: Any) -> None:
    async with pair(slots=128) as (owner, client):
        refs = [await owner.put(filled(KIB, n)) for n in range(16)]
        for n in range(16):
            await owner.put(filled(KIB, n), key=f"{n}")
        await client.get(refs[0])
        asked = sent(monkeypatch)
        assert values(await client.get_many(refs[1:])) == list(range(1, 16))
        assert asked == []
        assert values(await client.get_many([f"{n}" for n in range(16)])) == list(range(16))
        assert (await client.contains_many(["0", "x"]), asked) == ([True, False], [])
        monkeypatch.setattr(KeyHits, "find", lambda *_: UNKNOWN)  # as where the table has no room
        monkeypatch.setattr(KeyHits, "contains", lambda *_: None)
        assert values(await client.get_many([f"{n}" for n in range(16)])) == list(range(16))
        assert len(asked) == 2, "a question and its answer"
        flags = await client.contains_many([f"{n}" for n in range(17)])
        assert flags == [True] * 16 + [False]
        assert len(asked) == 4
        await nothing_lost(owner)


async def test_a_failed_member_says_which_and_nothing_is_paid(who: int) -> None:
    async with pair() as both:
        owner, reader = both[0], both[who]
        refs = [await owner.put(filled(KIB, n)) for n in range(3)]
        gone = await owner.put(filled(KIB))
        await owner.discard(gone)
        await owner.put(filled(KIB, 7), key="there")
        before = owner.statistics().reads_paid
        cases: list[tuple[list[Any], type[FeatcacheError], int, str]] = [
            ([refs[0], gone, refs[1]], StaleRef, 1, f"member 2 of 3, ref {gone.slot}:"),
            ([refs[0], "there", "abc", refs[1]], KeyNotFound, 2, "member 3 of 4, key 'abc': "),
            ([refs[0], "there", 3.5], SettingsError, 2, "member 3 of 3, float: "),
            ([refs[0], ""], SettingsError, 1, "member 2 of 2"),
        ]
        for members, kind, index, text in cases:
            with pytest.raises(kind, match=text) as caught:
                await reader.get_many(members)
            assert caught.value.member == index
            assert type(caught.value) is kind
        await until(lambda: not grants(owner) and owner.statistics().keys == 1)
        assert owner.statistics().reads_paid - before <= 2, "the leases of a key alone"
        assert values(await reader.get_many(refs)) == [0, 1, 2]
        await nothing_lost(owner)


async def test_what_was_paid_is_stale_and_a_ref_may_stand_twice(who: int) -> None:
    async with pair() as both:
        owner, reader = both[0], both[who]
        ref, other = await owner.put(filled(KIB, 1), readers=2), await owner.put(filled(KIB, 2))
        found = await reader.get_many([ref, other, copy_of(ref)])
        assert values(found) == [1, 2, 1]
        assert tensor(found[0]).data_ptr() != tensor(found[2]).data_ptr()
        with pytest.raises(StaleRef) as caught:
            await reader.get_many([ref])
        assert caught.value.member == 0
        await until(lambda: owner.statistics().slots_used == 1)
        await both[1 - who].release(ref)
        await spent(owner)


async def test_a_key_that_comes_in_time_and_one_that_does_not(who: int) -> None:
    async with pair() as both:
        owner, reader = both[0], both[who]
        await owner.put(filled(KIB, 1), key="there")
        task = asyncio.create_task(reader.get_many(["there", "late", "late"], timeout=10.0))
        await until(lambda: pool_of(owner).store.key_waiters.count == 1)
        await owner.put(filled(KIB, 2), key="late")
        assert values(await task) == [1, 2, 2]
        for timeout in (0, 0.01):
            with pytest.raises(KeyTimeout, match="member 2 of 2, key 'never'") as caught:
                await reader.get_many(["there", "never"], timeout=timeout)
            assert caught.value.member == 1
        await nothing_lost(owner)


async def test_bytes_that_do_not_come_in_time_leave_all_owed(who: int) -> None:
    async with pair() as both:
        owner, reader = both[0], both[who]
        refs = [await owner.put(filled(KIB, n)) for n in range(3)]
        published = pool_of(owner).words.published
        published[refs[1].slot] = 0  # as before a stream's word
        with pytest.raises(GetTimeout, match="member 2 of 3") as caught:
            await reader.get_many(refs, timeout=0.01)
        assert caught.value.member == 1
        task = asyncio.create_task(reader.get_many(refs))
        await until(lambda: 1 + who - 1 in pool_of(owner).pages)
        await until(lambda: page_of(owner, who).holds(refs[2].slot, refs[2].generation))
        published[refs[1].slot] = refs[1].generation
        assert values(await task) == [0, 1, 2]
        await spent(owner)


async def test_a_ref_of_no_pool_that_can_be_reached(who: int) -> None:
    async with pair() as both, featcache.create(settings=small()) as other:
        mine = await both[0].put(filled(KIB, 1))
        theirs = await other.put(filled(KIB, 2))
        with pytest.raises(UnknownPool, match="member 2 of 2") as caught:
            await both[who].get_many([mine, theirs])
        assert caught.value.member == 1
        await both[who].release(mine)
        await spent(both[0])


async def test_an_unbound_client_reads_from_several_pools() -> None:
    async with (
        featcache.create(settings=small()) as one,
        featcache.create(settings=small()) as two,
        featcache.connect(settings=small()) as client,
    ):
        owners = list(itertools.islice(itertools.cycle((one, two)), 6))
        refs = [await owner.put(filled(KIB, n)) for n, owner in enumerate(owners)]
        assert values(await client.get_many(refs)) == list(range(6))
        await spent(one)
        await spent(two)


async def test_long_copies_go_to_one_thread(who: int, monkeypatch: Any) -> None:
    async with pair(inline_bytes=KIB) as both:
        refs = [await both[0].put(filled(KIB + n % 2, n)) for n in range(6)]
        runs: list[object] = []
        run = Offload.run

        async def counted(self: Offload, work: Any, on_abandoned: Any = None) -> Any:
            runs.append(work)
            return await run(self, work, on_abandoned)

        monkeypatch.setattr(Offload, "run", counted)
        assert values(await both[who].get_many(refs)) == list(range(6))
        assert len(runs) == 1
        await spent(both[0])


@pytest.mark.parametrize("inline", [0, 1 << 20])
async def test_a_cancelled_call_pays_nothing(who: int, inline: int) -> None:
    async with pair(inline_bytes=inline) as both:
        owner, reader = both[0], both[who]
        await owner.put(filled(KIB, 9), key="k")
        for step in range(14):
            refs = [await owner.put(filled(KIB, n)) for n in range(3)]
            task = asyncio.create_task(reader.get_many([*refs, "k"]))
            for _ in range(step):
                await asyncio.sleep(0)
            if not task.done():
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert values(await reader.get_many(refs)) == [0, 1, 2]
            assert values(await reader.get_many(["k"])) == [9]
        await nothing_lost(owner)


async def test_there_is_a_bound_and_what_is_no_list_is_refused(who: int) -> None:
    async with pair() as both:
        ref = await both[0].put(filled(KIB))
        for members in (ref, "abc", b"abc", {"a": 1}, None, 3):
            with pytest.raises(SettingsError, match="takes a list"):
                await both[who].get_many(members)  # type: ignore[arg-type]
            with pytest.raises(SettingsError, match="takes a list"):
                await both[who].contains_many(members)  # type: ignore[arg-type]
        many = ["k"] * (MAX_MEMBERS + 1)
        with pytest.raises(SettingsError, match=f"up to {MAX_MEMBERS}"):
            await both[who].get_many(many)
        with pytest.raises(SettingsError, match=f"up to {MAX_MEMBERS}"):
            await both[who].contains_many(many)
        with pytest.raises(SettingsError, match="member 2 of 2") as caught:
            await both[who].contains_many(["a", 5])  # type: ignore[list-item]
        assert caught.value.member == 1
        await both[1].release(ref)


@pytest.mark.parametrize("by_message", [False, True])
async def test_as_many_as_there_may_be(who: int, by_message: bool, monkeypatch: Any) -> None:
    if by_message:
        monkeypatch.setattr(KeyHits, "find", lambda *_: UNKNOWN)
        monkeypatch.setattr(KeyHits, "contains", lambda *_: None)
    async with pair(slots=2048, capacity=1 << 22, grants=1024) as both:
        owner, reader = both[0], both[who]
        refs = [await owner.put(filled(1, n % 256)) for n in range(MAX_MEMBERS)]
        expected = [n % 256 for n in range(MAX_MEMBERS)]
        assert values(await reader.get_many(refs)) == expected
        names = [f"{n:04}" * 200 for n in range(MAX_MEMBERS)]  # longer than a message takes
        for n, name in enumerate(names):
            await owner.put(filled(1, n % 256), key=name)
        assert values(await reader.get_many(names)) == expected
        assert all(await reader.contains_many(names))
        await nothing_lost(owner)


async def test_more_reads_by_key_than_may_be_out(who: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(KeyHits, "find", lambda *_: UNKNOWN)  # as where the table has no room
    async with pair(grants=4) as both:
        await both[0].put(filled(KIB, 1), key="k")
        with pytest.raises(PoolFull, match="member 5 of 6, key 'k': ") as caught:
            await both[who].get_many(["k"] * 6)
        assert caught.value.member == 4
        assert values(await both[who].get_many(["k"] * 4)) == [1] * 4
        await nothing_lost(both[0])


async def test_it_counts_as_so_many_gets(who: int) -> None:
    async with pair() as both:
        refs: list[FeatureRef] = [await both[0].put(filled(KIB, n)) for n in range(3)]
        await both[0].put(filled(KIB), key="k")
        await both[who].get_many([*refs, "k", "k"])
        assert both[who].statistics().gets == 5
        now = both[0].statistics()
        assert (now.hits, now.misses) == (2, 0)
        await nothing_lost(both[0])


@pytest.mark.parametrize("told", [True, False], ids=["by the table", "by the owner"])
async def test_a_key_that_is_waited_for_counts_as_one_miss(
    who: int, told: bool, monkeypatch: Any
) -> None:
    if not told:
        monkeypatch.setattr(KeyHits, "find", lambda *_: UNKNOWN)  # as where the table has no room
    async with pair() as both:
        await both[0].put(filled(KIB), key="k")
        with pytest.raises(KeyTimeout):
            await both[who].get_many(["k", "a", "b"], timeout=0.01)
        now = both[0].statistics()
        assert (now.hits, now.misses) == (1, 2)
        wait = asyncio.create_task(both[who].get_many(["k", "c"], timeout=100))
        await until(lambda: both[0].statistics().misses == 3)
        await both[0].put(filled(KIB, 7), key="c")
        assert values(await wait) == [0, 7]
        assert both[0].statistics().misses == 3
        await nothing_lost(both[0])


async def test_what_comes_through_host_memory_is_all_or_nothing() -> None:
    async with relayed() as (owner, client):
        refs = await client.put_many(some_of(3))
        await owner.put(filled(KIB, 9), key="k")
        assert values(await client.get_many([refs[0], "k", refs[1]])) == [0, 9, 1]
        gone = await owner.put(filled(KIB))
        await owner.discard(gone)
        with pytest.raises(StaleRef, match="member 2 of 2"):
            await client.get_many([refs[2], gone])
        assert values(await client.get_many([refs[2]])) == [2]
        with pytest.raises(SettingsError, match="member 2 of 2") as caught:
            await client.put_many([filled(1), 3])  # type: ignore[list-item]
        assert caught.value.member == 1
        with pytest.raises(FeatureTooLarge, match="member 3 of 3"):
            await client.put_many(
                [filled(KIB), filled(KIB), filled(2 << 20)], keys=["a", None, "c"]
            )
        await until(lambda: owner.statistics().slots_used == 1)
        assert await owner.evict("k")
        await all_spent(owner)


def some_of(count: int) -> list[torch.Tensor]:
    return [filled(KIB, n) for n in range(count)]
