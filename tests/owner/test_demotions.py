"""What is evicted to make room goes to the tier, and no slot is reused before its bytes are out of it."""

import asyncio
from typing import Any

import pytest
import torch

import featcache
from featcache import CacheClosed, FeatureCache, FeatureRef, KeyNotFound, SettingsError, events
from support.caches import Gate, filled, small, tensor, until
from support.fakegpu import SEGMENT, fake_gpu
from support.keyed import nothing_lost, pool_of
from support.tiers import PLACES, SIZE, MemoryTier, fill, is_kept, is_quiet, lower, push_out, tiered


def stored(tier: MemoryTier) -> dict[str, int]:
    """The keys in a tier, with the number that all bytes of each are."""
    found = {}
    for key, (_, data) in tier.features.items():
        assert len(data) == SIZE
        assert len(set(data)) == 1
        found[key.decode()] = data[0]
    return found


@pytest.mark.parametrize("inline", [None, 0], ids=["at once", "in threads"])
@pytest.mark.parametrize("putter", ["owner", "client"])
async def test_what_makes_room_is_in_the_tier(putter: str, inline: int | None) -> None:
    changes: dict[str, Any] = {} if inline is None else {"inline_bytes": inline}
    async with tiered(**changes) as (tier, owner, client):
        await fill(owner if putter == "owner" else client, count=3 * PLACES)
        await until(lambda: owner.statistics().demoted == 2 * PLACES)
        assert stored(tier) == {f"{number}": number for number in range(2 * PLACES)}
        now = owner.statistics()
        assert (now.evicted, now.demotions_dropped, now.tier_failures) == (2 * PLACES, 0, 0)
        await until(lambda: is_quiet(owner))
        await nothing_lost(owner)


async def test_only_what_makes_room_goes_there() -> None:
    async with tiered() as (tier, owner, client):
        await fill(owner, count=3)
        await client.evict("0")
        await owner.put(filled(SIZE, 9), key="1")
        await owner.discard(await owner.put(filled(SIZE)))
        await owner.put(filled(SIZE), ttl=0.001)
        await until(lambda: owner.statistics().expired == 1)
        assert tier.count("put") == 0


async def test_what_a_watermark_evicts_goes_there() -> None:
    async with tiered(evict_above=0.5, evict_to=0.25) as (tier, owner, _):
        await fill(owner, count=PLACES - 1)
        await until(lambda: owner.statistics().demoted >= 4)
        assert set(stored(tier)) >= {"0", "1", "2", "3"}


def gated(monkeypatch: pytest.MonkeyPatch, owner: FeatureCache) -> Gate:
    """Hold each copy out of the slab."""
    gate, slab = Gate(), pool_of(owner).slab
    monkeypatch.setattr(slab, "read", gate.wrap(slab.read))
    return gate


async def test_a_slot_is_not_reused_before_its_bytes_are_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with tiered(inline_bytes=0) as (tier, owner, client):
        await fill(owner)
        gate = gated(monkeypatch, owner)
        putting = asyncio.create_task(client.put(filled(SIZE, 99), key="new"))
        await asyncio.to_thread(gate.entered.wait, 30)
        store = pool_of(owner).store
        await until(lambda: store.queue.count == 1)
        for _ in range(3):
            pool_of(owner).collect()
        assert len(store.demoting) == 1  # its room is waited for: nothing more is evicted
        assert owner.statistics().evicted == 1
        assert not putting.done()
        gate.open()
        await putting
        await until(lambda: stored(tier) == {"0": 0})
        assert int(tensor(await client.get("new"))[5]) == 99
        await nothing_lost(owner)


async def test_a_put_that_may_not_wait_for_others_has_the_room_that_comes() -> None:
    async with tiered(inline_bytes=0) as (tier, owner, client):
        await fill(owner)
        await owner.put(filled(SIZE, 50), on_full="raise", key="a")
        await client.put(filled(SIZE, 51), on_full="raise", key="b")
        await until(lambda: stored(tier) == {"0": 0, "1": 1})


async def test_a_share_has_the_slot_of_what_is_copied_out() -> None:
    async with tiered(inline_bytes=0, slots=PLACES) as (tier, owner, _):
        await fill(owner)
        await owner.get("7")
        ref = await owner.share("7", readers=1)
        assert int(tensor(await owner.get(ref))[0]) == 7
        await until(lambda: stored(tier) == {"0": 0})


async def test_put_nowait_demotes_at_once_whatever_the_size() -> None:
    async with tiered(inline_bytes=0) as (tier, owner, _):
        await fill(owner)
        owner.put_nowait(filled(SIZE, 60), key="new")
        assert not pool_of(owner).store.demoting
        assert owner.statistics().evicted == 1
        await until(lambda: stored(tier) == {"0": 0})


async def test_no_put_waits_for_a_slow_tier() -> None:
    async with tiered() as (tier, owner, _):
        tier.stop("put")
        await fill(owner, count=3 * PLACES)
        assert tier.features == {}
        tier.go("put")
        await until(lambda: owner.statistics().demoted == 2 * PLACES)


@pytest.mark.parametrize(
    "bound", [{"tier_demotions": 3}, {"tier_bytes": 3 * SIZE}], ids=["their number", "their bytes"]
)
async def test_above_the_bound_features_are_dropped_and_it_is_told(bound: dict[str, Any]) -> None:
    told: list[events.Event] = []
    events.add_hook(told.append)
    try:
        async with tiered(**bound) as (tier, owner, _):
            tier.stop("put")
            await fill(owner, count=2 * PLACES)
            assert owner.statistics().demotions_dropped == PLACES - 3
            dropped = [event for event in told if isinstance(event, events.DemotionDropped)]
            assert [event.key for event in dropped] == ["3", "4", "5", "6", "7"]
            assert next(iter(bound)) in dropped[0].reason
            tier.go("put")
            await until(lambda: is_quiet(owner))
            assert set(stored(tier)) == {"0", "1", "2"}
            await fill(owner, first=30, count=1)  # there is room again
            await until(lambda: set(stored(tier)) == {"0", "1", "2", "8"})
    finally:
        events.remove_hook(told.append)


async def test_the_tier_is_asked_for_no_more_at_once_than_is_set() -> None:
    async with tiered(tier_calls=2) as (tier, owner, _):
        tier.stop("put")
        await fill(owner, count=2 * PLACES)
        await until(lambda: tier.count("put") == 2)
        tier.go("put")
        await until(lambda: owner.statistics().demoted == PLACES)


async def test_what_came_from_the_tier_is_not_put_there_again() -> None:
    async with tiered() as (tier, owner, _):
        await fill(owner, count=2 * PLACES)
        await until(lambda: owner.statistics().demoted == PLACES)
        await owner.get("3")
        await push_out(owner, "3", 2 * PLACES)
        await until(lambda: is_quiet(owner))
        assert tier.count("put", b"3") == 1
        assert int(tensor(await owner.get("3"))[0]) == 3
        await owner.put(filled(SIZE, 77), key="3")  # another feature
        await push_out(owner, "3", 3 * PLACES)
        await until(lambda: stored(tier)["3"] == 77)


# --- keys that are dropped by name, or have newer features -----------------------------------------


async def test_evict_removes_it_from_the_tier_too() -> None:
    async with tiered() as (tier, owner, client):
        await fill(owner, count=PLACES + 2)
        await until(lambda: owner.statistics().demoted == 2)
        assert await client.evict("0")
        assert not await client.contains("0")
        with pytest.raises(KeyNotFound):
            await client.get("0")
        await until(lambda: b"0" not in tier.features)
        assert not await owner.evict("nothing")


async def test_evict_overtakes_a_put_that_is_on_its_way() -> None:
    async with tiered() as (tier, owner, _):
        await fill(owner)
        tier.stop("put")
        await fill(owner, first=PLACES, count=1)
        await until(lambda: tier.count("put", b"0") == 1)
        assert await owner.evict("0")
        with pytest.raises(KeyNotFound):
            await owner.get("0")
        assert tier.count("remove") == 0
        tier.go("put")
        await until(lambda: tier.count("remove", b"0") == 1)
        await until(lambda: tier.features == {} and is_quiet(owner))


async def test_what_could_not_be_removed_is_not_found_again() -> None:
    async with tiered() as (tier, owner, client):
        await fill(owner, count=PLACES + 1)
        await until(lambda: b"0" in tier.features)
        tier.fails["remove"] = OSError("no")
        await owner.evict("0")
        await until(lambda: owner.statistics().tier_failures == 1)
        with pytest.raises(KeyNotFound):
            await client.get("0")
        assert b"0" in tier.features
        del tier.fails["remove"]
        await client.put(filled(SIZE, 90), key="0")
        await fill(owner, first=20)
        await until(lambda: stored(tier)["0"] == 90)
        assert int(tensor(await client.get("0"))[0]) == 90


@pytest.mark.parametrize("how", ["fails", "dropped"])
async def test_an_older_feature_is_not_found_once_a_newer_one_was_lost(how: str) -> None:
    async with tiered() as (tier, owner, client):
        await fill(owner, count=PLACES + 1)
        await until(lambda: stored(tier) == {"0": 0})
        await owner.put(filled(SIZE, 70), key="0")
        await until(lambda: is_quiet(owner))
        if how == "fails":
            tier.fails["put"] = OSError("full")
        else:
            object.__setattr__(pool_of(owner).settings, "tier_demotions", 0)
        await fill(owner, first=20)
        assert not is_kept(owner, "0")
        await until(lambda: b"0" not in tier.features and is_quiet(owner))
        with pytest.raises(KeyNotFound):
            await client.get("0")


# --- faults and the end ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("x"), asyncio.CancelledError()])
async def test_a_tier_that_raises_costs_its_own_features(error: BaseException) -> None:
    told: list[events.Event] = []
    events.add_hook(told.append)
    try:
        async with tiered() as (tier, owner, client):
            tier.fails["put"] = error
            await fill(client, count=2 * PLACES)
            await until(lambda: owner.statistics().tier_failures == PLACES)
            assert owner.statistics().demoted == 0
            failed = [event for event in told if isinstance(event, events.TierFailed)]
            assert failed[0].operation == "put"
            del tier.fails["put"]
            await fill(client, first=30, count=1)
            await until(lambda: owner.statistics().demoted == 1)
            await until(lambda: is_quiet(owner))
    finally:
        events.remove_hook(told.append)


async def test_a_put_that_hangs_is_given_up() -> None:
    async with tiered(tier_timeout=0.02) as (tier, owner, _):
        tier.stop("put")
        await fill(owner, count=PLACES + 2)
        await until(lambda: owner.statistics().tier_failures == 2)
        await until(lambda: tier.cancelled == 2 and is_quiet(owner))


async def test_a_copy_that_fails_frees_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    async with tiered(inline_bytes=0) as (tier, owner, _):
        await fill(owner)

        def broken(*_: object) -> None:
            raise featcache.BackendUnavailable("no copy")

        monkeypatch.setattr(pool_of(owner).slab, "read", broken)
        await fill(owner, first=PLACES, count=1)
        assert owner.statistics().tier_failures == 1
        assert tier.count("put") == 0
        await until(lambda: is_quiet(owner))
        monkeypatch.undo()
        await nothing_lost(owner)


async def test_what_is_on_its_way_arrives_before_the_end(no_leaks: None) -> None:
    tier = MemoryTier()
    async with tiered(tier) as (_, owner, _):
        tier.stop("put")
        await fill(owner, count=PLACES + 3)
        asyncio.get_running_loop().call_later(0.01, tier.go, "put")
    assert set(tier.features) == {b"0", b"1", b"2"}
    assert tier.closed == 1


async def test_a_tier_that_hangs_does_not_hold_up_the_end(no_leaks: None) -> None:
    tier = MemoryTier()
    async with tiered(tier, tier_timeout=0.02) as (_, owner, _):
        for operation in ("put", "remove", "close"):
            tier.stop(operation)
        await fill(owner, count=PLACES + 3)
        await owner.evict("5")
    assert tier.closed == 0
    assert tier.count("close") == 1


async def test_the_end_waits_for_a_copy_out_of_the_slab(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    tier = MemoryTier()
    async with tiered(tier, inline_bytes=0, tier_timeout=0.02) as (_, owner, _):
        await fill(owner)
        gate = gated(monkeypatch, owner)
        putting = asyncio.create_task(owner.put(filled(SIZE), key="new"))
        await asyncio.to_thread(gate.entered.wait, 30)
        demotions = lower(owner)._demotions
        closing = asyncio.create_task(owner.aclose())
        await until(lambda: demotions._closed)
        assert not closing.done()
        gate.open()
        await closing
        ended = (await asyncio.gather(putting, return_exceptions=True))[0]
        assert isinstance(
            ended, FeatureRef | CacheClosed
        )  # as the room came before the end, or after


def test_a_tier_has_all_calls() -> None:
    class Half:
        async def put(self, *_: object) -> None: ...

    for wrong in (Half(), "mooncake", MemoryTier):
        with pytest.raises(SettingsError, match="tier="):
            featcache.create(tier=wrong)  # type: ignore[arg-type]


# --- on a GPU --------------------------------------------------------------------------------------


async def test_features_on_a_gpu_go_by_way_of_host_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tier, half = MemoryTier(), SEGMENT // 2
    chosen = small(capacity=SEGMENT, segment=SEGMENT, tier_bytes=2 * SEGMENT, tier_timeout=30.0)
    with fake_gpu() as gpu:
        async with featcache.create(settings=chosen, tier=tier) as owner:
            values = [torch.arange(half // 4, dtype=torch.int32) + n for n in range(4)]
            gate: Gate | None = None
            for number, value in enumerate(values):
                if number == 2:
                    gate = gated(monkeypatch, owner)
                    gpu.run()
                    putting = asyncio.create_task(owner.put(value, key=f"{number}"))
                    await asyncio.to_thread(gate.entered.wait, 30)
                    assert len(pool_of(owner).store.demoting) == 1
                    assert not putting.done()
                    gate.open()
                    await putting
                else:
                    await owner.put(value, key=f"{number}")
                gpu.run()
            await until(lambda: owner.statistics().demoted == 2)
            for number in (0, 1):
                assert tier.features[b"%d" % number][1] == values[number].numpy().tobytes()
            for number, value in enumerate(values):
                found = await owner.get(f"{number}", device="cpu")
                assert torch.equal(tensor(found), value)
            assert owner.statistics().promoted >= 2
            gpu.run()
