"""A pool above a real Mooncake Store, whose master is started here; skipped where Mooncake is missing."""

import asyncio
import importlib.util
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

import featcache
from featcache import BackendUnavailable, KeyNotFound, SettingsError
from featcache.integrations import mooncake
from support.caches import filled, tensor, tensors, until
from support.tiers import PLACES, SIZE, fill, is_kept, is_quiet, push_out, tiered


def missing() -> str | None:
    if importlib.util.find_spec("mooncake") is None:
        return "the extra mooncake is not installed"
    try:
        importlib.import_module("mooncake.store")
    except ImportError as error:
        return f"Mooncake can't be imported: {error}"
    return None if program() is not None else "there is no mooncake_master"


def program() -> str | None:
    beside = Path(sys.executable).with_name("mooncake_master")
    return str(beside) if beside.is_file() else shutil.which("mooncake_master")


WHY_NOT = missing()
needs_mooncake = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Master:
    """A master in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.address = f"127.0.0.1:{port}"

    def answers(self) -> bool:
        assert self.process.returncode is None, "it has ended"
        host, _, port = self.address.partition(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@pytest_asyncio.fixture
async def master() -> AsyncIterator[Master]:
    port, command = free_port(), program()
    assert command is not None
    arguments = f"--rpc_port={port}", f"--metrics_port={free_port()}"
    nothing = asyncio.subprocess.DEVNULL
    running = Master(
        await asyncio.create_subprocess_exec(command, *arguments, stdout=nothing, stderr=nothing),
        port,
    )
    try:
        await until(running.answers)
        yield running
    finally:
        await running.kill()


@pytest.fixture
def tier(master: Master) -> mooncake.MooncakeTier:
    return mooncake.MooncakeTier(master.address, segment="64MiB", buffer="16MiB")


@needs_mooncake
async def test_what_a_pool_evicts_comes_back_from_the_store(tier: mooncake.MooncakeTier) -> None:
    below: Any = tier
    async with tiered(below, capacity=SIZE * PLACES) as (_, owner, client):
        feature = {"a": torch.arange(700.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}
        await owner.put(feature, key="a dict")
        await owner.put(torch.empty(0, 3), key="empty")
        await owner.put(filled(SIZE * PLACES), key="all the room")
        await fill(client, count=2 * PLACES)
        await until(lambda: owner.statistics().demoted >= PLACES + 3 and is_quiet(owner))
        assert not is_kept(owner, "a dict")
        found = tensors(await client.get("a dict"))
        assert all(torch.equal(found[name], value) for name, value in feature.items())
        assert tensor(await owner.get("empty")).shape == (0, 3)
        for number in range(2 * PLACES):
            made = await client.get_or_put(f"{number}", lambda: pytest.fail("it lies in the store"))
            assert torch.equal(tensor(made), filled(SIZE, number))
        assert await owner.contains_many(["0", "nothing"]) == [True, False]
        await owner.put(filled(SIZE, 99), key="0")
        await push_out(owner, "0", 100)
        await until(lambda: is_quiet(owner))
        assert int(tensor(await client.get("0"))[0]) == 99
        await owner.evict("1")
        await until(lambda: is_quiet(owner))
        with pytest.raises(KeyNotFound):
            await client.get("1")
        assert owner.statistics().tier_failures == 0


@needs_mooncake
async def test_two_pools_share_a_store(master: Master, tier: mooncake.MooncakeTier) -> None:
    sizes: dict[str, Any] = {"capacity": "1MiB", "segment": "1MiB"}
    async with featcache.create(**sizes, tier=KeptOpen(tier)) as one:
        await one.put(filled(1 << 20, 7), key="shared")
        await one.put(filled(1 << 20, 8), key="other")
        await until(lambda: one.statistics().demoted == 1)
    other = mooncake.MooncakeTier(master.address, segment=0)  # it lends the store no memory
    async with featcache.create(**sizes, tier=other) as two:
        assert torch.equal(tensor(await two.get("shared")), filled(1 << 20, 7))
    await tier.close()


class KeptOpen:
    """A tier that its pool does not close."""

    def __init__(self, tier: mooncake.MooncakeTier) -> None:
        self.put, self.get, self.has, self.remove = tier.put, tier.get, tier.has, tier.remove

    async def close(self) -> None:
        pass


@needs_mooncake
async def test_a_store_that_is_gone_costs_hits_alone(
    master: Master, tier: mooncake.MooncakeTier
) -> None:
    below: Any = tier
    async with tiered(below, tier_timeout=1.0) as (_, owner, client):
        await fill(owner, count=PLACES + 1)
        await until(lambda: owner.statistics().demoted == 1)
        await master.kill()
        with pytest.raises(KeyNotFound):
            await client.get("nothing")
        await client.put(filled(SIZE, 3), key="new")
        assert int(tensor(await owner.get("new"))[0]) == 3


@needs_mooncake
def test_a_master_that_is_not_there_is_told() -> None:
    with pytest.raises(BackendUnavailable, match="no Mooncake Store"):
        mooncake.MooncakeTier(f"127.0.0.1:{free_port()}", segment=0)
    for wrong in ("nowhere", ":1", "host:port"):
        with pytest.raises(SettingsError, match="host:port"):
            mooncake.MooncakeTier(wrong)


def test_the_environment_must_name_a_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOONCAKE_MASTER", raising=False)
    with pytest.raises(SettingsError, match="MOONCAKE_MASTER"):
        mooncake.from_environment()


def test_a_missing_package_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake", None)
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(BackendUnavailable, match=r"featcache\[mooncake\]"):
        mooncake.MooncakeTier("127.0.0.1:1")
