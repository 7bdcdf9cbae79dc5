"""What the data plane's thread does for a GPU, over a fake agent and a fake driver."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from featcache.errors import BackendUnavailable
from featcache.reach.gpu import PlaneGpu
from featcache.reach.nixl_plane import NixlPlane
from featcache.reach.plane import HOST, Memory, Piece
from memory.fakecuda import Code, FakeApi, driver_over
from support.caches import until

VRAM = Memory("VRAM", 1)


class FakeAgent:
    """NIXL's agent, as far as a plane calls it; it notes the CUDA context of each call."""

    def __init__(self, driver: FakeApi) -> None:
        self.driver = driver
        self.told: list[tuple[Any, ...]] = []
        self.refuses = False
        self._note("made")

    def _note(self, *what: Any) -> None:
        current = int(self.driver.cuCtxGetCurrent()[1])
        self.told.append((*what, current and current - 0xC0DE0000))

    def register_memory(self, regions: list[Any], mem_type: str) -> Any:
        if self.refuses:
            raise RuntimeError("NIXL_ERR_BACKEND")
        self._note("register", regions, mem_type)
        return regions

    def deregister_memory(self, regions: Any) -> None:
        self._note("deregister", regions)

    def get_xfer_descs(self, regions: list[Any], mem_type: str) -> Any:
        return regions, mem_type

    def initialize_xfer(self, operation: str, ours: Any, theirs: Any, peer: str) -> str:
        self._note(operation, ours, theirs, peer)
        return "handle"

    def transfer(self, _: str) -> str:
        return "PROC"

    def check_xfer_state(self, _: str) -> str:
        self._note("landed")
        return "DONE"

    def release_xfer_handle(self, _: str) -> None:
        self._note("released")


@pytest.fixture
def driver() -> Iterator[FakeApi]:
    api = FakeApi()
    yield api
    assert api.broken == []


@asynccontextmanager
async def plane_on(
    driver: FakeApi, tmp_path: Path, loaded: str
) -> AsyncIterator[tuple[NixlPlane, list[FakeAgent]]]:
    """A plane for memory of GPU 1, in a process that has these libraries."""
    maps = tmp_path / "maps"
    maps.write_text(loaded)
    agents: list[FakeAgent] = []

    def agent(name: str, config: object) -> FakeAgent:
        agents.append(FakeAgent(driver))
        return agents[0]

    api = SimpleNamespace(nixl_agent=agent, nixl_agent_config=lambda backends: backends)
    gpu = PlaneGpu(1, lambda: driver_over(driver), maps)
    plane = NixlPlane(api, "one", asyncio.get_running_loop(), VRAM, gpu)
    try:
        yield plane, agents
    finally:
        await plane.close()


@pytest.mark.parametrize(("by_segments", "ucx"), [(True, {"TLS": "^cuda_ipc"}), (False, None)])
def test_segments_are_told_to_no_peer_by_a_way_that_they_have_not(
    by_segments: bool, ucx: dict[str, str] | None
) -> None:
    """A peer refused all that was registered: on GPUs `test_gpu_nixl` failed with "vmm"."""
    assert PlaneGpu(0, by_segments=by_segments).ucx == ucx


async def test_all_calls_of_the_agent_are_made_in_the_devices_context(
    driver: FakeApi, tmp_path: Path
) -> None:
    """Without one NIXL makes a context on the first GPU."""
    async with plane_on(driver, tmp_path, "… libuct_cuda.so.0.0.0") as (plane, agents):
        await plane.register(4096, 512)
        await plane.read("home", [Piece(4096, 8192, 256)], Memory("VRAM", 3)).ended
        await plane.deregister(4096)
        assert agents[0].told == [
            ("made", 1),
            ("register", [(4096, 512, 1, "")], "VRAM", 1),
            ("READ", ([(4096, 256, 1)], "VRAM"), ([(8192, 256, 3)], "VRAM"), "home", 1),
            ("landed", 1),
            ("released", 1),
            ("deregister", [(4096, 512, 1, "")], 1),
        ]


async def test_host_memory_is_read_into_a_gpu(driver: FakeApi, tmp_path: Path) -> None:
    async with plane_on(driver, tmp_path, "… libuct_cuda.so.0.0.0") as (plane, agents):
        await plane.read("home", [Piece(4096, 8192, 256)], HOST).ended
        assert agents[0].told[1][1:3] == (([(4096, 256, 1)], "VRAM"), ([(8192, 256, 0)], "DRAM"))


@pytest.mark.parametrize(("ordering", "flushes"), [(100, 1), (200, 0)])
async def test_a_read_is_visible_to_kernels_before_it_is_told(
    driver: FakeApi, tmp_path: Path, ordering: int, flushes: int
) -> None:
    driver.attributes[118], driver.attributes[117] = ordering, 1
    async with plane_on(driver, tmp_path, "… libuct_cuda.so.0.0.0") as (plane, _):
        await plane.read("home", [Piece(4096, 8192, 256)]).ended
        assert driver.calls.count("cuFlushGPUDirectRDMAWrites") == flushes


async def test_a_flush_that_fails_fails_the_read(driver: FakeApi, tmp_path: Path) -> None:
    driver.attributes[118], driver.attributes[117] = 100, 1
    driver.fail("cuFlushGPUDirectRDMAWrites", code=Code.CUDA_ERROR_ILLEGAL_ADDRESS)
    async with plane_on(driver, tmp_path, "… libuct_cuda.so.0.0.0") as (plane, _):
        with pytest.raises(BackendUnavailable, match="cuFlushGPUDirectRDMAWrites"):
            await plane.read("home", [Piece(4096, 8192, 256)]).ended


async def test_ucx_without_cuda_registers_nothing(driver: FakeApi, tmp_path: Path) -> None:
    """It would take the memory for the host's."""
    async with plane_on(driver, tmp_path, "… libuct_cma.so.0.0.0") as (plane, agents):
        with pytest.raises(BackendUnavailable, match="UCX has no CUDA") as caught:
            await plane.register(4096, 512)
        assert "\n" not in str(caught.value)
        assert agents[0].told == [("made", 1)]


async def test_memory_that_nixl_refuses_is_told_in_one_line(
    driver: FakeApi, tmp_path: Path
) -> None:
    async with plane_on(driver, tmp_path, "… libuct_cuda.so.0.0.0") as (plane, agents):
        await plane.register(4096, 512)
        agents[0].refuses = True
        with pytest.raises(BackendUnavailable, match=r"NIXL_ERR_BACKEND.*UCX_TLS") as caught:
            await plane.register(8192, 512)
        assert "\n" not in str(caught.value)


async def test_no_driver_no_plane(driver: FakeApi, tmp_path: Path) -> None:
    driver.fail("cuDevicePrimaryCtxRetain", code=Code.CUDA_ERROR_UNKNOWN)
    async with plane_on(driver, tmp_path, "… libuct_cuda.so.0.0.0") as (plane, agents):
        with pytest.raises(BackendUnavailable, match="cuDevicePrimaryCtxRetain"):
            await plane.register(4096, 512)
        assert agents == []
    await until(lambda: all(each.name != "featcache-nixl" for each in threading.enumerate()))
