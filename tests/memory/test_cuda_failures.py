"""Each driver call in turn fails once; what was opened is closed, and nothing is left behind."""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import pytest
import torch

from featcache.errors import BackendUnavailable
from featcache.memory.cuda.backend import attach, choose_kind
from featcache.memory.cuda.backing import IPC, VMM
from featcache.memory.cuda.driver import DriverError
from featcache.memory.cuda.mapping import CudaMapping
from featcache.memory.cuda.slab import CudaSlab
from featcache.memory.slab import PeerSlab, Unreachable
from featcache.memory.words import OwnerWords, SessionWords
from memory.cudaslabs import (
    CAPACITY,
    SECOND,
    SEGMENT,
    attach_to,
    make_slab,
    put,
    put_one,
    send_segments,
    to_device,
    to_host,
)
from memory.fakecuda import Code, FakeApi, driver_over
from support.leaks import difference, open_descriptors

FIRST = torch.device("cuda", 0)
Opened = list[CudaMapping]
Scene = Callable[[FakeApi, Opened], None]

QUIET = {"cuCtxPopCurrent", "cuCtxGetCurrent"}
"""Whose failure is no error: what was asked for is done, one way or the other."""


@contextmanager
def words(kind: type[OwnerWords] | type[SessionWords]) -> Iterator[OwnerWords | SessionWords]:
    block, fd = kind.create(16)
    os.close(fd)
    yield block


def own(api: FakeApi, opened: Opened, kind: str) -> None:
    """The whole life of an owner's slab."""
    driver = driver_over(api)
    choose_kind(driver, 0, "auto")
    driver.granularity_bytes(0)
    slab = CudaSlab(driver, kind, 0, CAPACITY, SEGMENT)
    opened.append(slab)
    slab.commit(0, 2 * SEGMENT, prefault=True)
    slab.commit(2 * SEGMENT, 4 * SEGMENT, prefault=False)
    with words(OwnerWords) as block:
        published = slab.adopt(block, block.whole)
        device = api.tensor(torch.rand(SEGMENT // 2))
        specs = put(slab, SEGMENT, {"there": device, "here": torch.rand(SEGMENT // 4)})
        order = slab.order()
        slab.signal(published, 9, 1, order)
        if kind == VMM:
            slab.enable_device(SECOND)
            to_device(slab, api, SEGMENT, specs[0], 1)
            slab.signal(published, 9, 2, slab.follow(order, [slab.order(SECOND)]))
        slab.finish()
        to_host(slab, SEGMENT, specs[1])
        slab.decommit(2 * SEGMENT, 4 * SEGMENT)
        slab.close()


def read(api: FakeApi, opened: Opened, slab: CudaSlab) -> None:
    """The whole life of a reader's mapping."""
    spec = put_one(slab, SEGMENT, torch.arange(SEGMENT // 4))
    mapping = attach(
        driver_over(api), PeerSlab(slab.kind, slab.device_name, CAPACITY, 0, slab.handle, []), None
    )
    opened.append(mapping)
    send_segments(slab, mapping)
    with words(SessionWords) as page:
        paid = mapping.adopt(page, page.whole)
        to_device(mapping, api, SEGMENT, spec)
        mapping.enable_device(SECOND)
        to_device(mapping, api, SEGMENT, spec, 1)
        order = mapping.follow(mapping.order(SECOND), [mapping.order()])
        mapping.signal(paid, 9, 1, order)
        to_host(mapping, SEGMENT, spec)
        mapping.finish()
        mapping.cut(2 * SEGMENT)
        mapping.close()


class Outcome(NamedTuple):
    kind: type[BaseException] | None
    message: str


def outcome(scene: Scene, api: FakeApi, opened: Opened) -> Outcome:
    """Run a scene; keep nothing of its error, whose traceback keeps tensors."""
    try:
        scene(api, opened)
    except (BackendUnavailable, MemoryError) as error:
        return Outcome(type(error), str(error))
    return Outcome(None, "")


def calls_of(scene: Scene) -> list[str]:
    """Return the calls that a scene makes; all of its undoing is in it."""
    api = FakeApi()
    scene(api, [])
    assert api.leftovers() == {}
    assert api.broken == []
    return api.calls


@pytest.fixture(params=["the owner, VMM", "the owner, IPC", "a reader, VMM", "a reader, IPC"])
def scene(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[Scene]:
    who, kind = request.param.split(", ")
    kind = VMM if kind == "VMM" else IPC
    if who == "the owner":
        yield lambda api, opened: own(api, opened, kind)
    else:
        slab = make_slab(FakeApi(), kind, committed=4 * SEGMENT)
        yield lambda api, opened: read(api, opened, slab)
        slab.close()


def more_than(before: Counter[str]) -> dict[str, int]:
    """Return which descriptors there are more of; an error's traceback may hold some in a cycle."""
    if difference(before, open_descriptors()):
        gc.collect()
    return difference(before, open_descriptors())


def _apt(call: str, code: Code) -> bool:
    """Whether the driver's documentation has this code, or one like it, for the call."""
    if code is Code.CUDA_ERROR_UNKNOWN:
        return True
    if code is Code.CUDA_ERROR_OUT_OF_MEMORY:
        return call in {
            *("cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemAddressReserve", "cuMemAlloc"),
            *("cuIpcOpenMemHandle", "cuMemHostRegister", "cuStreamCreate", "cuEventCreate"),
            *("cuDevicePrimaryCtxRetain", "cuMemImportFromShareableHandle"),
        }
    return call.startswith(("cuMem", "cuIpc", "cuStreamWriteValue"))


@pytest.mark.parametrize(
    "code",
    [
        Code.CUDA_ERROR_UNKNOWN,
        Code.CUDA_ERROR_OUT_OF_MEMORY,
        Code.CUDA_ERROR_NOT_SUPPORTED,
        Code.CUDA_ERROR_PEER_ACCESS_UNSUPPORTED,
    ],
    ids=lambda code: code.name,
)
def test_each_call_fails_once(scene: Scene, code: Code) -> None:
    for index, call in enumerate(calls_of(scene)):
        if _apt(call, code):
            before = open_descriptors()
            _fail_once(scene, index, call, code)
            assert more_than(before) == {}, f"{call}, call {index}"


def _fail_once(scene: Scene, index: int, call: str, code: Code) -> None:
    at = f"{call}, call {index}"
    api, opened = FakeApi(), Opened()
    api.fail_at(index, code)
    found = outcome(scene, api, opened)
    api.run_all()
    for mapping in opened:
        mapping.close()
    _check_error(found, call, code, at)
    left = api.leftovers()
    if call == "cuEventDestroy":  # only the context's end destroys it now
        assert len(left.pop("events")) == 1, at
    if call == "cuCtxPopCurrent":
        del left["contexts left current"]
    assert left == {}, at
    assert api.broken == [], at


def _check_error(found: Outcome, call: str, code: Code, at: str) -> None:
    if call in QUIET:
        assert found.kind is None, at
        return
    assert found.kind is not None, at
    assert f"{call}: {code.name} ({int(code)}): " in found.message, at
    assert not found.message.endswith(": "), f"{at} gives no advice"
    if code is Code.CUDA_ERROR_OUT_OF_MEMORY:
        assert issubclass(found.kind, (MemoryError, BackendUnavailable)), at
    if code is Code.CUDA_ERROR_PEER_ACCESS_UNSUPPORTED and call == "cuIpcOpenMemHandle":
        assert found.kind is Unreachable, at


def test_a_context_is_lost_at_each_call(scene: Scene) -> None:
    for index, call in enumerate(calls_of(scene)):
        before = open_descriptors()
        _lose_context(scene, index, call)
        assert more_than(before) == {}, call


def _lose_context(scene: Scene, index: int, call: str) -> None:
    api, opened = FakeApi(), Opened()
    api.lose(at=index)
    found = outcome(scene, api, opened)
    if call not in QUIET:
        assert "ILLEGAL_ADDRESS (700)" in found.message, call
        assert "restart the process" in found.message, call
    for mapping in opened:
        with suppress(DriverError):
            mapping.close()
    assert "descriptors" not in api.leftovers(), call
    api.end()


def test_attaching_again_after_a_failure(scene: Scene) -> None:
    """One process, one driver: a failure leaves it able to do it all again."""
    api = FakeApi()
    for call in sorted(set(calls_of(scene)) - {"cuEventDestroy", "cuCtxPopCurrent", "cuInit"}):
        opened = Opened()
        api.fail(call)
        outcome(scene, api, opened)
        api.run_all()
        for mapping in opened:
            mapping.close()
        scene(api, [])
        assert api.leftovers() == {}, call
    assert api.broken == []


def test_an_error_in_the_end_does_not_keep_the_rest(api: FakeApi, peer_api: FakeApi) -> None:
    slab = make_slab(api, committed=4 * SEGMENT)
    reader = attach_to(slab, peer_api)
    reader.enable_device(SECOND)
    with words(SessionWords) as one, words(SessionWords) as other:
        for page in (one, other):
            reader.adopt(page, page.whole)
        to_host(reader, 0, put_one(slab, 0, torch.rand(4)))
        for call in ("cuMemHostUnregister", "cuStreamDestroy", "cuMemUnmap"):
            peer_api.fail(call)
        with pytest.raises(DriverError):
            reader.close()
        left = peer_api.leftovers()
        assert {kind: len(what) for kind, what in left.items()} == {
            "registrations": 1,
            "streams": 1,
            "regions": 1,
            "handles": 1,
            "reservations": 1,
        }
        reader.close()
        assert peer_api.leftovers() == {}
    slab.close()
