"""What owner and client keep of a lookup for the next: never what is no more, and never without bound."""

import pytest
import torch

from featcache import FeatureCache, FeatureClient, FeatureRef, MalformedRef
from featcache.client import keys as remote_keys
from featcache.memory.words import SessionWords
from featcache.owner.requests import RequestHandlers
from featcache.pool.page import SessionPage
from featcache.pool.pending_writes import PendingWrites
from support.caches import pair, tensor
from support.keyed import party, pool_of

pytestmark = pytest.mark.usefixtures("no_leaks", "no_key_table")


def full_of(value: int) -> torch.Tensor:
    return torch.full((300,), value, dtype=torch.uint8)


def known(client: FeatureClient) -> dict[bytes, FeatureRef]:
    directory = client._opened().keys
    assert directory is not None
    return directory._known


def wires(owner: FeatureCache) -> dict[int, tuple[FeatureRef, bytes]]:
    desk = owner._opened().main.server._dispatcher._handlers
    assert isinstance(desk, RequestHandlers)
    return desk._wire_refs


async def got(client: FeatureClient, key: str) -> int:
    """The value that fills a feature."""
    feature = tensor(await client.get(key))
    value = int(feature.flatten()[0])
    assert bool((feature == value).all())
    return value


async def test_a_second_hit_encodes_and_reads_nothing_anew() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(full_of(1), key="a")
        assert await got(client, "a") == 1
        [(at, made)] = wires(owner).items()
        [(data, read)] = known(client).items()
        assert at == ref.slot
        assert (data, read) == (ref.to_bytes(), ref)
        assert await got(client, "a") == 1
        assert wires(owner)[at] is made
        assert known(client)[data] is read


async def test_a_key_that_was_given_to_another_feature_is_that_ones() -> None:
    async with pair() as (owner, client):
        for n in range(20):
            putting: FeatureCache | FeatureClient = owner if n % 2 else client
            await putting.put(full_of(n), key="a")
            assert await got(client, "a") == n
            assert await got(client, "a") == n


async def test_a_slot_that_has_its_next_feature_has_its_next_wire_form() -> None:
    async with pair(slots=1) as (owner, client):
        generations = set()
        for n in range(5):
            ref = await owner.put(full_of(n), key=f"key {n}")  # evicts the one before
            assert await got(client, f"key {n}") == n
            generations.add(ref.generation)
            assert [one for one, _ in wires(owner).values()] == [ref]
        assert len(generations) == 5
        assert len(known(client)) == 5


async def test_sessions_have_the_same_wire_form() -> None:
    async with party(3) as (owner, clients):
        await owner.put(full_of(7), key="a")
        for client in clients:
            assert await got(client, "a") == 7
        assert len(wires(owner)) == 1


async def test_a_client_keeps_so_many_refs_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_keys, "_MAX_KNOWN", 4)
    async with pair() as (owner, client):
        for n in range(10):
            await owner.put(full_of(n), key=f"key {n}")
        for _ in range(2):
            for n in range(10):
                assert await got(client, f"key {n}") == n
                assert 1 <= len(known(client)) <= 4


async def test_a_client_keeps_no_long_refs() -> None:
    async with pair() as (owner, client):
        parts = {f"a part with a long name, number {n}": torch.tensor(n) for n in range(30)}
        await owner.put(parts, key="many")
        for _ in range(2):
            found = await client.get("many")
            assert isinstance(found, dict)
            assert [int(part) for part in found.values()] == list(range(30))
        assert not known(client)


async def test_damaged_bytes_are_not_kept() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(full_of(3), key="a")
        assert await got(client, "a") == 3
        kept, data = wires(owner)[ref.slot]
        wires(owner)[ref.slot] = kept, data[:-1] + bytes([data[-1] ^ 1])
        for _ in range(2):
            with pytest.raises(MalformedRef, match="damaged"):
                await client.get("a")
        assert list(known(client)) == [data]
        wires(owner)[ref.slot] = kept, data
        assert await got(client, "a") == 3


async def test_a_known_ref_of_another_place_is_refused_all_the_same() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(full_of(3), key="a")
        other = await owner.put(full_of(4), key="b")
        assert await got(client, "a") == 3
        pool_of(owner).words.offset[ref.slot] = other.offset_bytes
        with pytest.raises(MalformedRef, match="not its slot's"):
            await client.get("a")
        pool_of(owner).words.offset[ref.slot] = ref.offset_bytes
        assert await got(client, "a") == 3


# --- a page's news, and what has landed -----------------------------------------------------------


def page_with(slots: int) -> tuple[SessionPage, SessionWords]:
    words, fd = SessionWords.create(slots)
    return SessionPage(1, None, words, fd), words


def test_news_are_what_changed_since_the_last_look_however_far_it_went() -> None:
    page, words = page_with(100)
    try:
        assert page.newly_released(0) == []
        assert page.newly_released(10) == []
        words.released[3] = 7
        words.released[9] = 1
        words.released[50] = 2
        assert page.newly_released(10) == [(3, 7), (9, 1)]
        assert page.newly_released(10) == []
        assert page.newly_released(49) == []
        assert page.newly_released(51) == [(50, 2)]
        assert page.newly_released(51) == []
        words.released[3] = 8
        assert page.newly_released(100) == [(3, 8)]
        words.released[3] = 7  # a peer's words are its own
        assert page.newly_released(100) == [(3, 7)]
        assert page.newly_released(100) == []
    finally:
        page.close()


async def test_what_has_landed_is_vouched_for_at_once() -> None:
    async with pair() as (owner, _):
        pool = pool_of(owner)
        slot = pool.store.table.slots[5]
        slot.generation = 9
        page, words = page_with(64)
        changes: list[bool] = []
        pending_writes = PendingWrites(
            pool.words.published,
            pool.words.reserved,
            lambda: changes.append(bool(pending_writes.in_flight)),
        )
        try:
            words.written[5] = 8
            pending_writes.add(slot, page)  # not this one yet
            assert changes == [True]
            assert pool.words.published[5] != 9
            words.written[5] = 9
            pending_writes.poll()
            assert pool.words.published[5] == 9
            assert changes == [True, False]
            slot.generation = 10
            words.written[5] = 10
            pending_writes.add(slot, page)
            assert pool.words.published[5] == 10
            assert not pending_writes.in_flight
            assert changes == [True, False]  # there was nothing to look for
            slot.generation = 11
            pending_writes.add(slot, page)
            slot.generation = words.written[5] = 12
            pending_writes.add(slot, page)  # which ends what was expected of the slot before
            assert pool.words.published[5] == 12
            assert changes == [True, False, True, False]
        finally:
            pending_writes.close()
            page.close()
            slot.generation = 0
