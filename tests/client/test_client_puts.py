"""Clients put: into the owner's slab, in one queue with everybody else, with their own hands."""

import asyncio
import functools
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

import featcache
from api.test_put_get import BASE, COMPLEX, PLAIN, SHAPES, pattern
from featcache import (
    AttachRefused,
    CacheClosed,
    FeatcacheError,
    FeatureCache,
    FeatureClient,
    FeatureRef,
    FeatureTooLarge,
    OwnerLost,
    PoolFull,
    PutTimeout,
    SettingsError,
    StaleRef,
)
from featcache.memory.host.slab import HostMapping, HostSlab
from featcache.pool.recycler import Recycler
from support.caches import (
    KIB,
    MIB,
    Gate,
    filled,
    full,
    pair,
    small,
    spent,
    steps,
    tensor,
    until,
)
from support.hosted import all_spent, relayed, serving, spilling
from support.keyed import (
    CAPACITY,
    ONE,
    Cancellable,
    User,
    in_progress,
    nothing_lost,
    page_of,
    party,
    pool_of,
    queued,
    reserved,
)
from support.slabs import Slab, at, copy_of, same, same_dict

Call = Callable[[], Coroutine[Any, Any, Any]]

# --- what goes in comes out ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")  # torch's own, once
@pytest.mark.parametrize("inline_bytes", [0, MIB], ids=["thread", "inline"])
async def test_every_dtype_and_shape(slab: Slab, inline_bytes: int) -> None:
    async with slab.pair(inline_bytes=inline_bytes) as (owner, client):
        for dtype in PLAIN:
            value = pattern(dtype, 20).view(4, 5)
            for source in (value, at(value, slab.device)):
                ref = copy_of(await client.put(source, readers=2))
                assert same(await owner.get(ref), value), dtype
                assert same(await client.get(ref), value), dtype
        for name, value in SHAPES.items():
            for source in (value, value.detach().to(slab.device)):
                ref = await client.put(source, readers=2)
                async with owner.borrow(ref) as view:
                    assert same(view, value), name
                assert same(await client.get(ref), value), name
        now = owner.statistics()
        assert now.puts == client.statistics().puts == 2 * (len(PLAIN) + len(SHAPES))
        await spent(owner)


async def test_a_dict_from_several_places(slab: Slab) -> None:
    feature = {
        "pixel_values": BASE.view(24, 30).to(slab.device).T,
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "scale": torch.tensor(0.5, dtype=torch.bfloat16),
        "nothing": torch.empty(0, 5, device=slab.device),
        "conj": COMPLEX.conj(),
    }
    async with slab.pair() as (owner, client):
        ref = copy_of(await client.put(feature, readers=2))
        assert owner.statistics().slots_used == 1
        for user in (owner, client):
            assert same_dict(await user.get(ref), feature)
        await spent(owner)


async def test_sizes(slab: Slab) -> None:
    async with slab.pair() as (owner, client):
        capacity = owner.statistics().capacity_bytes
        for nbytes in (0, 1, 255, 256, 257, capacity - 1, capacity):
            value = filled(nbytes, nbytes % 251)
            assert same(await owner.get(await client.put(value)), value)
            await spent(owner)
        for on_full in ("wait", "raise"):
            with pytest.raises(FeatureTooLarge, match="capacity"):
                await client.put(filled(capacity + 1), on_full=on_full)
        assert reserved(owner) == 0
        await spent(owner)


async def test_its_own_is_read_by_a_client_as_any_other() -> None:
    async with pair() as (owner, client):
        source = filled(4096, 1)
        ref = await client.put(source)
        source.fill_(9)
        mine = tensor(await client.get(ref))
        mine.fill_(5)
        with pytest.raises(StaleRef, match="paid"):
            await client.get(ref)
        await spent(owner)
        ref = await client.put(filled(4096, 7))  # into the same bytes
        assert torch.equal(mine, filled(4096, 5))
        async with client.borrow(ref) as view:
            assert torch.equal(tensor(view), filled(4096, 7))
        await spent(owner)


async def test_a_large_one_is_copied_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    async with pair(inline_bytes=KIB) as (owner, client):
        monkeypatch.setattr(HostMapping, "write", gate.wrap(HostMapping.write))
        task = asyncio.create_task(client.put(filled(2 * KIB, 3)))
        await until(gate.entered.is_set)
        await steps(20)  # the loop goes on
        assert not task.done()
        assert reserved(owner) == 1
        gate.open()
        assert same(await owner.get(await task), filled(2 * KIB, 3))
        await spent(owner)


async def test_many_puts_at_once_open_the_slab_for_writing_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = []
    open_for_writing = HostMapping.open_for_writing

    def counted(self: HostMapping, fds: list[int]) -> None:
        opened.append(self)
        open_for_writing(self, fds)

    monkeypatch.setattr(HostMapping, "open_for_writing", counted)
    async with party(2) as (owner, clients):
        refs = await asyncio.gather(
            *(client.put(filled(KIB, n)) for n, client in enumerate(clients * 10))
        )
        assert len(opened) == 2
        assert len({ref.offset_bytes for ref in refs}) == 20
        for number, ref in enumerate(refs):
            assert same(await clients[number % 2].get(ref), filled(KIB, number))
        await spent(owner)
    opened.clear()


async def test_who_only_reads_never_maps_it_for_writing() -> None:
    async with pair() as (owner, client):
        await client.get(await owner.put(BASE))
        await owner.put(BASE, key="a")
        await client.get("a")
        (handle,) = client._opened().registry.connections
        assert not handle.attachment.mapping.writable
        await nothing_lost(owner)


@pytest.mark.parametrize("first", [True, False], ids=["at the first put", "at a later one"])
async def test_what_it_borrows_stays_read_only(first: bool) -> None:
    """A put opens another mapping for itself: the one that views are lent from is as it was."""
    async with pair() as (owner, client):
        if not first:
            await client.release(await client.put(BASE))
        ref = await client.put(BASE)
        async with client.borrow(ref) as view:
            where = tensor(view).data_ptr()
            with open("/proc/self/maps") as maps:  # noqa: ASYNC230, PTH123 - of the kernel's
                lines = [line.split() for line in maps]
            spans = [([int(at, 16) for at in line[0].split("-")], line[1]) for line in lines]
            (access,) = [how for (start, stop), how in spans if start <= where < stop]
            assert access == "r--s"
        await spent(owner)


# --- the arguments -------------------------------------------------------------------------------


async def test_counts_and_names_of_readers() -> None:
    async with pair(name="tp0") as (owner, client):
        with capture_logs():
            async with featcache.connect(owner.endpoint, name="tp1") as other:
                ref = await client.put(BASE, readers=["tp0", "tp1"])
                await owner.get(ref)  # owes none
                assert owner.statistics().slots_used == 1
                await client.get(ref)
                await other.get(ref)
                await spent(owner)
                ref = await client.put(BASE, readers=3)
                for user in (owner, client, other):
                    assert owner.statistics().slots_used == 1
                    await user.release(ref)
                await spent(owner)


async def test_arguments_that_make_no_sense() -> None:
    async with pair(readers=4) as (owner, client):
        wrongs: list[dict[str, Any]] = [
            {"readers": 0},
            {"readers": 5},
            {"readers": -1},
            {"readers": 1.5},
            {"readers": []},
            {"readers": ["a", "a"]},
            {"readers": "tp0"},
            {"readers": ["n" * 257]},
            {"readers": [3]},
            {"readers": ["a", "b", "c", "d", "e"]},
            {"ttl": 0},
            {"ttl": -1.0},
            {"ttl": "soon"},
            {"timeout": -1},
            {"timeout": "long"},
            {"key": ""},
            {"key": 5},
            {"on_full": "panic"},
            {"on_full": "spill"},
            {"on_full": "spill", "key": "a"},
        ]
        for wrong in wrongs:
            with pytest.raises(SettingsError):
                await client.put(BASE, **wrong)
        values: list[Any] = [None, [1.0], {}, {"a": 1}, BASE.to_sparse(), {"n" * 257: BASE}]
        for value in values:
            with pytest.raises(SettingsError):
                await client.put(value)
        assert reserved(owner) == 0
        await spent(owner)


async def test_bounds_of_the_owners_hold_for_clients_with_others() -> None:
    """A client with larger settings of its own is told what the owner's are."""
    async with (
        featcache.create(settings=small(readers=2, tensors=2)) as owner,
        featcache.connect(owner.endpoint, settings=small()) as client,
    ):
        with pytest.raises(SettingsError, match="readers=3"):
            await client.put(BASE, readers=3)
        with pytest.raises(FeatcacheError, match="at most 2"):
            await client.put({"a": BASE, "b": BASE, "c": BASE})
        await until(lambda: not reserved(owner))
        await spent(owner)


async def test_what_is_too_long_for_a_message_gives_its_room_back() -> None:
    feature = {"n" * 200 + f"{n}": torch.empty(0) for n in range(8)}
    async with pair(message_bytes=1024) as (owner, client):
        with pytest.raises(SettingsError, match="message_bytes"):
            await client.put(feature)
        with pytest.raises(SettingsError, match="message_bytes"):
            await client.put(BASE, readers=["n" * 200 + f"{n}" for n in range(8)])
        await until(lambda: not reserved(owner))
        await spent(owner)


async def test_the_ttl_of_a_clients_put() -> None:
    async with pair() as (owner, client):
        ref = await client.put(BASE, ttl=0.01)
        stays = await client.put(BASE, ttl=None)
        await until(lambda: owner.statistics().expired == 1)
        with pytest.raises(StaleRef):
            await client.get(ref)
        assert same(await client.get(stays), BASE)
        await spent(owner)
        async with featcache.connect(owner.endpoint, settings=small(ttl=0.01)) as hasty:
            await hasty.put(BASE)  # the ttl is as in its own settings
        await until(lambda: owner.statistics().expired == 2)
        await spent(owner)


@pytest.mark.parametrize("who", ["owner", "client", "another client"])
async def test_discard_of_a_clients_put(who: str) -> None:
    async with party(2) as (owner, (client, other)):
        users: list[User] = [owner, client, other]
        user = users[["owner", "client", "another client"].index(who)]
        ref = await client.put(BASE, readers=3)
        await user.discard(ref)
        for each in users:
            with pytest.raises(StaleRef):
                await each.get(ref)
        with pytest.raises(StaleRef):
            await user.discard(ref)
        await spent(owner)


# --- room ----------------------------------------------------------------------------------------


async def test_full() -> None:
    async with pair(**ONE) as (owner, client):
        first = await client.put(filled(CAPACITY))
        with pytest.raises(PoolFull, match="0 of 65536 bytes are free"):
            await client.put(filled(1), on_full="raise")
        for timeout in (0, 0.02):
            with pytest.raises(PutTimeout, match=f"{timeout}"):
                await client.put(filled(1), timeout=timeout)
            await until(lambda: not in_progress(owner))
            assert owner.statistics().waiters == 0
        waiting = asyncio.create_task(client.put(filled(CAPACITY, 2)))
        await queued(owner, 1)
        await until(lambda: client.statistics().waiting_bytes == CAPACITY)
        await owner.release(first)
        assert same(await client.get(await waiting), filled(CAPACITY, 2))
        await spent(owner)


async def test_a_timeout_of_nothing_takes_the_room_that_there_is() -> None:
    """From a client that writes to the slab and from one that goes through the host."""
    for made in (pair(**ONE), relayed(**ONE)):
        async with made as (owner, client):
            for _ in range(2):
                ref = await client.put(filled(CAPACITY, 3), timeout=0)
                with pytest.raises(PutTimeout):
                    await client.put(filled(1), timeout=0)
                assert same(await owner.get(ref), filled(CAPACITY, 3))
                await all_spent(owner)


@pytest.mark.parametrize("reader", ["owner", "the writer", "another"])
async def test_only_the_ring_wakes_a_clients_put(
    reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no timer that fires in this test's life, the release itself must wake it."""
    monkeypatch.setattr(Recycler, "set_busy", lambda self, waiting: None)
    async with party(2, recycle_interval=60.0, **ONE) as (owner, (client, other)):
        users: list[User] = [owner, client, other]
        payer = users[["owner", "the writer", "another"].index(reader)]
        ref = await client.put(filled(CAPACITY))
        for pay in ("release", "get", "borrow", "discard"):
            task = asyncio.create_task(client.put(filled(CAPACITY)))
            await queued(owner, 1)
            if pay == "borrow":
                async with payer.borrow(ref):
                    assert not task.done()
            else:
                await getattr(payer, pay)(ref)
            ref = await task


async def test_one_queue_for_all() -> None:
    """Puts of the owner and of all clients are served exactly as they came, whatever their sizes."""
    async with party(3, **ONE) as (owner, clients):
        users: list[User] = [owner, *clients]
        first = await full(owner)
        served: list[int] = []

        async def put(user: User, number: int) -> None:
            size = CAPACITY if number % 3 else 1
            ref = await user.put(filled(size, number), readers=1)
            served.append(number)
            found = tensor(await users[(number + 1) % 4].get(ref))
            assert found[0] == number

        tasks = []
        for number in range(24):
            user = users[number * 7 % 4 if number % 2 else number % 4]
            tasks.append(asyncio.create_task(put(user, number)))
            await queued(owner, number + 1)
        await owner.release(first)
        await asyncio.gather(*tasks)
        # A small one is served with the one before it if both fit: then who hears of it first is open.
        order = [number for number in served if number % 3]
        assert order == sorted(order)
        assert sorted(served) == list(range(24))
        await spent(owner)


async def test_served_in_the_order_of_the_queue() -> None:
    """Each fills the slab alone, so one is served at a time: in the very order in which they came."""
    async with party(3, **ONE) as (owner, clients):
        users: list[User] = [owner, *clients]
        first = await full(owner)
        tasks = []
        for number in range(16):
            user = users[number * 3 % 4]
            tasks.append(asyncio.create_task(user.put(filled(CAPACITY, number))))
            await queued(owner, number + 1)
        ref = first
        for number, task in enumerate(tasks):
            await owner.release(ref)
            ref = await task
            assert owner.statistics().waiters == 15 - number
            assert not any(later.done() for later in tasks[number + 1 :])
        await owner.release(ref)
        await spent(owner)


async def test_a_small_put_of_one_does_not_overtake_a_large_one_of_another() -> None:
    async with party(2, **ONE) as (owner, (one, two)):
        half = await owner.put(filled(CAPACITY // 2))
        large = asyncio.create_task(one.put(filled(CAPACITY)))
        await queued(owner, 1)
        little = asyncio.create_task(two.put(filled(1)))
        await queued(owner, 2)
        for user in (owner, one, two):
            with pytest.raises(PoolFull, match="2 puts wait"):
                await user.put(filled(1), on_full="raise")
        await two.release(half)
        await owner.release(await large)
        await owner.release(await little)
        await spent(owner)


async def test_the_queue_has_a_bound_for_all_together() -> None:
    async with party(2, waiters=2, **ONE) as (owner, (one, two)):
        first = await full(owner)
        users: list[User] = [owner, one]
        tasks = []
        for number, user in enumerate(users, 1):
            tasks.append(asyncio.create_task(user.put(filled(1))))
            await queued(owner, number)
        for user in (owner, one, two):
            with pytest.raises(PoolFull, match="waiters"):
                await user.put(filled(1))
        await owner.release(first)
        for ref in await asyncio.gather(*tasks):
            await owner.release(ref)
        await spent(owner)


async def test_the_slab_grows_for_a_clients_put(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    async with pair(capacity=4 * CAPACITY, segment=CAPACITY) as (owner, client):
        monkeypatch.setattr(HostSlab, "commit", gate.wrap(HostSlab.commit))
        task = asyncio.create_task(client.put(filled(3 * CAPACITY, 5)))
        await until(gate.entered.is_set)
        await steps(5)
        assert not task.done()
        gate.open()
        ref = await task
        assert owner.statistics().committed_bytes == 3 * CAPACITY
        assert same(await client.get(ref), filled(3 * CAPACITY, 5))
        # One that does not wait grows the slab at once.
        await client.put(filled(4 * CAPACITY), on_full="raise")
        assert owner.statistics().committed_bytes == 4 * CAPACITY


async def test_room_that_was_paid_for_is_found_without_waiting() -> None:
    async with pair(recycle_interval=60.0, **ONE) as (owner, client):
        for _ in range(3):
            await owner.release(await client.put(filled(CAPACITY)))
            await client.release(await client.put(filled(CAPACITY), on_full="raise"))
            await client.release(owner.put_nowait(filled(CAPACITY)))
        assert owner.statistics().waited == 0


# --- spilling ------------------------------------------------------------------------------------


async def test_a_clients_put_spills(no_leaks: None) -> None:
    async with spilling(spill=2 * CAPACITY, **ONE) as (owner, client):
        here = await client.put(filled(CAPACITY, 1), on_full="spill")
        assert here.pool_id == pool_of(owner).pool_id
        there = await client.put(filled(CAPACITY, 2), on_full="spill")
        assert there.pool_id == serving(owner).pool.pool_id
        assert (client.statistics().spilled, client.statistics().puts) == (1, 2)
        waiting = asyncio.create_task(client.put(filled(2 * CAPACITY, 3), on_full="spill"))
        await until(lambda: bool(serving(owner).pool.store.queue))
        for ref, value in ((here, 1), (there, 2)):
            assert same(await owner.get(copy_of(ref)), filled(CAPACITY, value))
        ref = await waiting  # too large for the slab, it waited for the host's
        assert same(await client.get(ref), filled(2 * CAPACITY, 3))
        with pytest.raises(SettingsError, match="key"):
            await client.put(filled(1), on_full="spill", key="a")
        with pytest.raises(FeatureTooLarge):
            await client.put(filled(2 * CAPACITY + 1), on_full="spill")
        await all_spent(owner)


async def test_a_client_that_always_spills() -> None:
    async with (
        featcache.create(spill=CAPACITY, settings=small()) as owner,
        featcache.connect(owner.endpoint, settings=small(spill_always=True)) as client,
    ):
        ref = await client.put(BASE, on_full="spill")
        assert ref.pool_id == serving(owner).pool.pool_id
        assert same(await owner.get(ref), BASE)
        await all_spent(owner)


# --- giving up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_cancelled_at_any_moment(kind: str, no_leaks: None) -> None:
    """Asking, given its room, copying, telling, done: no room is lost, and the next is served."""
    late = set()
    async with pair(**ONE) as (owner, inline):
        copying = await writer_at(owner, inline_bytes=0)  # in a thread
        for turns, client in itertools.product(range(18), (inline, copying)):
            other = copying if client is inline else inline
            doomed = Cancellable(kind, functools.partial(client.put, filled(CAPACITY, 1)))
            await steps(turns)
            doomed.cancel()
            await doomed.wait()
            assert doomed.error is None
            late.add(doomed.result is not None)
            if doomed.result is not None:
                await owner.release(doomed.result)
            ref = await other.put(filled(CAPACITY, 2), timeout=20)
            assert same(await owner.get(ref), filled(CAPACITY, 2))
            await nothing_lost(owner)
        await copying.aclose()
    assert late == {False, True}


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_cancelled_at_any_moment_after_room_was_made(kind: str) -> None:
    async with pair(**ONE) as (owner, inline):
        copying = await writer_at(owner, inline_bytes=0)  # in a thread
        for turns, client in itertools.product(range(14), (inline, copying)):
            other = copying if client is inline else inline
            first = await full(owner)
            doomed = Cancellable(kind, functools.partial(client.put, filled(CAPACITY, 1)))
            await queued(owner, 1)
            behind = asyncio.create_task(other.put(filled(CAPACITY, 2)))
            await queued(owner, 2)
            await owner.release(first)
            await steps(turns)
            doomed.cancel()
            await doomed.wait()
            assert doomed.error is None
            if doomed.result is not None:
                await owner.release(doomed.result)
            assert same(await owner.get(await behind), filled(CAPACITY, 2))
            await nothing_lost(owner)
        await copying.aclose()


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_cancelled_while_it_waits_it_loses_only_its_own_place(kind: str) -> None:
    async with party(2, **ONE) as (owner, (client, other)):
        half = await owner.put(filled(CAPACITY // 2))
        large = Cancellable(kind, lambda: client.put(filled(CAPACITY)))
        await queued(owner, 1)
        little = asyncio.create_task(other.put(filled(1)))
        await queued(owner, 2)
        large.cancel()
        await large.wait()
        await owner.release(
            await little
        )  # it fitted all the time: only the large one stood before it
        await owner.release(half)
        await nothing_lost(owner)


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_cancelled_while_its_thread_copies(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread still writes there: the room is nobody's until it is done."""
    gate = Gate()
    async with party(2, inline_bytes=0, **ONE) as (owner, (client, other)):
        with monkeypatch.context() as patch:
            patch.setattr(HostMapping, "write", gate.wrap(HostMapping.write))
            doomed = Cancellable(kind, lambda: client.put(filled(CAPACITY, 1)))
            await until(gate.entered.is_set)
            doomed.cancel()
            await doomed.wait()
        assert doomed.result is None
        behind = asyncio.create_task(other.put(filled(CAPACITY, 7)))
        await queued(owner, 1)
        await steps(10)
        assert not behind.done()
        gate.open()
        assert same(await owner.get(await behind), filled(CAPACITY, 7))
        await nothing_lost(owner)


@pytest.mark.parametrize("kind", ["native", "anyio"])
async def test_the_first_put_is_cancelled_while_it_opens_the_slab_for_writing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others that wait for the same opening go on."""
    gate = Gate()
    async with pair() as (owner, client):
        monkeypatch.setattr(
            HostMapping, "open_for_writing", gate.wrap(HostMapping.open_for_writing)
        )
        doomed = Cancellable(kind, lambda: client.put(filled(KIB, 1)))
        await until(gate.entered.is_set)
        other = asyncio.create_task(client.put(filled(KIB, 2)))
        doomed.cancel()
        await doomed.wait()
        gate.open()
        assert same(await owner.get(await other), filled(KIB, 2))
        assert doomed.result is None
        await nothing_lost(owner)


@pytest.mark.parametrize("inline_bytes", [0, CAPACITY], ids=["thread", "inline"])
async def test_a_copy_that_fails_gives_its_room_back(
    inline_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    async with pair(inline_bytes=inline_bytes, **ONE) as (owner, client):
        with monkeypatch.context() as patch:
            patch.setattr(HostMapping, "write", fails)
            with pytest.raises(ZeroDivisionError):
                await client.put(filled(CAPACITY))
        await owner.release(await client.put(filled(CAPACITY)))
        await nothing_lost(owner)


async def test_an_opening_for_writing_that_fails_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise AttachRefused("not now")

    async with pair() as (owner, client):
        with monkeypatch.context() as patch:
            patch.setattr(HostMapping, "open_for_writing", fails)
            results = await asyncio.gather(
                *(client.put(BASE) for _ in range(3)), return_exceptions=True
            )
            assert [type(result) for result in results] == [AttachRefused] * 3
            del results
        assert same(await owner.get(await client.put(BASE)), BASE)
        await nothing_lost(owner)


# --- ends ----------------------------------------------------------------------------------------


async def ended(tasks: "list[asyncio.Task[Any]]") -> set[type]:
    """How calls ended; nothing is kept of what they raised."""
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return {type(result) for result in results}


async def test_the_client_closes_while_its_put_waits(no_leaks: None) -> None:
    async with party(2, **ONE) as (owner, (leaving, other)):
        first = await full(owner)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(leaving.put(filled(CAPACITY))) for _ in range(3)
        ]
        await queued(owner, 3)
        behind = asyncio.create_task(other.put(filled(CAPACITY, 2)))
        await queued(owner, 4)
        await leaving.aclose()
        assert await ended(tasks) <= {CacheClosed, OwnerLost}
        await queued(owner, 1)
        await owner.release(first)
        assert same(await owner.get(await behind), filled(CAPACITY, 2))
        await nothing_lost(owner)


async def test_the_client_closes_at_any_moment_of_a_put(no_leaks: None) -> None:
    async with pair(**ONE) as (owner, other):
        for turns, inline_bytes in itertools.product(range(10), (0, CAPACITY)):
            leaving = await writer_at(owner, inline_bytes=inline_bytes)
            first = await full(owner)
            tasks: list[asyncio.Task[Any]] = [
                asyncio.create_task(leaving.put(filled(CAPACITY, 1), ttl=None))
            ]
            await queued(owner, 1)
            behind = asyncio.create_task(other.put(filled(CAPACITY, 2)))
            await queued(owner, 2)
            await owner.release(first)
            await steps(turns)
            await leaving.aclose()
            assert await ended(tasks) <= {CacheClosed, OwnerLost, FeatureRef}
            await until(lambda: owner.statistics().sessions == 1)
            if owner.statistics().waiters:  # it was published all the same
                (slot,) = pool_of(owner).store.owing.values()
                await owner.discard(ref_of(owner, slot))
            await owner.release(await behind)
            await nothing_lost(owner)


async def test_a_client_that_said_goodbye_does_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner gave it room as it left: by the time it hears of that the room is another's."""
    assert await writes_after_goodbye(monkeypatch) == []


async def writes_after_goodbye(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After how many turns of the loop a client wrote to the slab whose session had ended."""
    wrote, write = list[int](), HostMapping.write
    async with pair(**ONE) as (owner, _):
        for turns in range(4):
            leaving = await writer_at(owner)

            def watched(self: HostMapping, *arguments: Any) -> None:
                if owner.statistics().sessions < 2:
                    wrote.append(turns)  # noqa: B023 - called in this turn
                write(self, *arguments)

            first = await full(owner)
            tasks: list[asyncio.Task[Any]] = [asyncio.create_task(leaving.put(filled(CAPACITY)))]
            await queued(owner, 1)
            behind = asyncio.create_task(owner.put(filled(CAPACITY, 2)))
            await queued(owner, 2)
            with monkeypatch.context() as patch:
                patch.setattr(HostMapping, "write", watched)
                patch.setattr(HostSlab, "write", write)
                await owner.release(first)
                pool_of(owner).collect()
                await steps(turns)
                await leaving.aclose()
                await ended(tasks)
            if owner.statistics().waiters:
                (slot,) = pool_of(owner).store.owing.values()
                await owner.discard(ref_of(owner, slot))
            await owner.release(await behind)
            await nothing_lost(owner)
    return wrote


async def writer_at(owner: FeatureCache, **changes: Any) -> FeatureClient:
    """A client that has put before: its mapping is open for writing."""
    client = await featcache.connect(owner.endpoint, settings=small(**changes)).open()
    await owner.release(await client.put(filled(8)))
    await spent(owner)
    return client


def ref_of(owner: FeatureCache, slot: Any) -> FeatureRef:
    pool = pool_of(owner)
    spec = featcache.ref.TensorSpec(None, "uint8", (slot.nbytes,), 0)
    return FeatureRef(
        *(pool.pool_id, pool.endpoint, slot.index, slot.generation),
        *(slot.offset_bytes, slot.nbytes, (spec,)),
    )


async def test_the_client_closes_while_its_thread_copies(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """Its session stays until the thread is done: nobody is given the room that it writes to."""
    gate = Gate()
    async with party(2, inline_bytes=0, **ONE) as (owner, (leaving, other)):
        with monkeypatch.context() as patch:
            patch.setattr(HostMapping, "write", gate.wrap(HostMapping.write))
            tasks: list[asyncio.Task[Any]] = [asyncio.create_task(leaving.put(filled(CAPACITY, 1)))]
            await until(gate.entered.is_set)
            closing = asyncio.create_task(leaving.aclose())
        behind = asyncio.create_task(other.put(filled(CAPACITY, 2)))
        await queued(owner, 1)
        await steps(20)
        assert not behind.done()
        assert owner.statistics().used_bytes == CAPACITY
        gate.open()
        await closing
        assert await ended(tasks) <= {CacheClosed, OwnerLost, FeatureRef}
        await until(lambda: owner.statistics().sessions == 1)
        if owner.statistics().waiters:  # it was published all the same
            (slot,) = pool_of(owner).store.owing.values()
            await owner.discard(ref_of(owner, slot))
        assert same(await owner.get(await behind), filled(CAPACITY, 2))
        await nothing_lost(owner)


async def test_the_owner_closes_while_puts_wait(no_leaks: None) -> None:
    async with party(2, **ONE) as (owner, clients):
        await full(owner)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(client.put(filled(n))) for n in range(3) for client in clients
        ]
        await queued(owner, 6)
        await owner.aclose()
        assert await ended(tasks) == {OwnerLost}
        for client in clients:
            with pytest.raises(OwnerLost):
                await client.put(filled(1))


async def test_the_owner_closes_while_a_client_copies(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    gate = Gate()
    async with pair(inline_bytes=0, **ONE) as (owner, client):
        with monkeypatch.context() as patch:
            patch.setattr(HostMapping, "write", gate.wrap(HostMapping.write))
            tasks: list[asyncio.Task[Any]] = [asyncio.create_task(client.put(filled(CAPACITY)))]
            await until(gate.entered.is_set)
            await owner.aclose()
        gate.open()
        assert await ended(tasks) == {OwnerLost}


@pytest.mark.parametrize("turns", range(0, 12, 2))
async def test_the_owner_closes_at_any_moment_of_a_clients_put(turns: int) -> None:
    async with pair(**ONE) as (owner, client):
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(client.put(filled(CAPACITY // 4), key=f"{n}")) for n in range(4)
        ]
        await steps(turns)
        await owner.aclose()
        assert await ended(tasks) <= {OwnerLost, FeatureRef}


async def test_a_client_goes_on_with_what_it_was_told_to_put_when_others_leave() -> None:
    async with party(2) as (owner, (leaving, staying)):
        refs = [await leaving.put(filled(KIB, n), readers=1) for n in range(5)]
        await leaving.aclose()  # what it has put stays
        for number, ref in enumerate(refs):
            assert same(await staying.get(ref), filled(KIB, number))
        await spent(owner)


async def test_the_owner_looks_at_what_was_released_while_a_client_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair(capacity=8 * MIB, segment=8 * MIB, recycle_interval=60.0) as (owner, client):
        pool, page = pool_of(owner), page_of(owner)
        collect, given = pool.collect, list[int]()

        def collecting() -> None:
            given.append(len(page.reserved))
            collect()

        monkeypatch.setattr(pool, "collect", collecting)
        for _ in range(3):
            ref = await client.put(torch.zeros(600 * KIB, dtype=torch.uint8))
            await client.release(ref)
        assert given == [1, 1, 1]  # each after its slot was given, not before
        assert pool.store.recycled == 2  # `statistics` would look itself
        await client.put(torch.zeros(KIB, dtype=torch.uint8))
        assert given == [1, 1, 1]  # a small one brings no look nearer
