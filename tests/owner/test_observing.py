"""What an observer is shown of a pool, and that looking on changes nothing."""

import asyncio
from typing import Any

import pytest

import featcache
from featcache import (
    AttachRefused,
    CacheClosed,
    FeatureCache,
    GetTimeout,
    KeyView,
    OwnerLost,
    OwnerUnreachable,
    SettingsError,
)
from featcache.control.observing import MAX_CELLS, MAX_KEYS
from support.caches import KIB, MIB, filled, full, pair, small, spent, until

pytestmark = pytest.mark.usefixtures("no_leaks")


async def all_keys(observer: featcache.Observer, order: Any, limit: int) -> list[KeyView]:
    found: list[KeyView] = []
    after = None
    while True:
        page = await observer.keys(order, after=after, limit=limit)
        found += page.keys
        after = page.next
        if after is None:
            return found


def observers_of(owner: FeatureCache) -> int:
    assert owner._life.engine is not None
    return len(owner._life.engine.main.server.observers.peers)


async def test_a_snapshot_has_the_figures_of_the_owner() -> None:
    async with pair(name="r1") as (owner, _), featcache.observe(owner.endpoint) as observer:
        await owner.put(filled(4 * KIB), readers=["r1"])
        await owner.put(filled(8 * KIB), key="k")
        seen = await observer.snapshot()
        assert seen.statistics == owner.statistics()
        assert seen.endpoint == owner.endpoint
        assert (seen.kind, seen.device, seen.level) == ("host", "cpu", "normal")
        assert seen.version == featcache.__version__
        assert seen.uptime_s > 0
        assert seen.observers == 1


async def test_an_observer_is_no_session() -> None:
    async with pair() as (owner, _), featcache.observe(owner.endpoint) as observer:
        assert owner.statistics().sessions == 1
        assert len((await observer.snapshot()).sessions) == 1


async def test_sessions_show_what_they_read_owe_and_hold() -> None:
    async with pair(name="r1") as (owner, client), featcache.observe(owner.endpoint) as observer:
        owed = await owner.put(filled(4 * KIB), readers=["r1", "r2"])
        await owner.put(filled(8 * KIB), key="k")
        await client.pin("k")
        async with client.borrow("k"), client.borrow(await owner.put(filled(1000))):
            (seen,) = (await observer.snapshot()).sessions
        assert seen.name == "r1"
        assert (seen.reading, seen.reading_bytes) == (2, 8 * KIB + 1000)
        assert (seen.owes, seen.owes_bytes) == (1, 4 * KIB)
        assert (seen.pins, seen.pinned_bytes) == (1, 8 * KIB)
        assert seen.state == "active"
        await client.get(owed)
        after = (await observer.snapshot()).sessions[0]
        assert (after.reading, after.owes) == (0, 0)


async def test_the_owner_is_the_first_of_the_sessions_once_it_reads() -> None:
    async with (
        featcache.create(settings=small()) as owner,
        featcache.observe(owner.endpoint) as observer,
    ):
        await owner.put(filled(KIB), key="k")
        async with owner.borrow("k"):
            (own,) = (await observer.snapshot()).sessions
        assert (own.session, own.reading) == (0, 1)


async def test_unpaid_refs_name_their_debtors_the_oldest_first() -> None:
    async with pair(name="r1") as (owner, _), featcache.observe(owner.endpoint) as observer:
        first = await owner.put(filled(KIB), readers=["r1", "r2"], ttl=60)
        await owner.put(filled(KIB), readers=3, ttl=None)
        seen = await observer.snapshot()
        named, anonymous = seen.unpaid
        assert seen.unpaid_refs == 2
        assert named.ref == f"{first.slot}:{first.generation}"
        assert (named.reads_left, named.ttl_s) == (2, 60)
        assert [who.partition(" (")[0] for who in named.owed_by] == ["r1", "r2"]
        assert named.owed_by[1].endswith("(never attached)")
        assert (anonymous.reads_left, anonymous.owed_by, anonymous.ttl_s) == (3, (), None)
        assert any("r2 (never attached)" in sentence for sentence in seen.holders)


async def test_a_waiting_put_is_shown_with_its_session() -> None:
    async with pair(name="w") as (owner, client), featcache.observe(owner.endpoint) as observer:
        ref = await full(owner)
        put = asyncio.ensure_future(client.put(filled(2 * KIB)))
        await until(lambda: owner.statistics().waiters == 1)
        seen = await observer.snapshot()
        (waiting,) = seen.waiting
        assert (waiting.nbytes, waiting.name) == (2 * KIB, "w")
        assert waiting.age_s > 0
        assert seen.level == "exhausted"
        await owner.discard(ref)
        await client.release(await put)


@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_keys_come_in_pages_each_once(limit: int) -> None:
    async with pair() as (owner, client), featcache.observe(owner.endpoint) as observer:
        for index in range(10):
            await owner.put(filled(256 * (index + 1)), key=f"k{index}")
        for index in range(10):
            for _ in range(index):
                await client.get(f"k{index}")
                await owner.get(f"k{index}")
        by_size = [one.label for one in await all_keys(observer, "size", limit)]
        assert by_size == [f"k{index}" for index in reversed(range(10))]
        by_age = [one.label for one in await all_keys(observer, "age", limit)]
        assert by_age == [f"k{index}" for index in range(10)]


async def test_keys_of_one_size_are_told_apart() -> None:
    async with pair() as (owner, _), featcache.observe(owner.endpoint) as observer:
        for index in range(20):
            await owner.put(filled(KIB), key=bytes([index]))
        found = await all_keys(observer, "size", 7)
        assert sorted(one.key for one in found) == [bytes([index]) for index in range(20)]


async def test_long_keys_make_pages_that_fit_a_message() -> None:
    changes: dict[str, Any] = {"message_bytes": 8 * KIB}
    async with pair(**changes) as (owner, _):
        for index in range(20):
            await owner.put(filled(KIB), key=f"{index:02}" + "x" * 1000)
        async with featcache.observe(owner.endpoint, settings=small(**changes)) as observer:
            page = await observer.keys(limit=20)
            assert 0 < len(page.keys) < 20
            assert len(await all_keys(observer, "age", 20)) == 20


async def test_a_key_shows_its_pins_and_reads() -> None:
    async with pair() as (owner, client), featcache.observe(owner.endpoint) as observer:
        await owner.put(filled(KIB), key="k", readers=2)
        await client.pin("k")
        (seen,) = (await observer.keys()).keys
        assert (seen.pinned, seen.reads, seen.nbytes) == (True, 2, KIB)


async def test_the_map_has_each_state_where_it_lies() -> None:
    async with pair(name="r1") as (owner, client), featcache.observe(owner.endpoint) as observer:
        cell = MIB // 16
        await owner.put(filled(cell), readers=["r1"])
        await owner.put(filled(cell), key="kept")
        await owner.put(filled(cell), key="pinned")
        await owner.put(filled(cell), key="read")
        await client.pin("pinned")
        async with client.borrow("read"):
            drawn = await observer.map(16)
        assert drawn.states[:5] == "okprf"[:4] + drawn.states[4]
        assert set(drawn.states[4:]) <= {"f", "."}
        assert drawn.used[:4] == (1.0,) * 4
        assert drawn.used[4:] == (0.0,) * 12
        assert all(age > 0 for age in drawn.ages_s[:4])
        assert drawn.cell_bytes == cell


async def test_what_a_share_owes_is_owed_where_its_feature_lies() -> None:
    async with pair() as (owner, _), featcache.observe(owner.endpoint) as observer:
        await owner.put(filled(MIB // 2), key="k")
        ref = await owner.share("k", readers=1)
        assert (await observer.map(2)).states[0] == "o"
        await owner.discard(ref)


async def test_a_coarse_map_still_shows_a_small_feature() -> None:
    async with pair() as (owner, _), featcache.observe(owner.endpoint) as observer:
        await owner.put(filled(1), key="k")
        drawn = await observer.map(1)
        assert drawn.states == "k"
        assert 0 < drawn.used[0] < 0.01


async def test_a_map_is_never_longer_than_a_message() -> None:
    changes: dict[str, Any] = {"message_bytes": 1024}
    async with pair(**changes) as (owner, _), featcache.observe(owner.endpoint) as observer:
        drawn = await observer.map(MAX_CELLS)
        assert 0 < len(drawn.states) < 200


async def test_evict_drops_a_key_once() -> None:
    async with pair() as (owner, _), featcache.observe(owner.endpoint) as observer:
        await owner.put(filled(KIB), key="k")
        assert await observer.evict("k")
        assert not await observer.evict(b"k")
        assert not await owner.contains("k")


async def test_looking_on_keeps_nothing_and_pays_nothing() -> None:
    async with pair() as (owner, client), featcache.observe(owner.endpoint) as observer:
        ref = await owner.put(filled(KIB), readers=1)
        await owner.put(filled(KIB), key="k")
        before = owner.statistics()
        for _ in range(3):
            await observer.snapshot()
            await observer.keys("hits")
            await observer.map()
        assert owner.statistics() == before
        await client.get(ref)
        await owner.evict("k")
        await spent(owner)


async def test_the_spill_pool_can_be_observed_too() -> None:
    async with featcache.create(settings=small(), spill=MIB) as owner:
        assert owner._life.engine is not None
        spill = owner._life.engine.spill
        assert spill is not None
        await full(owner)
        await owner.put(filled(KIB), on_full="spill", ttl=None)
        async with featcache.observe(spill.pool.endpoint) as observer:
            seen = await observer.snapshot()
            assert (seen.statistics.puts, seen.unpaid_refs) == (1, 1)


# --- in pieces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "least"),
    [
        (lambda observer: observer.snapshot(), 600 // 256),
        (lambda observer: observer.keys(limit=200), 600 // 256 + 200 // 16),
        (lambda observer: observer.map(64), 600 // 256),
    ],
)
async def test_an_answer_is_made_in_pieces(
    monkeypatch: pytest.MonkeyPatch, ask: Any, least: int
) -> None:
    async with pair(name="r1", slots=1024) as (owner, _):
        for number in range(600):
            await owner.put(filled(256), key=f"{number}", readers=["r1"])
        assert owner._life.engine is not None
        table = owner._life.engine.main.server.observers
        steps, real = [0], table._step

        def counted(*args: Any) -> Any:
            steps[0] += 1
            return real(*args)

        monkeypatch.setattr(table, "_step", counted)
        async with featcache.observe(owner.endpoint) as observer:
            await ask(observer)
        assert steps[0] > least


async def test_the_pool_may_change_between_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is followed by a put and an eviction, and sessions come and go."""
    async with pair(slots=1024, observers=1) as (owner, client):
        for number in range(600):
            await owner.put(filled(256), key=f"{number}")
        assert owner._life.engine is not None
        table = owner._life.engine.main.server.observers
        real, store = table._step, owner._life.engine.pool.store
        made = [600]

        def changed(*args: Any) -> Any:
            result = real(*args)
            made[0] += 1
            owner.put_nowait(filled(256 * (made[0] % 7 + 1)), key=f"{made[0]}")
            owner._life.engine.pool.apply(store.evict(f"{made[0] - 600}".encode(), 0.0))  # type: ignore[union-attr]
            return result

        monkeypatch.setattr(table, "_step", changed)
        async with featcache.observe(owner.endpoint) as observer:
            for _ in range(3):
                await observer.snapshot()
                assert len((await observer.map(64)).states) == 64
                found = await all_keys(observer, "size", 50)
                assert len({one.key for one in found}) == len(found)
                async with featcache.connect(owner.endpoint):
                    await observer.snapshot()
        assert await client.contains(f"{made[0]}")


async def test_a_pool_that_closes_between_two_pieces_ends_the_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = featcache.create(settings=small(slots=1024))
    await owner.open()
    for number in range(600):
        await owner.put(filled(256), key=f"{number}")
    assert owner._life.engine is not None
    table = owner._life.engine.main.server.observers
    real, closing = table._step, list[asyncio.Task[None]]()

    def closes(*args: Any) -> Any:
        result = real(*args)
        closing.append(asyncio.get_running_loop().create_task(owner.aclose()))
        return result

    monkeypatch.setattr(table, "_step", closes)
    async with featcache.observe(owner.endpoint) as observer:

        async def looks_on() -> None:
            while True:  # until a look is met by the end
                await observer.map(64)

        with pytest.raises(OwnerLost):
            await looks_on()
        await asyncio.gather(*closing)


# --- bounds, and ends -------------------------------------------------------------------------------


async def test_there_are_so_many_observers_at_most() -> None:
    async with featcache.create(settings=small(observers=2)) as owner:
        async with featcache.observe(owner.endpoint), featcache.observe(owner.endpoint):
            with pytest.raises(AttachRefused, match=r"raise Settings\.observers"):
                await featcache.observe(owner.endpoint).open()
            assert observers_of(owner) == 2
        async with featcache.observe(owner.endpoint):  # whose place is free at once
            assert observers_of(owner) == 1


async def test_observers_take_no_session_s_place() -> None:
    async with pair(sessions=1) as (owner, _), featcache.observe(owner.endpoint):
        assert owner.statistics().sessions == 1


async def test_a_pool_may_have_no_observers() -> None:
    async with featcache.create(settings=small(observers=0)) as owner:
        with pytest.raises(AttachRefused, match="all 0 observers"):
            await featcache.observe(owner.endpoint).open()


async def test_nobody_to_observe_is_told() -> None:
    with pytest.raises(OwnerUnreachable):
        await featcache.observe("/nowhere/x.sock").open()


async def test_an_owner_that_closes_ends_the_observer() -> None:
    owner = featcache.create(settings=small())
    await owner.open()
    async with featcache.observe(owner.endpoint) as observer:
        await observer.snapshot()
        await owner.aclose()
        with pytest.raises(OwnerLost, match="it closed the pool"):
            await observer.snapshot()


async def test_a_closed_observer_says_so() -> None:
    async with featcache.create(settings=small()) as owner:
        observer = featcache.observe(owner.endpoint)
        with pytest.raises(CacheClosed):
            await observer.snapshot()
        async with observer:
            assert observer.is_open
        with pytest.raises(CacheClosed):
            await observer.snapshot()


async def test_a_cancelled_look_leaves_the_next_one_whole() -> None:
    async with pair() as (owner, _), featcache.observe(owner.endpoint) as observer:
        for _ in range(5):
            look = asyncio.ensure_future(observer.snapshot())
            await asyncio.sleep(0)
            look.cancel()
            with pytest.raises(asyncio.CancelledError):
                await look
        assert (await observer.snapshot()).statistics.sessions == 1


async def test_looks_that_come_together_are_answered_one_by_one() -> None:
    async with pair() as (owner, _), featcache.observe(owner.endpoint) as observer:
        await owner.put(filled(KIB), key="k")
        seen, page, drawn = await asyncio.gather(
            observer.snapshot(), observer.keys(), observer.map(4)
        )
        assert (seen.statistics.keys, page.total, len(drawn.states)) == (1, 1, 4)


@pytest.mark.parametrize(
    "ask",
    [
        lambda observer: observer.keys("colour"),
        lambda observer: observer.keys(limit=0),
        lambda observer: observer.keys(limit=MAX_KEYS + 1),
        lambda observer: observer.keys(after="nonsense"),
        lambda observer: observer.keys(after=7),
        lambda observer: observer.map(0),
        lambda observer: observer.map(MAX_CELLS + 1),
        lambda observer: observer.evict(""),
        lambda observer: observer.evict(b"x" * 2000),
    ],
)
async def test_arguments_that_are_none_are_refused(ask: Any) -> None:
    async with pair() as (owner, _), featcache.observe(owner.endpoint) as observer:
        with pytest.raises(SettingsError):
            await ask(observer)
        await observer.snapshot()  # it goes on


async def test_an_owner_that_does_not_answer_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with featcache.create(settings=small()) as owner:
        observer = featcache.observe(owner.endpoint, timeout=0.05)
        async with observer:
            assert owner._life.engine is not None
            observers = owner._life.engine.main.server.observers
            monkeypatch.setattr(observers, "_begin", lambda *_: None)
            with pytest.raises(GetTimeout, match="did not answer"):
                await observer.snapshot()


async def test_a_blocking_observer_sees_the_same() -> None:
    async with pair() as (owner, _):
        await owner.put(filled(KIB), key="k")

        def look() -> tuple[int, int, str, bool]:
            with featcache.blocking.observe(owner.endpoint) as observer:
                seen = observer.snapshot()
                total = observer.keys().total
                return seen.statistics.sessions, total, observer.map(2).states, observer.evict("k")

        sessions, total, states, evicted = await asyncio.to_thread(look)
        assert (sessions, total, evicted) == (1, 1, True)
        assert states[0] == "k"


# --- drain --------------------------------------------------------------------------------------------


async def test_a_drained_cache_takes_no_more_puts_and_ends_waits() -> None:
    async with pair() as (owner, client):
        ref = await full(owner)
        waiting = [
            asyncio.ensure_future(owner.put(filled(KIB))),
            asyncio.ensure_future(client.put(filled(KIB))),
            asyncio.ensure_future(client.get("absent", timeout=60)),
        ]
        await until(lambda: owner.statistics().waiters == 2)
        assert await owner.drain(0)
        with pytest.raises(CacheClosed):
            await waiting[0]
        for each in waiting[1:]:
            with pytest.raises(OwnerLost, match="closing"):
                await each
        with pytest.raises(OwnerLost, match="shutting down"):
            await client.put(filled(KIB))
        with pytest.raises(OwnerLost):
            await client.get("absent", timeout=60)
        await client.get(ref)  # reads go on


async def test_a_drain_takes_back_what_was_given_ahead() -> None:
    async with pair() as (owner, client):
        for _ in range(8):  # from the second on, without asking
            await client.release(await client.put(filled(KIB)))
        await owner.drain(0)
        with pytest.raises(OwnerLost, match="shutting down"):
            await client.put(filled(KIB))


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_drain_waits_for_borrows(key: str | None) -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(KIB), key=key)
        async with client.borrow(key or ref):
            assert not await owner.drain(0)
            draining = asyncio.ensure_future(owner.drain(60))
            await asyncio.sleep(0)
            assert not draining.done()
        assert await draining


async def test_a_drain_s_time_is_checked() -> None:
    async with featcache.create(settings=small()) as owner:
        with pytest.raises(SettingsError):
            await owner.drain(-1)
        await owner.put(filled(KIB))  # it goes on
