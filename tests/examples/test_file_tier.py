"""The tier in a folder: what a pool evicts is a file there, also for the next pool."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import featcache
from support.caches import tensor, tensors, until
from support.tiers import PLACES, SIZE, fill, is_quiet, tiered

EXAMPLE = Path(__file__).parents[2] / "examples/file_tier.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("file_tier", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(tier: Any) -> list[Path]:
    return list(tier.folder.iterdir())


async def test_features_are_files_and_come_back_in_the_next_pool(tmp_path: Path) -> None:
    tier: Any = example().FileTier(tmp_path / "features")
    async with tiered(tier) as (_, owner, client):
        await client.put({"a": torch.arange(9.0), "b": torch.empty(0)}, key="a dict")
        await fill(owner, count=2 * PLACES)
        await owner.put(torch.zeros(SIZE * PLACES, dtype=torch.uint8), key="all the room")
        await until(lambda: owner.statistics().demoted == 2 * PLACES + 1 and is_quiet(owner))
        assert len(files(tier)) == 2 * PLACES + 1
        await owner.evict("3")
        await until(lambda: len(files(tier)) == 2 * PLACES)
    tier = example().FileTier(tmp_path / "features")
    async with tiered(tier) as (_, owner, client):
        assert int(tensor(await client.get("5"))[0]) == 5
        found = tensors(await owner.get("a dict"))
        assert torch.equal(found["a"], torch.arange(9.0))
        with pytest.raises(featcache.KeyNotFound):
            await client.get("3")
        assert owner.statistics().tier_failures == 0


async def test_a_file_that_was_cut_is_a_miss(tmp_path: Path) -> None:
    tier: Any = example().FileTier(tmp_path)
    async with tiered(tier) as (_, owner, client):
        await fill(owner, count=PLACES + 2)
        await until(lambda: owner.statistics().demoted == 2 and is_quiet(owner))
        first, second = files(tier)
        first.write_bytes(first.read_bytes()[:-1])
        second.write_bytes(b"")
        for key in ("0", "1"):
            with pytest.raises(featcache.KeyNotFound):
                await client.get(key)
        assert owner.statistics().tier_failures == 2
