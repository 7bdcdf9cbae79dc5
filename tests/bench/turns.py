"""How long the longest turn of an event loop lasts when much comes at once, on the host slab.

    PYTHONPATH=src python tests/bench/turns.py --rounds 2 --out tests/bench/results/turns.json
    PYTHONPATH=src python tests/bench/turns.py evict attach

Printed are, of the longest turn, the CPU time of the loop's thread, which is what is to stay under 5 ms;
and, of a task that wakes each millisecond beside each case, the longest wall time that it was late, and
that the thread was blocked: it neither ran nor waited for a processor. Other load on the machine shows in
the wall time alone, a slow machine in the CPU time too. The cases are gone through in rounds, and the
least of each figure is kept: what the work takes is in every round, what the machine adds is not.

A caller's own work counts: to make 4,000 tasks and step each once, or to cancel them, takes what the two
cases called *floor* take, with no cache at all, since asyncio runs in one turn whatever is ready. So the
two cases in which the owner's own 4,000 puts do so are to stay under their floor, which is printed beside
them, and 5 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import machine, resultfile
from featcache import FeatureCache, FeatureRef, Settings, events

LIMIT_MS = 5.0
MANY = 4000
MADE, CANCELLED = "floor: 4000 tasks are made", "floor: 4000 tasks are cancelled"
PATIENCE_S = 30.0
now = time.monotonic
Found = dict[str, dict[str, Any]]


class Loop(asyncio.SelectorEventLoop):
    """A loop that notes the CPU time of its longest turn: of all that it calls before it polls again."""

    longest_s = 0.0

    def _run_once(self) -> None:
        began_s = time.thread_time()
        super()._run_once()  # type: ignore[misc]  # not in typeshed: a turn, from poll to poll
        self.longest_s = max(self.longest_s, time.thread_time() - began_s)


class Ticker:
    """The longest turns since the last look, and how late a task was."""

    def __init__(self) -> None:
        self._wall_s = self._blocked_s = 0.0
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop), "the cases run in it"
        self._loop = loop
        self._stat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").open()  # noqa: SIM115 - as long as the loop
        self._task = asyncio.ensure_future(self._run())

    def _times(self) -> tuple[float, float]:
        """Return the seconds that the thread ran, and that it waited for a processor."""
        self._stat.seek(0)
        return time.thread_time(), int(self._stat.read().split()[1]) * 1e-9

    async def _run(self) -> None:
        while True:
            began_s, (ran_s, queued_s) = now(), self._times()
            await asyncio.sleep(0.001)
            late_s = now() - began_s - 0.001
            ran_now_s, queued_now_s = self._times()
            cpu_s = ran_now_s - ran_s
            self._wall_s = max(self._wall_s, late_s)
            self._blocked_s = max(self._blocked_s, late_s - cpu_s - (queued_now_s - queued_s))

    def take(self) -> dict[str, Any]:
        """Return what was found, and begin anew."""
        found = {
            "cpu_ms": round(self._loop.longest_s * 1e3, 2),
            "wall_ms": round(self._wall_s * 1e3, 2),
            "blocked_ms": round(max(0.0, self._blocked_s) * 1e3, 2),
            "under_5_ms": self._loop.longest_s * 1e3 < LIMIT_MS,
        }
        self._wall_s = self._blocked_s = self._loop.longest_s = 0.0
        return found

    def stop(self) -> None:
        self._task.cancel()
        self._stat.close()


class Case:
    """An open pool and its ticker; `found` has a row for each thing that was timed."""

    def __init__(self, cache: FeatureCache, ticker: Ticker, found: Found) -> None:
        self.cache, self.ticker, self._found = cache, ticker, found
        self.endpoint = cache.endpoint

    async def timed(
        self, name: str, done: Callable[[], bool] = lambda: True, *, over: str | None = None
    ) -> None:
        """Wait until it is done, then note the longest turn since the last row.

        `over` is the row of the floor that the limit lies above.
        """
        give_up_s = now() + PATIENCE_S
        while not done():
            if now() > give_up_s:
                raise TimeoutError(name)
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)
        self._found[name] = row = self.ticker.take()
        if over is not None and over in self._found:
            floor_ms = row["floor_ms"] = self._found[over]["cpu_ms"]
            row["under_floor_and_5_ms"] = row["cpu_ms"] < floor_ms + LIMIT_MS
        print(f"{name:56}", *(f"{key}={value}" for key, value in self._found[name].items()))

    async def quiet(self, done: Callable[[], bool] = lambda: True) -> None:
        """Wait until it is done, and forget how long that took."""
        while not done():  # noqa: ASYNC110 - the state is the event
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)
        self.ticker.take()

    @property
    def now(self) -> featcache.Statistics:
        return self.cache.statistics()


@contextlib.asynccontextmanager
async def pool(found: Found, **settings: Any) -> AsyncIterator[Case]:
    async with featcache.create(settings=Settings(**settings)) as cache:
        gc.collect()
        gc.freeze()  # a collection of torch's own objects is not what is timed
        ticker = Ticker()
        case = Case(cache, ticker, found)
        await case.quiet()
        yield case
        ticker.stop()


class Process:
    """A process forked to run a coroutine in a loop of its own. The fork itself is not timed."""

    def __init__(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            asyncio.run(run())
            code = 0
        except BaseException:  # noqa: BLE001 - a forked child ends here, whatever comes
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    async def ended(self) -> None:
        while not os.waitpid(self.pid, os.WNOHANG)[0]:  # noqa: ASYNC110, ASYNC222 - it does not block
            await asyncio.sleep(0.005)


def feature(nbytes: int = 256) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


async def forever() -> None:
    await asyncio.sleep(600)


async def keep(cache: FeatureCache, count: int, nbytes: int = 256) -> None:
    value = feature(nbytes)
    for number in range(count):
        await cache.put(value, key=f"{number}")


# --- the cases ------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "capacity": "4MiB", "segment": "4MiB", "initial": "4MiB", "slots": 4096, "waiters": 4096,
}  # fmt: skip


async def floor(found: Found) -> None:
    async with pool(found) as case:
        loop = asyncio.get_running_loop()

        async def wait() -> None:
            await loop.create_future()

        tasks = [asyncio.ensure_future(wait()) for _ in range(MANY)]
        await asyncio.sleep(0)
        await case.timed(MADE)
        for task in tasks:
            task.cancel()
        await case.timed(CANCELLED, lambda: all(t.done() for t in tasks))


async def evict(found: Found) -> None:
    large = feature(int(3.9 * (1 << 20)))
    async with pool(found, **SMALL) as case:
        await keep(case.cache, MANY, 1000)
        await case.quiet()
        await case.cache.put(large, timeout=PATIENCE_S)
        await case.timed("a put evicts 4000 keys")
    async with pool(found, **SMALL, evict_above=0.95, evict_to=0.05) as case:
        await keep(case.cache, 3990, 1000)
        await case.timed("watermarks evict 3800 keys", lambda: case.now.evicted >= 3700)
    async with pool(found, capacity="64MiB") as case:
        await keep(case.cache, MANY)

        async def evictor() -> None:
            async with featcache.connect(case.endpoint) as client:
                await asyncio.gather(*(client.evict(f"{number}") for number in range(MANY)))

        process = Process(evictor)
        await case.quiet()
        await case.timed("a client evicts 4000 keys", lambda: case.now.keys == 0)
        await process.ended()


async def waiting(found: Found) -> None:
    large, value = feature(4 << 20), feature()
    for who in ("client", "owner"):
        async with pool(found, **SMALL) as case:
            full = await case.cache.put(large, ttl=None)

            async def many() -> None:
                async with featcache.connect(case.endpoint) as client:
                    await asyncio.gather(*(client.put(value) for _ in range(MANY)))

            tasks: list[asyncio.Future[FeatureRef]] = []
            process: Process | None = None
            if who == "client":
                process = Process(many)
                await case.quiet()
            else:
                tasks = [asyncio.ensure_future(case.cache.put(value)) for _ in range(MANY)]
            most = 2048 if process else MANY  # a client has so many requests in flight
            await case.timed(
                f"4000 puts of {who} come to wait",
                lambda: case.now.waiters >= most,  # noqa: B023 - awaited here
                over=None if process else MADE,
            )
            if process is None:
                for task in tasks:
                    task.cancel()
                await case.timed(
                    f"4000 puts of {who} are cancelled",
                    lambda: not case.now.waiters,
                    over=CANCELLED,
                )
                tasks = [asyncio.ensure_future(case.cache.put(value)) for _ in range(MANY)]
                await case.quiet(lambda: case.now.waiters >= MANY)
                await case.cache.discard(full)
                await case.timed(
                    "4000 puts of owner get room",
                    lambda: all(t.done() for t in tasks),  # noqa: B023
                )
            else:
                process.kill()
                await case.timed(f"4000 puts of {who} are killed", lambda: not case.now.sessions)
                await process.ended()


async def seeking(found: Found) -> None:
    async with pool(found, capacity="64MiB") as case:
        store = case.cache._opened().pool.store

        async def seeker() -> None:
            async with featcache.connect(case.endpoint) as client:
                gets = (client.get("k", timeout=PATIENCE_S) for _ in range(MANY))
                await asyncio.gather(*gets)
                await forever()

        process = Process(seeker)
        await case.quiet()
        await case.timed(
            "4000 gets of a client come to wait", lambda: store.key_waiters.count >= 2048
        )
        await case.cache.put(feature(), key="k")
        await case.timed("the key comes", lambda: case.now.hits >= MANY - 2048)
        process.kill()
        await process.ended()
        await case.cache.evict("k")
        process = Process(seeker)
        await case.quiet(lambda: store.key_waiters.count >= 2048)
        process.kill()
        await case.timed("4000 gets that wait are killed", lambda: not case.now.sessions)
        await process.ended()


async def attach(found: Found) -> None:
    async with pool(found, capacity="64MiB") as case:

        async def some() -> None:
            await asyncio.sleep(0.5)
            clients = [featcache.connect(case.endpoint) for _ in range(15)]
            await asyncio.gather(*(client.open() for client in clients))
            await asyncio.sleep(2)
            await asyncio.gather(*(client.aclose() for client in clients))

        for end in ("say goodbye", "are killed"):
            processes = [Process(some) for _ in range(4)]
            await case.quiet()
            await case.timed("60 sessions attach", lambda: case.now.sessions == 60)
            if end == "are killed":
                for process in processes:
                    process.kill()
            await case.timed(f"60 sessions {end}", lambda: not case.now.sessions)
            for process in processes:
                await process.ended()


async def expire(found: Found) -> None:
    async with pool(found, capacity="64MiB") as case:
        at_s, value = now() + 1.5, feature()
        for _ in range(3000):
            await case.cache.put(value, ttl=max(0.01, at_s - now()))
        await case.quiet()
        await case.timed("3000 refs expire", lambda: not case.now.slots_used)


async def holding(found: Found) -> None:
    async with pool(found, capacity="64MiB") as case:
        refs = [await case.cache.put(feature(), readers=["h"]) for _ in range(MANY)]

        async def borrower() -> None:
            client = featcache.connect(case.endpoint, name="h")
            await client.open()
            for ref in refs:
                await client.borrow(ref).__aenter__()
            await client.put(feature(), key="all")
            await forever()

        process = Process(borrower)
        await case.quiet(lambda: case.now.keys == 1)
        process.kill()
        await case.timed(
            "a named reader with 4000 borrows is killed", lambda: case.now.slots_used == 1
        )
        await process.ended()
    async with pool(found, capacity="64MiB") as case:
        await keep(case.cache, MANY)

        async def reader() -> None:
            client = featcache.connect(case.endpoint)
            await client.open()
            for number in range(MANY):
                await client.borrow(f"{number}").__aenter__()
            await client.pin("1")
            await forever()

        process = Process(reader)
        await case.quiet(lambda: case.now.pinned_bytes > 0)
        process.kill()
        await case.timed("a reader with 4000 leases is killed", lambda: not case.now.sessions)
        await process.ended()


async def growth(found: Found) -> None:
    async with pool(found, capacity="1GiB", segment="64MiB") as case:
        large = feature(600 << 20)
        await case.quiet()
        await case.cache.put(large, timeout=PATIENCE_S)
        await case.timed("growth by 64 MiB to 600 MiB, one put")
        value = feature(4 << 20)
        for _ in range(90):
            await case.cache.put(value, timeout=PATIENCE_S)
        await case.timed("growth by 64 MiB under puts of 4 MiB")
    async with (
        featcache.create(capacity="2GiB", initial="2GiB") as cache,
        featcache.connect(cache.endpoint) as first,
    ):
        ticker = Ticker()
        case = Case(cache, ticker, found)
        await case.quiet()
        async with featcache.connect(cache.endpoint):
            await case.timed("attach to 2 GiB")
        del first
        ticker.stop()


async def close(found: Found) -> None:
    value = feature()
    async with pool(found, capacity="64MiB") as case:
        for _ in range(MANY):
            await case.cache.put(value, ttl=None)
        await case.quiet()
        await case.cache.aclose()
        await case.timed("close with 4000 unpaid refs")
    async with pool(found, **SMALL) as case:
        await case.cache.put(feature(4 << 20), ttl=None)
        tasks = [asyncio.ensure_future(case.cache.put(value)) for _ in range(MANY)]
        await case.quiet(lambda: case.now.waiters == MANY)
        await case.cache.aclose()
        await case.timed("close with 4000 puts that wait", lambda: all(t.done() for t in tasks))
        await asyncio.gather(*tasks, return_exceptions=True)


async def hits(found: Found) -> None:
    async with pool(found, capacity="64MiB") as case:
        await case.cache.put(feature(), key="k")

        async def loop(call: Callable[[], Awaitable[object]]) -> None:
            until_s = now() + 0.3
            while now() < until_s:
                await call()

        cache = case.cache
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "get": lambda: cache.get("k"),
            "contains": lambda: cache.contains("k"),
            "get_or_put": lambda: cache.get_or_put("k", feature),
        }
        for name, call in calls.items():
            await loop(call)
            await case.timed(f"a loop of {name}")


async def many(found: Found) -> None:
    keys, values = [f"{number}" for number in range(1000)], [feature() for _ in range(1000)]
    for who in ("owner", "client"):
        async with pool(found, capacity="64MiB") as case:

            async def calls() -> None:
                async with featcache.connect(case.endpoint) as client:
                    await client.put_many(values, keys=keys)
                    await client.contains_many(keys)
                    await client.get_many(keys)

            if who == "client":
                process = Process(calls)
                await case.quiet()
                await case.timed(
                    "put_many, get_many of 1000 by client",
                    lambda: case.now.sessions == 0 and case.now.keys == 1000,
                )
                await process.ended()
                continue
            cache = case.cache
            await cache.put_many(values, keys=keys)
            await case.timed("put_many of 1000")
            await cache.put_many(values, keys=keys)
            await case.timed("put_many of 1000 that replace 1000")
            await cache.contains_many(keys)
            await case.timed("contains_many of 1000")
            await cache.get_many(keys)
            await case.timed("get_many of 1000")
    async with pool(found, **SMALL) as case:
        await keep(case.cache, MANY, 1000)
        await case.quiet()
        await case.cache.put_many(values, keys=[f"new {key}" for key in keys], timeout=PATIENCE_S)
        await case.timed("put_many of 1000 that evict 1000")


async def cancels(found: Found) -> None:
    async with pool(
        found,
        **SMALL,
    ) as case:
        await case.cache.put(feature(4 << 20), ttl=None)
        value = feature()

        async def canceller() -> None:
            async with featcache.connect(case.endpoint) as client:
                tasks = [asyncio.ensure_future(client.put(value)) for _ in range(2000)]
                while client.statistics().waiters < 2000:  # noqa: ASYNC110 - the state is the event
                    await asyncio.sleep(0.01)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        process = Process(canceller)
        await case.quiet(lambda: case.now.waiters == 2000)
        await case.timed("2000 puts of client are cancelled", lambda: not case.now.sessions)
        await process.ended()


async def held(found: Found) -> None:
    async with pool(found, **SMALL) as case:
        await keep(case.cache, MANY, 1000)
        ready, go_on = os.pipe()

        async def reader() -> None:
            async with featcache.connect(case.endpoint) as client:
                for number in range(3000):
                    await client.borrow(f"{number}").__aenter__()
                os.write(go_on, b"x")
                await forever()

        process = Process(reader)
        os.set_blocking(ready, False)

        def is_ready() -> bool:
            with contextlib.suppress(BlockingIOError):
                return bool(os.read(ready, 1))
            return False

        await case.quiet(is_ready)
        for number in range(400):
            await case.cache.put(feature(1000), key=f"new {number}")
        await case.timed("400 puts, the coldest 3000 are borrowed")
        await case.cache.put(feature(900_000), key="large")
        await case.timed("a large put, the coldest 3000 are borrowed")
        process.kill()
        await process.ended()
        os.close(ready)
        os.close(go_on)


CASES: dict[str, Callable[[Found], Coroutine[Any, Any, None]]] = {
    "floor": floor, "hits": hits, "evict": evict, "waiting": waiting, "seeking": seeking, "attach": attach,
    "expire": expire, "holding": holding, "growth": growth, "close": close,
    "many": many, "cancels": cancels, "held": held,
}  # fmt: skip


def least(rounds: list[Found]) -> Found:
    """Return the least of each figure over all rounds."""
    found: Found = {}
    for name in rounds[0]:
        rows = [each[name] for each in rounds]
        row = found[name] = {
            key: min(row[key] for row in rows) for key in rows[0] if key.endswith("_ms")
        }
        row["under_5_ms"] = row["cpu_ms"] < LIMIT_MS
        if "floor_ms" in row:
            row["under_floor_and_5_ms"] = row["cpu_ms"] < row["floor_ms"] + LIMIT_MS
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all of them by default")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    events.remove_hook(events.log_to_structlog)
    rounds: list[Found] = []
    for _ in range(arguments.rounds):
        rounds.append({})
        for name in arguments.cases or CASES:
            with asyncio.Runner(loop_factory=Loop) as runner:
                runner.run(CASES[name](rounds[-1]))
    found = least(rounds)
    if len(rounds) > 1:
        print(f"\nThe least of {len(rounds)} rounds:")
        for name, row in found.items():
            print(f"{name:56}", *(f"{key}={value}" for key, value in row.items()))
    result = {
        "machine": machine.machine(),
        "versions": machine.versions(None),
        "when": machine.now(),
        "rounds": arguments.rounds,
        "longest_turns": found,
    }
    resultfile.write(arguments.out, result)


if __name__ == "__main__":
    main()
