"""The owner is killed: whoever waits for a key or for room is told at once, what is lent stays right."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

import featcache
from faults.agents import KEY_STEPS, feature, is_right
from faults.checks import Log, events, ours
from faults.keyed import CAPACITY, SIZE, both, case, client, host_only, owner, put
from faults.test_owner_dies import lost_at_once, slabs
from featcache import FeatureClient, FeatureRef, OwnerLost
from featcache.memory.host.slab import HostMapping
from support.processes import Child, Start, until
from support.slabs import Slab

PATIENT_S = 600.0
"""Longer than a test lives: what ends sooner ended for another reason."""


async def put_key(
    child: Child, seed: int, nbytes: int = SIZE, key: str | None = None
) -> FeatureRef:
    message, data = await child.ask("put_key", seed, nbytes, key)
    assert message == "ref"
    return FeatureRef.from_bytes(data)


async def gone(log: Log, count: int = 1) -> None:
    """Wait until this process has seen its owner's end."""
    await until(lambda: len(events(log, "owner.lost")) >= count)


async def unmapped(slab: Slab) -> None:
    """Wait for the end of the mappings, which a thread makes: of those of a GPU the driver tells not."""
    if slab.kind == "host":
        await until(lambda: slabs() == 0)


async def nothing_left(slab: Slab, before: "Counter[str]") -> None:
    """Wait until all that led to the owner is gone, though the client is open still."""
    await unmapped(slab)
    if slab.kind == "host":
        await until(lambda: ours() == before)


def waiting(connection: FeatureClient) -> int:
    """How many requests are unanswered."""
    return sum(
        len(handle.link.requests._unanswered)
        for handle in connection._opened().registry.connections
    )


Uses = dict[str, Callable[[FeatureClient], Awaitable[object]]]


def uses(slab: Slab) -> Uses:
    """Each of the ways to ask by key, or for room."""
    value = feature(1, SIZE).to(slab.device)

    async def borrowing(connection: FeatureClient, key: str) -> None:
        async with connection.borrow(key, timeout=PATIENT_S):
            pass

    return {
        "get": lambda it: it.get("k"),
        "get that waits": lambda it: it.get("k", timeout=PATIENT_S),
        "borrow": lambda it: borrowing(it, "k"),
        "get_or_put": lambda it: it.get_or_put("k", lambda: value),
        "contains": lambda it: it.contains("k"),
        "evict": lambda it: it.evict("k"),
        "pin": lambda it: it.pin("k"),
        "unpin": lambda it: it.unpin("k"),
        "put": lambda it: it.put(value),
        "put by key": lambda it: it.put(value, key="k"),
        "put at once": lambda it: it.put(value, on_full="raise"),
    }


async def test_killed_idle(start: Start, log: Log, slab: Slab) -> None:
    """Everything that is asked afterwards is refused at once."""
    child, endpoint = await owner(start, slab)
    await put_key(child, 1, key="k")
    async with featcache.connect(endpoint, settings=slab.settings()) as connection:
        assert is_right(await connection.get("k"), 1)
        await put(connection, slab, 2, key="m")  # it can write, too
        await connection.pin("m")
        child.kill()
        await gone(log)
        await unmapped(slab)
        for use in uses(slab).values():
            assert endpoint in await lost_at_once(use(connection))
        now = connection.statistics()
        assert (now.sessions, now.keys, now.resident_bytes, now.puts) == (0, 0, 0, 1)


async def test_killed_while_all_wait(start: Start, log: Log, slab: Slab) -> None:
    """For a key, for what another makes, for room in the queue: in two processes."""
    child, endpoint = await owner(start, slab)
    await put_key(child, 1, CAPACITY)
    other = await client(start, slab, endpoint)
    async with featcache.connect(endpoint, settings=slab.settings()) as connection:
        other.tell("begin", "made", "get_or_put", "made", 1, SIZE)
        assert await both(other) == [("begun",), ("making", "made")]
        waits = {
            "key": other.ask("begin", "key", "get_key", "absent", 1, PATIENT_S),
            "room": other.ask("begin", "room", "put_key", 1, SIZE, "k"),
        }
        for wait in waits.values():
            assert await wait == ("begun",)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(connection.get("absent", timeout=PATIENT_S)),
            asyncio.create_task(connection.get_or_put("made", lambda: torch.zeros(1))),
            asyncio.create_task(put(connection, slab, 2, key="k")),
            asyncio.create_task(put(connection, slab, 3, timeout=PATIENT_S)),
        ]
        await until(lambda: waiting(connection) == len(tasks))
        child.kill()
        for task in tasks:
            await lost_at_once(task)
        heard = [await other.hear() for _ in waits]
        assert sorted(heard) == [(name, "raised", "OwnerLost") for name in sorted(waits)]
        other.tell("order", "made", "make")  # made, and nowhere to put it
        heard = await both(other)
        assert heard == [("made", "raised", "OwnerLost"), ("ordered",)]
        await unmapped(slab)


@host_only
@pytest.mark.usefixtures("no_key_table")
@pytest.mark.parametrize("use", list(uses(Slab("host"))))
async def test_killed_while_it_is_asked(start: Start, log: Log, use: str, slab: Slab) -> None:
    """It has the request, and never answers."""
    by_key = use not in {"put", "put by key", "put at once"}
    stop = "finding" if by_key else "reserving"
    if use in {"contains", "evict", "pin", "unpin"}:
        stop = "of key"
    child, endpoint = await owner(start, slab, stop=stop)
    async with featcache.connect(endpoint, settings=slab.settings()) as connection:
        task = asyncio.ensure_future(uses(slab)[use](connection))
        await child.expect("at", stop)
        child.kill()
        await lost_at_once(task)
        await unmapped(slab)


async def test_killed_with_what_was_asked_in_the_socket(start: Start, log: Log, slab: Slab) -> None:
    """The answers came, and the death, before anybody looked: what was granted may still be read."""
    child, endpoint = await owner(start, slab)
    await put_key(child, 1, key="k")
    async with featcache.connect(endpoint, settings=slab.settings()) as connection:
        task = asyncio.create_task(connection.get("k"))
        await asyncio.sleep(0)  # it has asked
        child.tell("contains", "k")
        assert child.hear_now() == ("contains", True)  # its loop has turned, this one's has not
        child.kill()
        with contextlib.suppress(OwnerLost):
            assert is_right(await task, 1)
        await gone(log)
        await unmapped(slab)


# --- what is lent ---------------------------------------------------------------------------------


async def test_killed_in_borrows_by_key(start: Start, log: Log, slab: Slab) -> None:
    """The bytes stay, and stay right, until the last block ends; then nothing is left."""
    child, endpoint = await owner(start, slab)
    for seed, key in enumerate("ab"):
        await put_key(child, seed, key=key)
    before = ours()
    async with featcache.connect(endpoint, settings=slab.settings()) as connection:
        async with connection.borrow("a") as first:
            async with connection.borrow("b") as second, connection.borrow("b") as again:
                child.kill()
                await gone(log)
                assert is_right(second, 1)
                assert is_right(again, 1)
            assert is_right(first, 0)
            if slab.kind == "host":
                assert slabs() == 1
            await lost_at_once(connection.get("a"))
            assert is_right(first, 0)
        assert not is_right(first, 0), "a view is empty after its borrow"
        await nothing_left(slab, before)


async def test_killed_and_the_client_closed_in_its_borrow(
    start: Start, log: Log, slab: Slab
) -> None:
    child, endpoint = await owner(start, slab)
    await put_key(child, 1, key="k")
    before = ours()
    connection = await featcache.connect(endpoint, settings=slab.settings()).open()
    async with connection.borrow("k") as view:
        child.kill()
        await connection.aclose()  # before the loop has seen that the owner is gone
        assert is_right(view, 1)
    await nothing_left(slab, before)


async def test_killed_and_another_process_reads_on(start: Start, log: Log, slab: Slab) -> None:
    child, endpoint = await owner(start, slab)
    await put_key(child, 1, key="k")
    other = await client(start, slab, endpoint)
    assert await other.ask("borrow_key", "k", 1) == ("right",)
    child.kill()
    assert await other.ask("get_key", "k", 1) == ("raised", "OwnerLost")
    assert await other.ask("look", 1) == ("right",)
    assert await other.ask("leave") == ("left",)
    other.tell("end")
    await other.ends()


@host_only  # whose steps those are
@pytest.mark.parametrize("step", ["found", "leased", "copying", "ending"])
async def test_killed_at_a_step_of_a_clients_read(
    start: Start, log: Log, slab: Slab, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was leased is read, and right."""
    child, endpoint = await owner(start, slab)
    await put_key(child, 1, key="k")
    before = ours()
    target, attribute, _ = KEY_STEPS[step]
    original = getattr(target, attribute)

    def killing(*arguments: Any, **names: Any) -> Any:
        child.kill()
        return original(*arguments, **names)

    monkeypatch.setattr(target, attribute, killing)
    async with featcache.connect(endpoint, settings=slab.settings()) as connection:
        assert is_right(await connection.get("k"), 1)
        await gone(log)
        await nothing_left(slab, before)


# --- puts -----------------------------------------------------------------------------------------


def slow_writes(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Hold up what copies into a host slab; return what tells of it, and what lets it go on."""
    copying, go_on = threading.Event(), threading.Event()
    write = HostMapping.write

    def slow(*arguments: Any) -> None:
        copying.set()
        assert go_on.wait(20.0)
        write(*arguments)

    monkeypatch.setattr(HostMapping, "write", slow)
    return copying, go_on


@host_only
async def test_killed_while_a_thread_copies_into_its_slab(
    start: Start, log: Log, slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mapping stays until the copy is done; then the put says that the owner is gone."""
    child, endpoint = await owner(start, slab)
    copying, go_on = slow_writes(monkeypatch)
    settings = slab.settings(inline_bytes=0)
    async with featcache.connect(endpoint, settings=settings) as connection:
        task = asyncio.create_task(put(connection, slab, 1, key="k"))
        await until(copying.is_set)
        child.kill()
        await gone(log)
        assert slabs() == 2, "one to read, one to write"
        assert not task.done()
        go_on.set()
        await lost_at_once(task)
        assert connection.statistics().puts == 0
        await unmapped(slab)


@host_only
async def test_killed_while_the_put_that_it_copies_is_cancelled(
    start: Start, log: Log, slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody awaits the thread any more: the mapping goes when it is done, all the same."""
    child, endpoint = await owner(start, slab)
    copying, go_on = slow_writes(monkeypatch)
    settings = slab.settings(inline_bytes=0)
    async with featcache.connect(endpoint, settings=settings) as connection:
        task = asyncio.create_task(put(connection, slab, 1, key="k"))
        await until(copying.is_set)
        task.cancel()
        child.kill()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone(log)
        assert slabs() == 2
        go_on.set()
        await unmapped(slab)


@pytest.mark.parametrize(
    ("slab", "stop"),
    [
        case("host", "reserving", name="reserving"),
        case("host", "admitting", name="admitting"),
        case("vmm", "admitting", name="admitting"),
    ],
    indirect=["slab"],
)
async def test_killed_at_a_step_of_a_clients_put(
    start: Start, log: Log, slab: Slab, stop: str
) -> None:
    child, endpoint = await owner(start, slab, stop=stop)
    async with featcache.connect(endpoint, settings=slab.settings()) as connection:
        task = asyncio.create_task(put(connection, slab, 1, key="k"))
        await child.expect("at", stop)
        child.kill()
        await lost_at_once(task)
        await unmapped(slab)


# --- single flight --------------------------------------------------------------------------------


async def test_killed_while_one_makes(start: Start, log: Log, slab: Slab) -> None:
    """The maker's `make` runs to its end; what it gets is the error of its put. Who waits, too."""
    child, endpoint = await owner(start, slab)
    begun, go_on, made = asyncio.Event(), asyncio.Event(), 0

    async def make() -> torch.Tensor:
        nonlocal made
        begun.set()
        await go_on.wait()
        made += 1
        return feature(1, SIZE).to(slab.device)

    settings = slab.settings()
    async with (
        featcache.connect(endpoint, settings=settings) as connection,
        featcache.connect(endpoint, settings=settings) as other,
    ):
        making = asyncio.create_task(connection.get_or_put("k", make))
        await begun.wait()
        waits = asyncio.create_task(other.get_or_put("k", make))
        child.tell("begin", "owner", "get_or_put", "k", 1, SIZE)
        await child.expect("begun")
        await until(lambda: waiting(other) == 1)
        child.kill()
        await lost_at_once(waits)
        await gone(log, 2)
        assert not making.done()
        go_on.set()
        await lost_at_once(making)
        assert made == 1
        await unmapped(slab)


async def test_killed_as_the_one_who_makes(start: Start, log: Log, slab: Slab) -> None:
    """Nobody can make it instead: with the owner went the directory."""
    child, endpoint = await owner(start, slab)
    child.tell("begin", "k", "get_or_put", "k", 1, SIZE)
    assert await both(child) == [("begun",), ("making", "k")]
    calls = 0

    def make() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros(1)

    async with featcache.connect(endpoint, settings=slab.settings()) as connection:
        task = asyncio.create_task(connection.get_or_put("k", make))
        await until(lambda: waiting(connection) == 1)
        child.kill()
        await lost_at_once(task)
        assert calls == 0
