"""Kinds of slabs and places that read them, for tests of what is the same for all."""

import pytest
import torch

from support.slabs import PLACES, Place, Slab, check_devices, slab_params, warm_up_gpus


@pytest.fixture(params=slab_params("host", "vmm", "ipc"))
def slab(request: pytest.FixtureRequest) -> Slab:
    """A kind of slab; those on a GPU are skipped where there is none."""
    found: Slab = request.param
    if found.kind != "host":
        warm_up_gpus()
    return found


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """A kind of slab and who reads it."""
    found: Place = request.param
    check_devices(found)
    if torch.cuda.is_available():
        warm_up_gpus()
    return found
