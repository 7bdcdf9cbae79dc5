"""Children for the tests of faults, and what must be so after each of them."""

import gc
import time
from collections.abc import Iterator

import pytest
import structlog
import torch

from faults.checks import Log, ours
from featcache.control import endpoint as endpoints
from featcache.pool.recycler import Recycler
from support import processes
from support.processes import Start
from support.slabs import HOME, Slab, slab_params


@pytest.fixture(scope="session", autouse=True)
def _server() -> None:
    processes.warm_up()


@pytest.fixture(params=slab_params("host", "vmm"))  # a process takes CUDA a second to begin
def slab(request: pytest.FixtureRequest) -> Slab:
    """A kind of slab."""
    found: Slab = request.param
    if found.kind != "host":
        torch.cuda.init()  # type: ignore[no-untyped-call]
    return found


@pytest.fixture
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a script in a process of its own. All are dead before the look for leaks."""
    if "slab" in request.fixturenames:
        yield from _start_on(request.getfixturevalue("slab"), request, monkeypatch)
        return
    request.getfixturevalue("no_leaks")
    with processes.starting() as started:
        yield started


def _start_on(
    slab: Slab, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    """Leave the socket files of the killed to the next owner, which comes here.

    On a host slab no timer of this process's pools helps: what is seen came by an event. (What a GPU's
    stream writes is only seen by looking.)
    """
    if slab.kind == "host":
        request.getfixturevalue("no_leaks")
        monkeypatch.setattr(Recycler, "set_busy", lambda self, waiting: None)
    before = ours()
    with processes.starting() as started:
        yield started
    give_up_s = time.monotonic() + 2.0
    while ours() != before and time.monotonic() < give_up_s:
        gc.collect()
        time.sleep(0.005)  # the loop is gone, the thread that unmaps may not be
    assert ours() == before
    endpoints.listen(None).close()
    if slab.kind != "host":
        torch.cuda.synchronize(HOME)  # this process's context is sound


@pytest.fixture
def log() -> Iterator[Log]:
    """What this process logs."""
    with structlog.testing.capture_logs() as entries:
        yield entries
