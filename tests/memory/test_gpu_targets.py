"""What a host pool does where there is a GPU: copies go there, sources come from there."""

import pytest
import torch

import featcache

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda:0")


async def test_get_onto_a_gpu(gpu: torch.device) -> None:
    x = torch.arange(1000.0)
    async with (
        featcache.create(capacity="64MiB") as owner,
        featcache.connect(owner.endpoint) as client,
        featcache.connect(owner.endpoint, device=gpu) as client_there,
    ):
        ref = await owner.put(x, readers=3)
        for got in (
            await client.get(ref, device=gpu),
            await client_there.get(ref),
            await owner.get(ref, out=torch.empty(1000, device=gpu)),
        ):
            assert isinstance(got, torch.Tensor)
            assert got.device == gpu
            assert torch.equal(got.cpu(), x)


@pytest.mark.parametrize("nbytes", [4096, 16 << 20])
async def test_put_from_a_gpu(gpu: torch.device, nbytes: int) -> None:
    x = torch.rand(nbytes // 4, device=gpu)
    async with featcache.create(capacity="64MiB") as owner:
        ref = await owner.put(x.view(2, -1).t())
        got = await owner.get(ref)
        assert isinstance(got, torch.Tensor)
        assert got.is_cpu
        assert torch.equal(got, x.cpu().view(2, -1).t())


async def test_a_device_there_is_not() -> None:
    with pytest.raises(featcache.FeatcacheError):
        featcache.connect(device="cuda:99")
