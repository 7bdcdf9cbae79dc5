"""Forged requests for many members, and for shares: refused, or answered as far as they go."""

from typing import Any

import pytest

from control.test_hostile_requests import ask, refused, say, serves, session
from featcache.control import many, messages
from featcache.ref import TensorSpec
from support.caches import KIB, filled, pair, spent, until
from support.keyed import CAPACITY, ONE, grants, nothing_lost, queued, reserved

BYTES = (TensorSpec(None, "uint8", (KIB,), 0),)


def batch(number: int, count: int = 3, nbytes: int = KIB, **changes: Any) -> many.ReserveMany:
    fields: dict[str, Any] = {"counts": [1] * count, "names": [], "ttl_s": None, "waits": False}
    return many.ReserveMany(number, [nbytes] * count, **(fields | changes))


async def test_a_batch_that_can_not_be_is_refused_whole() -> None:
    async with pair() as (owner, client), session(owner) as peer:
        await refused(peer, batch(1, counts=[1, 1]), "SettingsError")
        await refused(peer, batch(2, counts=[1, 1, 1 << 40]), "SettingsError")
        await refused(peer, batch(3, names=["a", "a"]), "SettingsError")
        await refused(peer, batch(4, nbytes=1 << 40), "FeatureTooLarge")
        await refused(peer, batch(5, nbytes=600 * KIB), "FeatureTooLarge")
        await refused(peer, batch(6, count=65), "FeatureTooLarge")
        assert (reserved(owner), owner.statistics().slots_used) == (0, 0)
        await serves(owner, client)


async def test_what_is_not_the_sessions_to_publish_is_not_published() -> None:
    async with pair() as (owner, client), session(owner) as peer:
        answer = await ask(peer, batch(1, counts=[0, 1, 1]))
        assert answer["type"] == "reserved_many"
        (first, second, third) = [(slot, generation) for slot, generation, _ in answer["slots"]]
        wrong = TensorSpec(None, "uint8", (KIB + 1,), 0)
        cases: list[tuple[list[Any], str]] = [
            ([(*first, BYTES, b"a"), (63, 1, BYTES, None)], "StaleRef"),
            ([(*first, BYTES, b"a"), (second[0], second[1] + 1, BYTES, None)], "StaleRef"),
            ([(*first, BYTES, b"a"), (*first, BYTES, b"b")], "StaleRef"),
            ([(*first, BYTES, b"a"), (*second, (wrong,), None)], "MalformedRef"),
        ]
        for number, (members, error) in enumerate(cases, 2):
            await refused(peer, many.PublishMany(number, members), error)
        assert (reserved(owner), owner.statistics().keys, owner.statistics().puts) == (3, 0, 0)
        members = [(*first, BYTES, b"a"), (*second, BYTES, None)]
        assert (await ask(peer, many.PublishMany(9, members)))["error"] is None
        assert reserved(owner) == 1
        await refused(peer, many.PublishMany(10, [(*third, BYTES, None), members[1]]), "StaleRef")
        await serves(owner, client)


async def test_a_session_that_goes_gives_its_batches_back() -> None:
    async with pair(**ONE) as (owner, client):
        async with session(owner) as peer:
            assert (await ask(peer, batch(1, nbytes=CAPACITY // 4)))["type"] == "reserved_many"
            say(peer, batch(2, nbytes=CAPACITY // 4, waits=True))
            await queued(owner, 1)
        await spent(owner)
        await serves(owner, client)
        await nothing_lost(owner)


async def test_an_answer_has_as_many_members_as_it_may_be_long() -> None:
    async with pair() as (owner, client), session(owner) as peer:
        for n in range(4):
            await client.put(filled(KIB), key=f"{n}")
        keys = [b"0", b"x", b"1", b"2", b"3"]
        for answer_bytes, found in ((0, 2), (400, 4), (1 << 20, 5)):
            answer = await ask(peer, many.FindMany(1, keys, answer_bytes))
            assert answer["type"] == "granted_many"
            assert 1 <= len(answer["found"]) <= found
            assert [one is None for one in answer["found"]][1:2] in ([], [True])
            granted = sum(one is not None for one in answer["found"])
            page = owner._opened().pool.pages[2]
            assert len(page.grants) == granted
            for grant in list(page.grants.values()):
                page.words.granted[grant.index] = grant.serial
            owner._opened().pool.collect()
            assert grants(owner) == 0
        answer = await ask(peer, many.ContainsMany(2, keys))
        assert answer["flags"] == [True, False, True, True, True]
        for n in range(4):
            await client.evict(f"{n}")


async def test_a_share_that_can_not_be_is_refused() -> None:
    async with pair(readers=4) as (owner, client), session(owner) as peer:
        await client.put(filled(KIB), key="a")
        await refused(peer, messages.Share(1, b"b", 1, None), "KeyNotFound")
        await refused(peer, messages.Share(2, b"a", 5, None), "SettingsError")
        await refused(peer, messages.Share(3, b"a", ["x", "x"], None), "SettingsError")
        answer = await ask(peer, messages.Share(4, b"a", 2, None))
        assert answer["ref"]
        assert owner.statistics().slots_used == 2
        await client.evict("a")


@pytest.mark.parametrize("waits", [True, False])
async def test_a_share_of_a_session_that_goes_is_no_less_owed(waits: bool) -> None:
    """Its ref may have been sent on; only the ask of one that still waits is taken back."""
    async with pair() as (owner, client):
        await client.put(filled(KIB), key="a")
        async with session(owner) as peer:
            if waits:
                say(peer, messages.Share(1, b"late", 1, None, waits=True))
                await until(lambda: owner._opened().pool.store.key_waiters.count == 1)
            else:
                assert (await ask(peer, messages.Share(1, b"a", 1, 0.05)))["ref"]
        assert owner._opened().pool.store.key_waiters.count == 0
        await until(lambda: owner.statistics().slots_used == 1)
        await nothing_lost(owner)
