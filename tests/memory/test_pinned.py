"""The host slab that a GPU copies to and from: pinned if the driver lets it, whole either way."""

import pytest
import torch

from featcache.memory.host.pinned import PinnedSlab
from featcache.memory.pack import pack
from memory.cudaslabs import CAPACITY, SEGMENT
from memory.fakecuda import Code, FakeApi, driver_over


def _put(slab: PinnedSlab) -> None:
    value = torch.arange(SEGMENT // 8)
    specs, parts, _ = pack(value, 1)
    slab.write(256, parts, ())
    assert torch.equal(slab.view(256, specs[0]), value)


def test_it_pins_what_it_begins_with(api: FakeApi, no_leaks: None) -> None:
    slab = PinnedSlab(driver_over(api), 1, CAPACITY, huge_pages=False)
    slab.commit(0, CAPACITY, prefault=True)
    assert slab.pinned_bytes == CAPACITY
    assert [one.size for one in api.memory.registered.values()] == [CAPACITY]
    _put(slab)
    slab.close()
    slab.close()
    assert api.leftovers() == {}


@pytest.mark.parametrize("code", [Code.CUDA_ERROR_OUT_OF_MEMORY, Code.CUDA_ERROR_NOT_PERMITTED])
@pytest.mark.parametrize(
    "call", ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent", "cuMemHostRegister"]
)
def test_a_driver_that_refuses_leaves_it_as_it_is(
    api: FakeApi, no_leaks: None, call: str, code: Code
) -> None:
    slab = PinnedSlab(driver_over(api), 0, CAPACITY, huge_pages=False)
    api.fail(call, code=code)
    slab.commit(0, CAPACITY, prefault=True)
    assert slab.pinned_bytes == 0
    _put(slab)
    slab.close()
    assert "cuMemHostUnregister" not in api.calls
