"""Features by key: found, waited for, kept, replaced, dropped and pinned, by owner and clients alike."""

import asyncio
import itertools
import os
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

import featcache
from api.test_put_get import PLAIN, SHAPES, pattern
from featcache import (
    CacheClosed,
    GetTimeout,
    KeyNotFound,
    KeyTimeout,
    OwnerLost,
    PoolFull,
    SettingsError,
    StaleRef,
)
from featcache.memory.host.slab import HostMapping
from featcache.settings import MAX_KEY_BYTES
from support import processes
from support.caches import KIB, Gate, filled, pair, small, spent, steps, tensor, until
from support.hosted import all_spent, relayed
from support.keyed import (
    CAPACITY,
    ONE,
    Cancellable,
    User,
    grants,
    in_progress,
    nothing_lost,
    page_of,
    party,
    pool_of,
    queued,
    seeking,
    sought,
)
from support.processes import Pipe
from support.slabs import Place, at, copy_of, same, same_dict

BASE = torch.arange(720, dtype=torch.float32)
Call = Callable[[], Coroutine[Any, Any, Any]]


async def entered(user: User, key: Any, timeout: float | None = None) -> bytes:
    """Borrow by key, and return the bytes that were lent."""
    async with user.borrow(key, timeout=timeout) as view:
        return tensor(view).cpu().numpy().tobytes()


# --- what is found -------------------------------------------------------------------------------


async def test_a_feature_is_found_by_its_key(place: Place) -> None:
    async with place.open() as (owner, reader):
        await owner.put(BASE.to(place.slab.device), key="an image")
        for key in ("an image", b"an image", "an image"):
            copy = tensor(await reader.get(key))
            assert copy.device == place.device
            assert same(copy, BASE)
            async with reader.borrow(key) as view:
                assert same(view, BASE)
            assert (tensor(view).numel() == 0) is not place.relayed, (
                "a borrow by way of the host is a copy"
            )
            assert await reader.contains(key)
        assert not await reader.contains("another")
        assert await reader.evict("an image")
        assert not await reader.evict(b"an image")
        assert not await reader.contains("an image")
        await all_spent(owner)
        assert grants(owner) == 0


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")  # torch's own, once
async def test_every_dtype_and_shape_by_key(place: Place) -> None:
    async with place.open(slots=256) as (owner, reader):
        for dtype in PLAIN:
            value = pattern(dtype, 20).view(4, 5)
            await owner.put(at(value, place.slab.device), key=f"{dtype}")
            assert same(tensor(await reader.get(f"{dtype}")), value), dtype
        for name, value in SHAPES.items():
            await owner.put(value, key=name)
            assert same(tensor(await reader.get(name)), value), name
            async with reader.borrow(name) as view:
                assert same(view, value), name
        assert owner.statistics().keys == len(PLAIN) + len(SHAPES)
        for key in [f"{dtype}" for dtype in PLAIN] + list(SHAPES):
            assert await reader.evict(key)
        await all_spent(owner)


async def test_dicts_out_and_device(place: Place) -> None:
    feature = {"pixels": BASE.view(24, 30), "grid": torch.tensor([[1, 4, 6]])}
    async with place.open() as (owner, reader):
        await owner.put(feature, key="image")
        assert same_dict(await reader.get("image"), feature)
        async with reader.borrow("image") as views:
            assert same_dict(views, feature)
        out = {
            name: torch.empty(v.shape, dtype=v.dtype, device=place.device)
            for name, v in feature.items()
        }
        assert await reader.get("image", out=out) is out
        assert same_dict(out, feature)
        here = await reader.get("image", device="cpu")
        assert isinstance(here, dict)
        assert {value.device.type for value in here.values()} == {"cpu"}
        wrongs: list[Any] = [{"out": {"pixels": out["pixels"]}}, {"out": out, "device": "cpu"}]
        for wrong in wrongs:
            with pytest.raises(SettingsError):
                await reader.get("image", **wrong)
        assert await reader.evict("image")
        await all_spent(owner)
        assert grants(owner) == 0, "an out that does not fit costs no grant"


async def test_copies_in_threads() -> None:
    async with pair(inline_bytes=0) as (owner, client):
        await owner.put(BASE, key="a")
        for user in (owner, client):
            out = torch.empty(720)
            assert same(await user.get("a"), BASE)
            assert await user.get("a", out=out) is out
            assert same(out, BASE)
        await nothing_lost(owner)


@pytest.mark.parametrize("inline_bytes", [0, 1 << 20], ids=["thread", "inline"])
async def test_reads_by_key_through_the_host(inline_bytes: int) -> None:
    sizes: dict[str, Any] = {"inline_bytes": inline_bytes}
    async with relayed(client=sizes, **sizes) as (owner, client):
        await owner.put(BASE, key="a")
        for _ in range(2):
            assert same(await client.get("a"), BASE)
            async with client.borrow("a") as view:
                assert same(view, BASE)
            out = torch.empty(720)
            assert await client.get("a", out=out) is out
            assert same(out, BASE)
        assert owner.statistics().relayed == 6
        assert await client.evict("a")
        await all_spent(owner)
        assert grants(owner) == 0


@pytest.mark.parametrize(
    ("key", "same_key"),
    [("é", "é".encode()), ("k" * MAX_KEY_BYTES, b"k" * MAX_KEY_BYTES)],
    ids=["not ascii", "the longest"],
)
async def test_a_str_is_its_utf8(key: str, same_key: bytes) -> None:
    async with pair() as (owner, client):
        await client.put(BASE, key=key)
        for user in (owner, client):
            for form in (key, same_key):
                assert same(await user.get(form), BASE)
                assert await user.contains(form)
        await nothing_lost(owner)


async def test_bytes_that_are_no_text_are_a_key_too() -> None:
    async with pair() as (owner, client):
        for number, key in enumerate((b"\0", b"\xff" * 16, bytes(range(256)))):
            await client.put(filled(8, number), key=key)
            assert same(await owner.get(key), filled(8, number))
            absent = key + b"\xff"
            with pytest.raises(KeyNotFound, match=absent.hex()[:64]):
                await client.get(absent)
        await nothing_lost(owner)


BAD: list[Any] = [
    "",
    b"",
    "k" * (MAX_KEY_BYTES + 1),
    b"k" * 2000,
    "é" * 600,
    3,
    None,
    bytearray(b"k"),
]


@pytest.mark.parametrize("key", BAD, ids=lambda key: f"{type(key).__name__} of {len(f'{key}')}")
@pytest.mark.parametrize("who", ["owner", "client"])
async def test_what_is_no_key(key: Any, who: str) -> None:
    async with pair() as both:
        user: User = both[who == "client"]
        calls: list[Call] = [
            lambda: user.get(key),
            lambda: entered(user, key),
            lambda: user.contains(key),
            lambda: user.evict(key),
            lambda: user.pin(key),
            lambda: user.unpin(key),
            lambda: user.get_or_put(key, lambda: BASE),
        ]
        if key is not None:
            calls.append(lambda: user.put(BASE, key=key))
        for call in calls:
            with pytest.raises(SettingsError, match=r"key|FeatureRef"):
                await call()
        await spent(both[0])


async def test_forms_that_take_only_refs() -> None:
    async with pair() as (owner, client):
        await owner.put(BASE, key="a")
        for user in (owner, client):
            wrong: Any = user
            for call in (wrong.release, wrong.discard):
                with pytest.raises(SettingsError, match="FeatureRef"):
                    await call("a")
            assert same(user.get_nowait("a"), BASE)
            with user.borrow("a") as view:
                assert same(view, BASE)
        await nothing_lost(owner)


async def test_a_key_that_is_not_there(place: Place) -> None:
    async with place.open() as (_, reader):
        absent: list[Call] = [
            lambda: reader.get("a"),
            lambda: entered(reader, "a"),
            lambda: reader.pin("a"),
            lambda: reader.unpin("a"),
        ]
        for call in absent:
            with pytest.raises(KeyNotFound, match="'a'") as caught:
                await call()
            assert not isinstance(caught.value, TimeoutError)
            assert isinstance(caught.value, LookupError)
        for call in (lambda: reader.get("a", timeout=0.01), lambda: entered(reader, "a", 0.01)):
            with pytest.raises(KeyTimeout, match=r"'a'.*0.01") as late:
                await call()
            assert isinstance(late.value, KeyNotFound)
            assert isinstance(late.value, GetTimeout)
            assert isinstance(late.value, TimeoutError)


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_a_timeout_of_nothing_finds_what_is_there(who: str) -> None:
    async with pair() as both:
        user: User = both[who == "client"]
        await user.put(BASE, key="a", timeout=0)
        assert same(await user.get("a", timeout=0), BASE)
        assert await entered(user, "a", 0) == BASE.numpy().tobytes()
        for call in (lambda: user.get("b", timeout=0), lambda: entered(user, "b", 0)):
            with pytest.raises(KeyTimeout):
                await call()
        await nothing_lost(both[0])


async def test_a_client_that_is_connected_to_nobody() -> None:
    async with pair() as (owner, _), featcache.connect() as loose:
        ref = await owner.put(BASE, key="a", readers=1)
        calls: list[Call] = [
            lambda: loose.get("a"),
            lambda: entered(loose, "a"),
            lambda: loose.contains("a"),
            lambda: loose.evict("a"),
            lambda: loose.pin("a"),
            lambda: loose.unpin("a"),
            lambda: loose.get_or_put("a", lambda: BASE),
            lambda: loose.put(BASE),
        ]
        for call in calls:
            with pytest.raises(SettingsError, match="connect"):
                await call()
        assert same(await loose.get(ref), BASE)
        for call in calls:  # nor is it bound by what it has read
            with pytest.raises(SettingsError, match="connect"):
                await call()


# --- refs and keys of one feature ----------------------------------------------------------------


async def test_a_key_is_read_as_often_as_one_likes_its_ref_once(place: Place) -> None:
    async with place.open() as (owner, reader):
        ref = copy_of(await owner.put(BASE.to(place.slab.device), key="a", readers=1))
        for _ in range(3):
            assert same(await reader.get("a"), BASE)
        assert same(await reader.get(ref), BASE)
        for again in (reader.get(ref), reader.release(ref)):
            with pytest.raises(StaleRef, match="paid"):
                await again
        assert same(await reader.get("a"), BASE)
        assert await owner.evict("a")
        await all_spent(owner)


async def test_a_ref_that_owes_nothing_can_be_read_while_its_key_is_kept() -> None:
    """Put with a key a ref owes no read; who has it may read it all the same, once a session."""
    async with party(2) as (owner, clients):
        ref = await owner.put(BASE, key="a")
        for user in (owner, *clients):
            assert same(await user.get(ref), BASE)
            with pytest.raises(StaleRef, match="paid"):
                await user.get(ref)
        assert await owner.evict("a")
        await spent(owner)
        async with featcache.connect(owner.endpoint) as late:
            with pytest.raises(StaleRef):
                await late.get(ref)


async def test_reads_that_are_owed_besides_keep_a_dropped_feature() -> None:
    async with party(2) as (owner, (one, two)):
        ref = await owner.put(BASE, key="a", readers=2)
        await one.get(ref)
        assert await two.evict("a")
        assert not await owner.contains("a")
        assert owner.statistics().used_bytes > 0
        assert same(await two.get(ref), BASE)
        await spent(owner)


async def test_named_readers_of_a_keyed_feature() -> None:
    async with pair(name="tp0") as (owner, client), featcache.connect(owner.endpoint) as other:
        ref = await owner.put(BASE, key="a", readers=["tp0"])
        await other.get(ref)  # it owes none
        assert await owner.evict("a")
        assert owner.statistics().slots_used == 1
        await client.get(ref)
        await spent(owner)


async def test_the_ttl_is_of_the_ref_not_of_the_key() -> None:
    with capture_logs() as logs:
        async with pair() as (owner, client):
            ref = await client.put(BASE, key="a", readers=3, ttl=0.01)
            await until(lambda: owner.statistics().expired == 1)
            assert same(await client.get("a"), BASE)
            assert same(await client.get(ref), BASE), "what is resident is read by its ref too"
            await owner.put(BASE, key="b", ttl=0.01)  # owes nothing: nothing expires
            await until(lambda: owner.statistics().keys == 2)
            assert await client.evict("a")
            await until(lambda: owner.statistics().slots_used == 1)
            assert same(await client.get("b"), BASE)
            await nothing_lost(owner)
            assert owner.statistics().expired == 1
    expired = [entry for entry in logs if entry["event"] == "featcache.ref.expired"]
    assert [entry["owed_by"] for entry in expired] == [3]


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_discarding_the_ref_of_a_kept_feature_leaves_its_key(who: str) -> None:
    async with pair() as both:
        owner, user = both[0], both[who == "client"]
        ref = await owner.put(BASE, key="a", readers=2)
        await user.discard(ref)
        assert same(await user.get("a"), BASE)
        assert owner.statistics().slots_used == 1
        assert await user.evict("a")
        await spent(owner)
        with pytest.raises(StaleRef):
            await user.discard(ref)


async def test_discarding_while_it_is_read_by_its_key() -> None:
    async with pair(**ONE) as (owner, client):
        ref = await owner.put(filled(CAPACITY, 1), key="a", readers=1)
        async with client.borrow("a") as view:
            assert await owner.evict("a")
            await owner.discard(ref)
            with pytest.raises(PoolFull):  # the room is not free as long as it is read
                await owner.put(filled(1), on_full="raise")
            assert torch.equal(tensor(view), filled(CAPACITY, 1))
        await spent(owner)
        assert tensor(view).numel() == 0


# --- waiting for what is not there yet -----------------------------------------------------------


@pytest.mark.parametrize("who", ["owner", "client", "another client"])
async def test_a_put_wakes_all_who_wait_for_its_key(who: str) -> None:
    async with party(3) as (owner, clients):
        users: list[User] = [owner, *clients]
        putter = users[{"owner": 0, "client": 1, "another client": 3}[who]]
        gets = [asyncio.create_task(user.get("a", timeout=20)) for user in users]
        views = [asyncio.create_task(entered(user, "a", 20)) for user in users]
        await sought(owner, 8)
        assert owner.statistics().misses == 8
        other = asyncio.create_task(clients[1].get("b", timeout=20))
        await sought(owner, 9)
        await putter.put(BASE, key="a")
        for copying in gets:
            assert same(await copying, BASE)
        for lending in views:
            assert await lending == BASE.numpy().tobytes()
        assert seeking(owner) == 1, "who waits for another key still does"
        await putter.put(BASE * 2, key="b")
        assert same(await other, BASE * 2)
        await nothing_lost(owner)


async def test_who_waits_gets_what_came_even_if_it_is_dropped_at_once() -> None:
    async with party(2) as (owner, (one, two)):
        tasks = [asyncio.create_task(user.get("a", timeout=20)) for user in (owner, one, two)]
        await sought(owner, 3)
        owner.put_nowait(BASE, key="a")
        assert owner._opened().main.lookups.command(
            "evict", b"a", 0
        )  # none of them has run since it came
        for task in tasks:
            assert same(await task, BASE)
        await nothing_lost(owner)


async def test_who_waits_too_long_leaves_no_trace() -> None:
    async with pair() as (owner, client):
        for user in (owner, client):
            for call in (lambda: user.get("a", timeout=0.02), lambda: entered(user, "a", 0.02)):  # noqa: B023 - called here
                with pytest.raises(KeyTimeout):
                    await call()
        await until(lambda: not in_progress(owner))
        assert seeking(owner) == 0
        await owner.put(BASE, key="a")
        assert grants(owner) == 0
        await nothing_lost(owner)


async def test_the_bytes_of_a_found_key_are_waited_for_within_the_same_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A found feature whose bytes have not landed: the read is given up, and costs no grant."""
    async with pair() as (owner, client):
        ref = await owner.put(BASE, key="a")
        published = pool_of(owner).words.published
        published[ref.slot] = 0
        for user in (owner, client):
            for call in (lambda: user.get("a", timeout=0.02), lambda: entered(user, "a", 0.02)):  # noqa: B023 - called here
                with pytest.raises(GetTimeout, match="did not come") as caught:
                    await call()
                assert not isinstance(caught.value, KeyNotFound)
        waiting = [asyncio.create_task(user.get("a")) for user in (owner, client)]
        await until(lambda: grants(owner) == 2)
        published[ref.slot] = ref.generation
        for task in waiting:
            assert same(await task, BASE)
        await nothing_lost(owner)


async def test_too_many_wait_for_keys() -> None:
    async with pair(waiters=2) as (owner, client):
        tasks = [asyncio.create_task(user.get("a", timeout=20)) for user in (owner, client)]
        await sought(owner, 2)
        for user in (owner, client):
            with pytest.raises(PoolFull, match="waiters"):
                await user.get("b", timeout=20)
        await owner.put(BASE, key="a")
        await asyncio.gather(*tasks)
        await nothing_lost(owner)


# --- replacing and dropping while it is read -----------------------------------------------------


@pytest.mark.parametrize("who", ["owner", "client"])
async def test_a_key_is_given_to_another_feature_while_the_first_is_read(who: str) -> None:
    async with party(2, capacity=4 * CAPACITY) as (owner, (one, two)):
        putter: User = owner if who == "owner" else one
        await putter.put(filled(CAPACITY, 1), key="a")
        async with one.borrow("a") as old, two.borrow("a") as also_old:
            await putter.put(filled(CAPACITY, 2), key="a")
            async with owner.borrow("a") as new:
                assert torch.equal(tensor(new), filled(CAPACITY, 2))
                for view in (old, also_old):
                    assert torch.equal(tensor(view), filled(CAPACITY, 1))
                assert owner.statistics().slots_used == 2
                assert owner.statistics().resident_bytes == CAPACITY
        assert same(await two.get("a"), filled(CAPACITY, 2))
        await until(lambda: owner.statistics().slots_used == 1)
        assert owner.statistics().evicted == 0, "it was replaced, not evicted"
        assert owner.statistics().keys == 1
        await nothing_lost(owner)


@pytest.mark.parametrize("who", ["owner", "client", "its reader"])
async def test_a_key_is_dropped_while_its_feature_is_read(who: str) -> None:
    """Its bytes stay right until the read ends, and are room only then."""
    async with party(2, **ONE) as (owner, (reader, other)):
        users: list[User] = [owner, other, reader]
        by = users[["owner", "client", "its reader"].index(who)]
        await other.put(filled(CAPACITY, 1), key="a")
        async with reader.borrow("a") as view:
            assert await by.evict("a")
            for user in (owner, reader, other):
                assert not await user.contains("a")
                with pytest.raises(KeyNotFound):
                    await user.get("a")
            next_put = asyncio.create_task(other.put(filled(CAPACITY, 2), key="a"))
            await queued(owner, 1)
            assert owner.statistics().used_bytes == CAPACITY
            assert torch.equal(tensor(view), filled(CAPACITY, 1))
        await next_put
        assert same(await reader.get("a"), filled(CAPACITY, 2))
        await nothing_lost(owner)


async def test_a_copy_under_way_in_a_thread_keeps_a_dropped_feature(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    gate = Gate()
    async with pair(inline_bytes=0, **ONE) as (owner, client):
        await owner.put(filled(CAPACITY, 1), key="a")
        with monkeypatch.context() as patch:
            patch.setattr(HostMapping, "read", gate.wrap(HostMapping.read))
            task = asyncio.create_task(client.get("a"))
            await until(gate.entered.is_set)
        assert await client.evict("a")
        putting = asyncio.create_task(owner.put(filled(CAPACITY, 2)))
        await queued(owner, 1)
        gate.open()
        assert same(await task, filled(CAPACITY, 1))
        await client.release(await putting)
        await nothing_lost(owner)


async def test_several_reads_of_one_key_at_once_are_each_paid() -> None:
    async with pair() as (owner, client):
        await owner.put(BASE, key="a")
        borrows = [user.borrow("a") for user in (owner, client) for _ in range(5)]
        for borrow in borrows:
            await borrow.__aenter__()
        await asyncio.gather(*(user.get("a") for user in (owner, client) for _ in range(5)))
        await until(lambda: grants(owner) == 10)
        assert await owner.evict("a")
        for borrow in borrows:
            assert owner.statistics().slots_used == 1
            await borrow.__aexit__(None, None, None)
        await nothing_lost(owner)


async def test_a_borrow_by_key_can_be_entered_again_and_looks_anew() -> None:
    async with pair() as (owner, client):
        borrow = client.borrow("a", timeout=20)
        await owner.put(filled(8, 1), key="a")
        async with borrow as view:
            assert torch.equal(tensor(view), filled(8, 1))
            with pytest.raises(SettingsError, match="entered already"):
                await borrow.__aenter__()
        await owner.put(filled(8, 2), key="a")
        async with borrow as view:
            assert torch.equal(tensor(view), filled(8, 2))
        await nothing_lost(owner)


# --- pins ----------------------------------------------------------------------------------------


async def test_pins_are_counted_and_are_their_sessions() -> None:
    async with party(2) as (owner, (one, two)):
        await owner.put(filled(1000), key="a")
        assert owner.statistics().pinned_bytes == 0
        for user in (owner, one, one, two):
            await user.pin("a")
        assert owner.statistics().pinned_bytes == owner.statistics().resident_bytes == 1024
        await one.unpin("a")
        await one.unpin("a")
        await one.aclose()
        assert owner.statistics().pinned_bytes == 1024
        await two.aclose()
        assert owner.statistics().pinned_bytes == 1024
        await owner.unpin("a")
        assert owner.statistics().pinned_bytes == 0
        await owner.unpin("a")  # there is none, which is no error
        await nothing_lost(owner)


async def test_what_is_pinned_presses_at_once() -> None:
    async with pair(capacity=64 * KIB, recycle_interval=60.0) as (owner, client):
        await owner.put(filled(64 * KIB), key="a")
        assert owner.pressure.level == "normal"
        await client.pin("a")
        assert owner.pressure.level == "high"
        await client.unpin("a")
        assert owner.pressure.level == "normal"


async def test_pins_end_with_their_session() -> None:
    async with pair() as (owner, client):
        await client.put(BASE, key="a")
        await client.pin("a")
        await client.pin("a")
        assert owner.statistics().pinned_bytes > 0
        await client.aclose()
        await until(lambda: owner.statistics().pinned_bytes == 0)
        assert await owner.contains("a")
        await nothing_lost(owner)


async def test_a_pin_keeps_from_eviction_not_from_being_evicted_by_name() -> None:
    async with pair() as (owner, client):
        await owner.put(BASE, key="a")
        await client.pin("a")
        assert await owner.evict("a")
        await spent(owner)
        await owner.put(BASE, key="a")
        assert owner.statistics().pinned_bytes == 0, "pins go with the key that they were of"
        await nothing_lost(owner)


async def test_a_pin_stays_when_its_key_is_given_to_another_feature() -> None:
    async with pair() as (owner, client):
        await owner.put(filled(100), key="a")
        await client.pin("a")
        await client.put(filled(1000), key="a")
        assert owner.statistics().pinned_bytes == 1024
        await client.unpin("a")
        await nothing_lost(owner)


# --- cancelled at any moment ---------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", ["native", "anyio"])
WHO = pytest.mark.parametrize("who", ["owner", "client"])
TURNS = range(14)


def calls_by_key(user: User) -> list[Call]:
    return [
        lambda: user.get("a", timeout=20),
        lambda: entered(user, "a", 20),
        lambda: user.get_or_put("a", lambda: filled(CAPACITY, 1)),
    ]


@KINDS
@pytest.mark.parametrize("inline_bytes", [0, CAPACITY], ids=["thread", "inline"])
async def test_a_lookup_that_is_cancelled_at_any_moment_costs_no_grant(
    kind: str, inline_bytes: int, no_leaks: None
) -> None:
    late = set()
    async with pair(inline_bytes=inline_bytes, **ONE) as both:
        owner = both[0]
        for turns in TURNS:
            for call in calls_by_key(both[0]) + calls_by_key(both[1]):
                if not await owner.contains("a"):
                    await owner.put(filled(CAPACITY, 1), key="a")
                doomed = Cancellable(kind, call)
                await steps(turns)
                doomed.cancel()
                await doomed.wait()
                assert doomed.error is None
                late.add(doomed.result is not None)
            await nothing_lost(owner)
    # A hit that copies in the loop is done in one step.
    assert late >= ({True} if inline_bytes else {False, True})


@KINDS
async def test_a_wait_that_is_cancelled_at_any_moment_costs_no_grant(
    kind: str, no_leaks: None
) -> None:
    """Before, while and after what it waits for comes; who waits beside it gets it."""
    async with pair() as both, featcache.connect(both[0].endpoint) as third:
        owner, users = both[0], list[User](both)
        for turns, user, putter in itertools.product(TURNS, users, users):
            for call in calls_by_key(user)[:2]:
                doomed = Cancellable(kind, call)
                beside = asyncio.create_task(third.get("a", timeout=20))
                await sought(owner, 2)
                put = asyncio.create_task(putter.put(BASE, key="a"))
                await steps(turns)
                doomed.cancel()
                await doomed.wait()
                assert doomed.error is None
                await put
                assert same(await beside, BASE)
                await nothing_lost(owner)


@KINDS
async def test_all_who_wait_are_cancelled_at_once(kind: str) -> None:
    async with pair() as both:
        owner = both[0]
        for user in both:
            doomed = [Cancellable(kind, call) for _ in range(10) for call in calls_by_key(user)[:2]]
            await sought(owner, 20)
            for one in doomed:
                one.cancel()
            await owner.put(BASE, key="a")
            for one in doomed:
                await one.wait()
                assert (one.result, one.error) == (None, None)
            await nothing_lost(owner)


@KINDS
async def test_other_questions_that_are_cancelled(kind: str) -> None:
    async with pair() as (owner, client):
        questions: list[Call] = [
            lambda: client.contains("a"),
            lambda: client.pin("a"),
            lambda: client.unpin("a"),
            lambda: client.evict("a"),
        ]
        for turns in range(6):
            for question in questions:
                await owner.put(BASE, key="a")
                doomed = Cancellable(kind, question)
                await steps(turns)
                doomed.cancel()
                await doomed.wait()
                assert doomed.error is None
        assert isinstance(await client.contains("a"), bool)
        await nothing_lost(owner)


@KINDS
async def test_a_copy_in_a_thread_that_is_cancelled_holds_its_grant_until_it_is_done(
    kind: str, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    gate = Gate()
    async with pair(inline_bytes=0, **ONE) as (owner, client):
        await owner.put(filled(CAPACITY, 1), key="a")
        with monkeypatch.context() as patch:
            patch.setattr(HostMapping, "read", gate.wrap(HostMapping.read))
            doomed = Cancellable(kind, lambda: client.get("a"))
            await until(gate.entered.is_set)
            doomed.cancel()
            await doomed.wait()
        assert await owner.evict("a")
        pool_of(owner).collect()
        assert (grants(owner), owner.statistics().used_bytes) == (1, CAPACITY)
        gate.open()
        await nothing_lost(owner)


# --- bounds --------------------------------------------------------------------------------------


@WHO
async def test_a_session_has_only_so_many_reads_by_key_out(who: str) -> None:
    async with pair(grants=3) as both, featcache.connect(both[0].endpoint) as other:
        owner, user = both[0], both[who == "client"]
        await owner.put(BASE, key="a")
        borrows = [user.borrow("a") for _ in range(3)]
        for borrow in borrows:
            await borrow.__aenter__()
        for call in calls_by_key(user):
            with pytest.raises(PoolFull, match="grants"):
                await call()
        assert same(await other.get("a"), BASE), "the bound is each session's own"
        assert await user.contains("a")
        with pytest.raises(KeyNotFound):
            await user.get("b")
        for borrow in borrows:
            await borrow.__aexit__(None, None, None)
            assert same(await user.get("a"), BASE), "one has come back, which is seen at once"
        await asyncio.gather(*(user.get("a") for _ in range(3)))
        await nothing_lost(owner)


@WHO
async def test_a_wait_that_ends_with_no_grant_left(who: str, no_leaks: None) -> None:
    async with pair(grants=1) as both:
        owner, user = both[0], both[who == "client"]
        await owner.put(BASE, key="a")
        async with user.borrow("a"):
            waiting = asyncio.create_task(user.get("b", timeout=20))
            await sought(owner, 1)
            await owner.put(BASE, key="b")
            with pytest.raises(PoolFull, match="grants"):
                await waiting
        assert same(await user.get("b"), BASE)
        await nothing_lost(owner)


async def test_one_grant_again_and_again() -> None:
    """The words of grants are used over and over; each payment is of one grant only."""
    async with pair(grants=1) as (owner, client):
        await owner.put(BASE, key="a")
        await owner.put(BASE + 1, key="b")
        for _ in range(200):
            assert same(await client.get("a"), BASE)
            assert same(await client.get("b"), BASE + 1)
        await nothing_lost(owner)
        assert owner.statistics().hits == 400


async def test_a_ref_that_is_too_long_for_a_message_costs_no_grant() -> None:
    feature = {"n" * 200 + f"{n}": torch.empty(0) for n in range(8)}
    async with pair(message_bytes=1024) as (owner, client):
        await owner.put(feature, key="a")
        for call in calls_by_key(client):
            with pytest.raises(SettingsError, match="message_bytes"):
                await call()
        waiting = asyncio.create_task(client.get("b", timeout=20))
        await sought(owner, 1)
        await owner.put(feature, key="b")
        with pytest.raises(SettingsError, match="message_bytes"):
            await waiting
        assert grants(owner) == 0
        assert same_dict(await owner.get("a"), feature)
        await nothing_lost(owner)


@pytest.mark.parametrize("short", ["owner", "client"])
async def test_each_sends_no_longer_messages_than_the_other_takes(short: str) -> None:
    owners, clients = (small(), small(message_bytes=1024))[:: -1 if short == "owner" else 1]
    feature = {"n" * 200 + f"{n}": torch.empty(0) for n in range(8)}
    async with (
        featcache.create(settings=owners) as owner,
        featcache.connect(owner.endpoint, settings=clients) as client,
    ):
        await owner.put(feature, key="a")
        refused: list[Coroutine[Any, Any, Any]]
        refused = [client.put(BASE, key="x" * 1020), client.put(feature, key="b")]
        if short == "client":
            refused.append(client.get("a"))
        for call in refused:
            with pytest.raises(SettingsError, match="message_bytes"):
                await call
        assert await client.contains("a")
        await until(lambda: owner.statistics().slots_used == 1)
        await nothing_lost(owner)


# --- words that say what is not so ---------------------------------------------------------------


async def test_forged_and_late_words_pay_nothing() -> None:
    """A grant is paid by its own number in its own word, and by that only."""
    async with pair(grants=4, **ONE) as (owner, client):
        page = page_of(owner)
        earlier = asyncio.create_task(client.get("a", timeout=20))
        await sought(owner, 1)
        await owner.put(filled(CAPACITY, 1), key="a")
        await earlier  # which was paid
        await until(lambda: not page.grants)
        assert await owner.evict("a")
        entering = asyncio.create_task((borrow := client.borrow("a", timeout=20)).__aenter__())
        await sought(owner, 1)
        await owner.put(filled(CAPACITY, 1), key="a")
        view = await entering
        try:
            assert await owner.evict("a")
            ((index, grant),) = page.grants.items()
            granted = page.words.granted
            for word, value in (
                (index, grant.serial - 1),  # the one before, paid late
                (index, grant.serial + 1),  # one that was never given out
                (index, (1 << 64) - 1),
                (index, 0),
                *((other, grant.serial) for other in range(4) if other != index),
            ):
                granted[word] = value
                pool_of(owner).collect()
                assert page.grants == {index: grant}
            with pytest.raises(PoolFull):
                owner.put_nowait(filled(1))
            assert torch.equal(tensor(view), filled(CAPACITY, 1))
        finally:
            borrow.close()
        await until(lambda: not page.grants)
        await nothing_lost(owner)


async def test_words_of_what_a_session_was_not_told_to_write_change_nothing() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(BASE, key="a", readers=1)
        page = page_of(owner)
        for generation in (ref.generation, ref.generation + 1, (1 << 64) - 1):
            for index in (ref.slot, ref.slot + 1):
                page.words.written[index] = generation
            pool_of(owner).collect()
            assert pool_of(owner).words.published[ref.slot] == ref.generation
            assert pool_of(owner).words.published[ref.slot + 1] == 0
        assert same(await client.get(ref), BASE)
        await nothing_lost(owner)


# --- ends ----------------------------------------------------------------------------------------


async def test_the_owner_closes_while_others_wait(no_leaks: None) -> None:
    async with party(2) as (owner, (one, two)):
        own = [asyncio.create_task(call()) for call in calls_by_key(owner)[:2]]
        theirs = [
            asyncio.create_task(call()) for user in (one, two) for call in calls_by_key(user)[:2]
        ]
        await sought(owner, 6)
        await owner.aclose()
        for task in own:
            with pytest.raises(CacheClosed):
                await task
        for task in theirs:
            with pytest.raises(OwnerLost):
                await task
        await refuses_all(owner)
        await refuses_all(one, OwnerLost)


async def test_a_client_closes_while_it_reads(no_leaks: None) -> None:
    async with party(2) as (owner, (leaving, other)):
        await owner.put(BASE, key="a")
        async with leaving.borrow("a") as view:
            await leaving.aclose()
            with pytest.raises(CacheClosed):
                await leaving.get("a")
            assert await owner.evict("a")
            assert owner.statistics().slots_used == 1
            assert same(view, BASE), "what is lent stays until it is left"
        await until(lambda: owner.statistics().sessions == 1)
        await owner.put(BASE, key="b")
        assert same(await other.get("b"), BASE)
        await nothing_lost(owner)


async def test_what_a_client_awaits_ends_when_it_is_closed_also_while_it_lends() -> None:
    async with pair() as (owner, client):
        await owner.put(BASE, key="a")
        async with client.borrow("a"):
            waiting = Cancellable("native", lambda: client.get("b", timeout=20))
            await sought(owner, 1)
            await client.aclose()
            await steps(20)
            ended = waiting.done
            waiting.cancel()
            await waiting.wait()
    assert ended


async def test_what_a_client_awaits_when_it_is_closed_says_that_it_was_closed() -> None:
    assert await said_when_closed() is CacheClosed


async def said_when_closed() -> type | None:
    async with pair() as (owner, client):
        waiting = Cancellable("native", lambda: client.get("a", timeout=20))
        await sought(owner, 1)
        await client.aclose()
        await waiting.wait()
        kind, waiting.error = type(waiting.error), None
    return kind


async def test_a_client_closes_at_any_moment_of_a_lookup(no_leaks: None) -> None:
    async with pair() as (owner, _):
        for turns in range(10):
            await owner.put(BASE, key="a")
            client = await featcache.connect(owner.endpoint).open()
            tasks = [asyncio.create_task(call()) for call in calls_by_key(client)]
            await steps(turns)
            await client.aclose()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, BaseException):
                    assert isinstance(result, CacheClosed | OwnerLost)
            del tasks, result
            await until(lambda: owner.statistics().sessions == 1)
            await nothing_lost(owner)


async def test_calls_before_opening_and_after_closing() -> None:
    owner = featcache.create(settings=small())
    users: list[User] = [owner]
    async with owner:
        client = featcache.connect(owner.endpoint)
        await refuses_all(client)
        async with client:
            await client.put(BASE, key="a")
        await refuses_all(client)
        users.append(client)
    for user in users:
        await refuses_all(user)


async def refuses_all(user: User, error: type[Exception] = CacheClosed) -> None:
    calls: list[Call] = [
        *calls_by_key(user),
        lambda: user.contains("a"),
        lambda: user.evict("a"),
        lambda: user.pin("a"),
        lambda: user.unpin("a"),
        lambda: user.put(BASE, key="a"),
    ]
    for call in calls:
        with pytest.raises(error):
            await call()


async def test_a_dismissed_sessions_grants_come_back() -> None:
    async with pair() as (owner, _):
        await owner.put(BASE, key="a")
        other = await featcache.connect(owner.endpoint).open()
        borrow = other.borrow("a")
        await borrow.__aenter__()
        assert grants(owner) == 1
        closing = asyncio.create_task(other.aclose())
        await steps(5)
        assert grants(owner) == 1, "it reads on: its goodbye waits for that"
        await borrow.__aexit__(None, None, None)
        await closing
        await until(lambda: owner.statistics().sessions == 1)
        await nothing_lost(owner)


# --- forks ---------------------------------------------------------------------------------------


async def forking(pipe: Pipe) -> None:
    """Fork with an owner and a client open; say how the fork ended, and show that all is well here."""
    async with pair() as both:
        owner, client = both
        await client.put(BASE, key="a")
        async with client.borrow("a") as view:
            pid = os.fork()
            if pid == 0:
                asyncio.events._set_running_loop(None)  # as a fork of a loop must
                try:
                    for user in list[User](both):
                        asyncio.run(refuses_all(user))
                except BaseException:  # noqa: BLE001 - nothing of the parent's is unwound here
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - it takes a moment
            assert same(view, BASE)
        assert same(await client.get("a"), BASE)
        await nothing_lost(owner)
    pipe.say("ended", os.waitstatus_to_exitcode(status))


async def test_a_fork_has_no_keys() -> None:
    processes.warm_up()
    with processes.starting() as start:
        await start(forking).expect("ended", 0)
