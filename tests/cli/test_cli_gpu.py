"""The commands on a machine with a GPU."""

import pytest
import torch

import featcache
from cli.commands import Run
from cli.conftest import Serve
from support.caches import KIB, filled

pytestmark = pytest.mark.gpu


async def test_a_slab_on_a_gpu_is_served_and_shown(serve: Serve) -> None:
    daemon = serve("--device", "cuda:0")
    async with (
        featcache.connect(daemon.endpoint()) as client,
        featcache.observe(daemon.endpoint()) as observer,
    ):
        await client.put(filled(KIB).to("cuda:0"), key="k")
        seen = await observer.snapshot()
        assert seen.kind.startswith("cuda-")
        assert seen.statistics.keys == 1
        assert (await observer.map(8)).states[0] == "k"
        async with client.borrow("k"):
            torch.cuda.synchronize()
            assert (await observer.snapshot()).sessions[0].reading == 1
    assert daemon.stops().code == 0


def test_doctor_knows_each_gpu(command: Run) -> None:
    ended = command("doctor", "--json")
    found = {one["name"]: one for one in ended.objects}
    for ordinal in range(torch.cuda.device_count()):
        assert found[f"cuda:{ordinal}"]["state"] == "ok"
        assert f"cuda:{ordinal} sharing" in found
        assert f"cuda:{ordinal} RDMA" in found


def test_bench_measures_a_gpu(command: Run) -> None:
    ended = command("bench", "--device", "cuda:0", "--sizes", "1MiB", "--seconds", "2", "--json")
    assert ended.code == 0, ended.err
    assert ended.objects[0]["us"]["get"] > 0
