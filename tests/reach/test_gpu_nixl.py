"""Slabs on real GPUs, read by the owner of another process over NIXL."""

import importlib.util
from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch

import featcache
from featcache import FeatureRef
from reach.hosts import KEY
from support import processes
from support.caches import MIB, small, spent, tensor
from support.far import BUSY_CYCLES, of_seed
from support.processes import Pipe
from support.slabs import SEGMENT

INSTALLED = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13", "nixl"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INSTALLED, reason="NIXL is not installed: pip install 'featcache[reach]'"
    ),
]
OTHER: Final = "the last GPU"
PLACES: Final = [("cuda:0", "cuda:0"), ("cuda:0", OTHER), ("cuda:0", "cpu"), ("cpu", "cuda:0")]
SIZES: Final = (1, 4096, SEGMENT, 5 * SEGMENT + 13)


@pytest.fixture(autouse=True)
def fake_plane() -> None:
    """The real one."""


@pytest.fixture
def start() -> Iterator[processes.Start]:
    processes.warm_up()
    with processes.starting() as started:
        yield started


def settings(kind: str) -> featcache.Settings:
    changes: dict[str, Any] = {"capacity": 64 * MIB, "segment": SEGMENT, "idle": 0.2}
    return small(**changes, backend=kind, peer_timeout=10.0, peer_lease=30.0)


async def home(pipe: Pipe, device: str, kind: str) -> None:
    """Put what it is told to: ("put", seed, nbytes, busy)…, ("shrunk",), ("end",)."""
    how = settings(kind if device != "cpu" else "auto")
    async with featcache.create(
        device=device, settings=how, listen="127.0.0.1:0", cluster_key=KEY
    ) as owner:
        pipe.say("listens")
        while (order := await pipe.hear())[0] != "end":
            if order[0] == "shrunk":
                await processes.until(lambda: owner.statistics().committed_bytes == SEGMENT)
                pipe.say("shrunk")
                continue
            _, seed, nbytes, busy = order
            feature = torch.zeros(nbytes, dtype=torch.uint8, device=device)
            if busy:
                torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
            feature.copy_(of_seed(seed, nbytes, device))
            pipe.say((await owner.put(feature)).to_bytes())
        await spent(owner)
    pipe.say("closed")


def place_of(name: str) -> str:
    if name != OTHER:
        return name
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    return f"cuda:{torch.cuda.device_count() - 1}"


@pytest.mark.parametrize("kind", ["vmm", "ipc"])
@pytest.mark.parametrize(("there", "here"), PLACES)
async def test_features_are_read_whole_and_in_order(
    start: processes.Start, there: str, here: str, kind: str
) -> None:
    """Of many sizes, over segments' borders, behind a busy stream, after the slab grew and shrank."""
    device = place_of(here)
    how = settings(kind if device != "cpu" else "auto")
    child = start(home, there, kind)
    await child.expect("listens")
    async with featcache.create(device=device, settings=how, cluster_key=KEY) as reader:

        async def check(seed: int, nbytes: int, *, busy: bool = False) -> None:
            (data,) = await child.ask("put", seed, nbytes, busy)
            found = tensor(await reader.get(FeatureRef.from_bytes(data)))
            assert found.device == torch.device(device)
            assert torch.equal(found, of_seed(seed, nbytes, device))

        for seed, nbytes in enumerate(SIZES):
            await check(seed, nbytes)
        if there != "cpu":
            await check(7, 3 * SEGMENT, busy=True)
            if kind == "vmm":
                assert await child.ask("shrunk") == ("shrunk",)
            await check(8, 6 * SEGMENT)
        assert reader.statistics().fetches_failed == 0
        child.tell("end")
        await child.expect("closed")
