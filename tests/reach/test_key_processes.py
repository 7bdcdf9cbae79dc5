"""Keys over hosts in processes of their own, over NIXL, which are killed and stopped."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from reach.clusters import free_addresses
from reach.hosts import KEY
from reach.test_nixl import pytestmark as pytestmark  # noqa: PLC0414 - skipped without NIXL too

PROGRAM = Path(__file__).with_name("key_program.py")


@pytest.fixture(autouse=True)
def fake_plane() -> None:
    """The real one, in the processes."""


class Host:
    """One process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.making: asyncio.Queue[str] = asyncio.Queue()
        self.ready = asyncio.Event()
        self.reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            told = json.loads(line)
            if "number" in told:
                self._answers.pop(told["number"]).set_result(told.get("result", told.get("error")))
            elif "making" in told:
                self.making.put_nowait(told["making"])
            else:
                self.ready.set()

    def ask(self, do: str, **more: Any) -> "asyncio.Future[Any]":
        """Ask it to do something; return its answer to come."""
        assert self.process.stdin is not None
        number = next(self._numbers)
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        self.process.stdin.write(json.dumps({"do": do, "number": number} | more).encode() + b"\n")
        return future

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@contextlib.asynccontextmanager
async def host(listen: str | None, upstream: list[str]) -> AsyncIterator[Host]:
    """Start one."""
    tests = str(PROGRAM.parents[1])
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(PROGRAM), listen or "", *upstream),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "FEATCACHE_CLUSTER_KEY": KEY, "PYTHONPATH": path},
    )
    made = Host(process)
    try:
        await asyncio.wait_for(made.ready.wait(), 60)
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await made.reading


@contextlib.asynccontextmanager
async def three() -> AsyncIterator[tuple[Host, Host, Host]]:
    """A home and two readers of it."""
    [address] = free_addresses(1)
    async with (
        host(address, [address]) as home,
        host(None, [address]) as one,
        host(None, [address]) as other,
    ):
        await home.ask("put", key="warm", value=1)
        assert await asyncio.gather(*(each.ask("get", key="warm") for each in (one, other))) == [
            *(1, 1)
        ]
        yield home, one, other


async def test_a_key_is_made_once_over_processes_and_fetched_once_by_each() -> None:
    async with three() as hosts:
        makes = [each.ask("make", key="k", value=n, seconds=0.3) for n, each in enumerate(hosts)]
        values = await asyncio.gather(*makes)
        assert len(set(values)) == 1
        assert sum(each.making.qsize() for each in hosts) == 1
        await hosts[1].ask("put", key="p", value=9)
        assert await hosts[2].ask("get", key="p", timeout=20) == 9


async def test_another_host_makes_when_the_makers_host_is_killed() -> None:
    async with three() as (home, one, other):
        one.ask("make", key="k", value=1, seconds=60)
        await one.making.get()
        waits = other.ask("make", key="k", value=2, seconds=0)
        at_home = home.ask("get", key="k", timeout=30)
        one.signal(signal.SIGKILL)
        assert await asyncio.wait_for(waits, 20) == 2
        assert await asyncio.wait_for(at_home, 20) == 2
        assert await home.ask("count", name="claims_passed") == 1


async def test_whoever_waits_goes_on_when_the_home_is_stopped() -> None:
    async with three() as (home, one, other):
        home.ask("make", key="k", value=0, seconds=60)
        await home.making.get()
        waits = [
            each.ask("make", key="k", value=n, seconds=0) for n, each in ((1, one), (2, other))
        ]
        looks = one.ask("get", key="k", timeout=30)
        home.signal(signal.SIGSTOP)
        assert await asyncio.wait_for(asyncio.gather(*waits, looks), 20) == [1, 2, 1]
        assert await asyncio.wait_for(one.ask("get", key="none"), 20) == "KeyNotFound"
