"""Work in threads: what is refused never runs, what is handed over runs once."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from featcache import BackendUnavailable, CacheClosed
from featcache.session.offload import Offload
from support.caches import Gate
from support.processes import no_threads


@pytest.fixture
def offload() -> Iterator[Offload]:
    made = Offload()
    yield made
    made.close()


async def test_work_waits_for_a_thread_that_is_there_if_no_other_can_be_started(
    offload: Offload,
) -> None:
    gate, done = Gate(), list[int]()
    first = asyncio.ensure_future(offload.run(gate.wrap(lambda: done.append(1))))
    await asyncio.to_thread(gate.entered.wait, 10)
    with no_threads():
        second = asyncio.ensure_future(offload.run(lambda: done.append(2)))
        offload.spawn(lambda: done.append(3))
        await asyncio.sleep(0)
        assert done == []
        gate.open()
        await asyncio.gather(first, second)
        await offload.drain()
    assert sorted(done) == [1, 2, 3]


async def test_refused_work_never_runs(offload: Offload) -> None:
    done = list[str]()
    with no_threads():
        for _ in range(3):
            with pytest.raises(BackendUnavailable, match="ulimit -u"):
                await offload.run(lambda: done.append("refused"))
    await offload.run(lambda: done.append("later"))
    await offload.drain()
    assert done == ["later"]


async def test_refused_work_never_runs_though_the_executor_queued_it(
    offload: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an executor without the hook by which it goes on with the threads that it has."""
    hook = ThreadPoolExecutor._adjust_thread_count
    monkeypatch.setattr(type(offload._executor), "_adjust_thread_count", hook)
    gate, done = Gate(), list[str]()
    first = asyncio.ensure_future(offload.run(gate.wrap(lambda: done.append("first"))))
    await asyncio.to_thread(gate.entered.wait, 10)
    with no_threads(), pytest.raises(BackendUnavailable):
        await offload.run(lambda: done.append("refused"))
    gate.open()
    await first
    await offload.run(lambda: done.append("later"))
    assert done == ["first", "later"]


async def test_an_end_is_made_here_if_no_thread_can_be_started(offload: Offload) -> None:
    ran_in = list[threading.Thread]()
    with no_threads():
        await offload.finish(lambda: ran_in.append(threading.current_thread()))
        offload.spawn(lambda: ran_in.append(threading.current_thread()))
        await offload.drain()
    await offload.run(lambda: None)  # runs nothing that was left behind
    assert ran_in == [threading.current_thread()] * 2


async def test_work_of_a_closed_cache_never_runs(offload: Offload) -> None:
    done = list[str]()
    offload.close()
    with pytest.raises(CacheClosed):
        await offload.run(lambda: done.append("closed"))
    with pytest.raises(CacheClosed):
        await offload.finish(lambda: done.append("closed"))
    assert done == []


async def test_a_failure_of_the_work_is_the_callers(offload: Offload) -> None:
    def fail() -> None:
        raise RuntimeError("can't start new thread")  # the work's own, not the executor's

    with pytest.raises(RuntimeError, match="new thread"):
        await offload.run(fail)
