"""What the pool says of itself: statistics, pressure, and events through structlog."""

import asyncio
import contextlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import attrs
import pytest
from structlog.testing import capture_logs

import featcache
from featcache import (
    CacheClosed,
    FeatureCache,
    GetTimeout,
    PressureLevel,
    SettingsError,
    Statistics,
    events,
)
from support.caches import KIB, filled, full, pair, small, spent, until
from support.keyed import pool_of

Logs = list[MutableMapping[str, Any]]
CAPACITY = 100 * 4 * KIB
PERCENT = CAPACITY // 100
POOL: dict[str, Any] = {"capacity": CAPACITY, "segment": CAPACITY, "slots": 128}


async def recycled(owner: FeatureCache, count: int) -> None:
    await until(lambda: owner.statistics().recycled >= count)


def of(logs: Logs, name: str) -> Logs:
    return [entry for entry in logs if entry["event"] == f"featcache.{name}"]


DESIGNED = """
    capacity_bytes committed_bytes used_bytes free_bytes largest_free_bytes slots slots_used
    waiters waiting_bytes sessions keys resident_bytes pinned_bytes puts gets recycled waited
    spilled expired evicted readers_lost
"""

# --- statistics ----------------------------------------------------------------------------------


def test_statistics_have_what_the_design_says() -> None:
    fields = {field.name for field in attrs.fields(Statistics)}
    assert fields >= set(DESIGNED.split())


async def test_statistics_of_the_owner() -> None:
    async with pair(**POOL) as (owner, client):
        assert owner.statistics() == Statistics(
            capacity_bytes=CAPACITY,
            committed_bytes=CAPACITY,
            free_bytes=CAPACITY,
            largest_free_bytes=CAPACITY,
            slots=128,
            sessions=1,
        )
        refs = [await owner.put(filled(1)), await owner.put(filled(PERCENT))]
        now = owner.statistics()
        assert now.used_bytes == 256 + PERCENT
        assert now.used_bytes + now.free_bytes == CAPACITY
        assert now.largest_free_bytes == now.free_bytes
        assert (now.slots_used, now.puts, now.recycled) == (2, 2, 0)
        await client.get(refs[0])
        await owner.get(refs[1])
        await spent(owner)
        now = owner.statistics()
        assert (now.puts, now.gets, now.reads_paid, now.recycled) == (2, 1, 2, 2)
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            now.puts = 3  # type: ignore[misc]  # that it can't be set is the point


async def test_statistics_of_a_client() -> None:
    async with pair(**POOL) as (owner, client), featcache.connect() as unattached:
        assert unattached.statistics() == Statistics()
        ref = await full(owner)
        waiting = asyncio.create_task(owner.put(filled(KIB)))
        await until(lambda: client.statistics().waiters == 1)
        now = client.statistics()
        assert now == Statistics(
            capacity_bytes=CAPACITY,
            committed_bytes=CAPACITY,
            used_bytes=CAPACITY,
            slots=128,
            slots_used=1,
            waiters=1,
            waiting_bytes=KIB,
            sessions=1,
        )
        await client.get(ref)
        await client.release(await waiting)
        await until(lambda: client.statistics().used_bytes == 0)
        assert client.statistics().gets == 1


async def test_the_owner_counts_what_was_released_until_the_call() -> None:
    async with pair(recycle_interval=60.0, **POOL) as (owner, client):
        ref = await owner.put(filled(PERCENT))
        keyed = await owner.put(filled(PERCENT), key="k", readers=1)
        await client.get(ref)
        now = owner.statistics()
        assert (now.reads_paid, now.recycled, now.slots_used) == (1, 1, 1)
        await client.get("k")
        await owner.get(keyed)
        await owner.evict("k")
        now = owner.statistics()
        assert (now.reads_paid, now.recycled, now.used_bytes) == (3, 2, 0)


async def test_the_level_counts_what_was_released_until_it_is_asked_for() -> None:
    async with pair(recycle_interval=60.0, **POOL) as (owner, client):
        ref = await full(owner)
        assert str(owner.pressure.level) == "high"
        await client.get(ref)
        assert str(owner.pressure.level) == "normal"
        ref = await full(owner)
        await client.get(ref)
        await owner.pressure.below("elevated", timeout=0)


async def test_a_hook_that_asks_for_statistics_frees_nothing_that_may_still_be_read() -> None:
    """It is called in the midst of an eviction: the slots are retired, their words not yet cleared."""
    async with pair(recycle_interval=60.0, **POOL) as (owner, client):
        pool, exposed = pool_of(owner), list[int]()

        def ask(_: events.Event) -> None:
            owner.statistics()
            free = [slot.index for slot in pool.store.table.free_slots]
            exposed.extend(index for index in free if pool.words.live[index])

        await client.get(await owner.put(filled(40 * PERCENT)))
        for key in "abcd":
            await owner.put(filled(20 * PERCENT), key=key)
        with hooked(ask):
            ref = await owner.put(filled(80 * PERCENT, 7))
        assert owner.statistics().evicted == 3
        assert exposed == []
        assert (await client.get(ref)).eq(7).all()  # type: ignore[union-attr]  # one tensor


# --- pressure ------------------------------------------------------------------------------------


async def test_the_levels() -> None:
    async with pair(**POOL) as (owner, client):
        seen = [owner.pressure.level]
        refs = []
        for _ in range(100):
            refs.append(await owner.put(filled(PERCENT)))
            seen.append(owner.pressure.level)
        assert seen.index(PressureLevel.ELEVATED) == 75
        assert seen.index(PressureLevel.HIGH) == 90
        waiting = asyncio.create_task(owner.put(filled(PERCENT)))
        await until(lambda: owner.statistics().waiters == 1)
        assert owner.pressure.level is PressureLevel.EXHAUSTED
        assert str(owner.pressure.level) == "exhausted"
        assert "exhausted" in repr(owner.pressure)
        for ref in refs:
            await client.release(ref)
        await client.release(await waiting)
        await spent(owner)
        assert str(owner.pressure.level) == "normal"


async def test_awaiting_a_lower_level() -> None:
    async with pair(**POOL) as (owner, client):
        await owner.pressure.below("elevated")
        refs = [await owner.put(filled(PERCENT)) for _ in range(80)]
        await owner.pressure.below("high", timeout=0)
        with pytest.raises(GetTimeout, match=r"elevated for 0\.01 s: ref .* owed by anonymous"):
            await owner.pressure.below("elevated", timeout=0.01)
        task = asyncio.create_task(owner.pressure.below(PressureLevel.ELEVATED))
        gone = asyncio.create_task(owner.pressure.below("elevated"))
        for ref in refs[:7]:
            await client.release(ref)
        await until(lambda: owner.statistics().slots_used == 73)  # under the mark, not clearly so
        assert not task.done()
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        for ref in refs[7:]:
            await client.release(ref)
        await task
        assert owner.pressure.level is PressureLevel.NORMAL


async def test_awaiting_a_level_that_there_is_not() -> None:
    async with pair() as (owner, _):
        for level in ("normal", "low", "", None):
            with pytest.raises(SettingsError):
                await owner.pressure.below(level)  # type: ignore[arg-type]


async def test_closing_ends_the_wait_for_a_level() -> None:
    async with pair(**POOL) as (owner, _):
        await full(owner)
        task = asyncio.create_task(owner.pressure.below("elevated"))
        await asyncio.sleep(0)
        await owner.aclose()
        with pytest.raises(CacheClosed):
            await task
        with pytest.raises(CacheClosed):
            _ = owner.pressure.level
        assert "closed" in repr(owner.pressure)


@pytest.mark.parametrize("how", ["get", "release", "borrow", "owner"])
async def test_what_was_paid_is_not_unpaid_at_close(how: str) -> None:
    closed: list[events.Event] = []
    with hooked(closed.append):
        async with pair(recycle_interval=60.0) as (owner, client):
            ref = await owner.put(filled(KIB))
            if how == "borrow":
                async with client.borrow(ref):
                    pass
            elif how == "owner":
                await owner.get(ref)
            else:
                await getattr(client, how)(ref)
            await owner.aclose()
    assert [event.unpaid_refs for event in closed if isinstance(event, events.PoolClosed)] == [0]


@pytest.mark.parametrize("read", [False, True])
async def test_spilled_refs_count_at_close(read: bool) -> None:
    closed: list[events.Event] = []
    chosen = small(recycle_interval=60.0, spill_always=True)
    with hooked(closed.append):
        async with (
            featcache.create(settings=chosen, spill="1MiB") as owner,
            featcache.connect(settings=chosen) as client,
        ):
            ref = await owner.put(filled(KIB), on_full="spill")
            if read:
                await client.get(ref)
            await owner.aclose()
    (last,) = [event.unpaid_refs for event in closed if isinstance(event, events.PoolClosed)]
    assert last == (not read)


async def test_what_was_paid_in_time_does_not_expire() -> None:
    with capture_logs() as logs:
        async with pair(recycle_interval=0.05) as (owner, client):
            refs = [await owner.put(filled(KIB), ttl=0.01) for _ in range(3)]
            for ref in refs:
                await client.get(ref)
            await until(lambda: pool_of(owner).store.recycled == 3)  # by the timer
            assert owner.statistics().expired == 0
    assert not of(logs, "ref.expired")


# --- events --------------------------------------------------------------------------------------


async def test_the_life_of_a_pool_in_events() -> None:
    with capture_logs() as logs:
        async with pair(name="tp0") as (owner, _):
            endpoint = owner.endpoint
            await owner.put(filled(1))
    assert [entry["event"] for entry in logs] == [
        "featcache.pool.opened",
        "featcache.reader.attached",
        "featcache.reader.left",
        "featcache.pool.closed",
    ]
    assert {entry["pool"] for entry in logs} == {logs[0]["pool"]}
    assert logs[0]["endpoint"] == logs[3]["endpoint"] == endpoint
    assert logs[0]["capacity_bytes"] == 1 << 20
    assert [(entry["reader"], entry["session"]) for entry in logs[1:3]] == [("tp0", 1)] * 2
    assert logs[3]["unpaid_refs"] == 1


async def test_pressure_is_reported_with_its_facts() -> None:
    with capture_logs() as logs:
        async with pair(**POOL) as (owner, client):
            ref = await owner.put(filled(80 * PERCENT), readers=["tp1", "tp0"])
            await until(lambda: of(logs, "pool.pressure"))
            task = asyncio.create_task(owner.put(filled(CAPACITY)))
            await until(lambda: len(of(logs, "pool.pressure")) == 2)
            await client.discard(ref)
            await client.release(await task)
            await until(lambda: of(logs, "pool.pressure")[-1]["pressure"] == "normal")
    reports = of(logs, "pool.pressure")
    elevated, exhausted, normal = reports[0], reports[1], reports[-1]
    assert [(entry["previous"], entry["pressure"]) for entry in reports[:2]] == [
        ("normal", "elevated"),
        ("elevated", "exhausted"),
    ]
    assert elevated["used_bytes"] == 80 * PERCENT
    assert elevated["free_bytes"] == elevated["largest_free_bytes"] == 20 * PERCENT
    assert elevated["oldest_ref"] == f"{ref.slot}:{ref.generation}"
    assert elevated["oldest_owed_by"] == ("tp0", "tp1")
    assert elevated["oldest_age_s"] >= 0
    assert (exhausted["waiters"], exhausted["waiting_bytes"]) == (1, CAPACITY)
    assert (normal["oldest_ref"], normal["used_bytes"]) == (None, 0)
    assert exhausted.keys() >= {"capacity_bytes", "resident_bytes", "pinned_bytes"}


async def test_pressure_is_reported_at_a_bounded_rate() -> None:
    with capture_logs() as logs:
        async with pair(log_interval=3600.0, **POOL) as (owner, client):
            for _ in range(20):
                ref = await owner.put(filled(95 * PERCENT))
                await client.release(await owner.put(filled(1)))
                before = owner.statistics().recycled
                await client.release(ref)
                await recycled(owner, before + 1)
    assert [entry["pressure"] for entry in of(logs, "pool.pressure")] in (["high"], [])


async def test_pressure_that_stays_high_is_repeated() -> None:
    with capture_logs() as logs:
        async with pair(pressure_interval=0.02, **POOL) as (owner, _):
            await full(owner)
            await until(lambda: len(of(logs, "pool.pressure")) >= 3)
    assert {entry["pressure"] for entry in of(logs, "pool.pressure")} == {"high"}


async def test_a_wait_is_an_event() -> None:
    with capture_logs() as logs:
        async with pair(**POOL) as (owner, client):
            ref = await full(owner)
            with pytest.raises(featcache.PutTimeout):
                await owner.put(filled(KIB), timeout=0)
            task = asyncio.create_task(owner.put(filled(2 * KIB)))
            await until(lambda: owner.statistics().waiters == 1)
            await client.release(ref)
            await task
    gave_up, granted = of(logs, "put.waited")
    assert (gave_up["granted"], gave_up["nbytes"]) == (False, KIB)
    assert (granted["granted"], granted["nbytes"]) == (True, 2 * KIB)
    assert granted["waited_s"] >= 0


async def test_waits_are_logged_at_a_bounded_rate() -> None:
    with capture_logs() as logs:
        async with pair(log_interval=3600.0, **POOL) as (owner, _):
            await full(owner)
            for _ in range(20):
                with pytest.raises(featcache.PutTimeout):
                    await owner.put(filled(KIB), timeout=0)
            assert owner.statistics().waited == 20
    assert len(of(logs, "put.waited")) == 1


def test_what_was_held_back_is_counted() -> None:
    throttle = events.Throttle(1.0)
    assert [throttle.pass_(now_s) for now_s in (0.0, 0.1, 0.9, 1.0, 1.5, 3.0)] == [
        0, None, None, 2, None, 1,
    ]  # fmt: skip


async def test_an_expiry_is_an_event() -> None:
    with capture_logs() as logs:
        async with pair(name="tp0") as (owner, client):
            named = await owner.put(filled(KIB), readers=["tp0", "tp1"], ttl=0.02)
            await owner.put(filled(KIB), readers=3, ttl=0.02)
            await client.release(named)
            await until(lambda: owner.statistics().expired == 2)
    expired = {entry["owed_by"]: entry for entry in of(logs, "ref.expired")}
    assert expired.keys() == {("tp1",), 3}
    assert expired["tp1",]["ref"] == f"{named.slot}:{named.generation}"
    assert expired["tp1",]["nbytes"] == KIB
    assert expired["tp1",]["age_s"] >= 0.02
    assert expired["tp1",]["log_level"] == "warning"


async def test_a_lost_owner_is_an_event_of_the_client() -> None:
    with capture_logs() as logs:
        async with pair() as (owner, client):
            endpoint = owner.endpoint
            await owner.aclose()
            await until(lambda: of(logs, "owner.lost"))
            assert client.statistics().sessions == 0
    (lost,) = of(logs, "owner.lost")
    assert lost["endpoint"] == endpoint
    assert "closed" in lost["reason"]


@contextlib.contextmanager
def hooked(hook: events.Hook) -> Iterator[None]:
    events.add_hook(hook)
    try:
        yield
    finally:
        events.remove_hook(hook)


async def test_hooks_get_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[events.Event] = []

    def broken(event: events.Event) -> None:
        raise ZeroDivisionError

    with hooked(broken), hooked(seen.append):
        async with featcache.create(settings=small()):
            pass
    assert [type(event) for event in seen] == [events.PoolOpened, events.PoolClosed]
    assert "ZeroDivisionError" in capsys.readouterr().err
    events.remove_hook(broken)  # not there any more, which is no error
