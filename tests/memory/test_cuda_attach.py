"""Readers of a slab on a GPU: in other processes, on other devices, read-only, as it grows."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from featcache.errors import AttachRefused, BackendUnavailable
from featcache.memory.cuda.backend import attach
from featcache.memory.cuda.backing import IPC, VMM
from featcache.memory.cuda.driver import DriverError
from featcache.memory.cuda.mapping import CudaMapping
from featcache.memory.cuda.slab import CudaSlab
from featcache.memory.slab import PeerSlab, Unreachable
from featcache.memory.words import SessionWords
from featcache.ref import TensorSpec
from memory.cudaslabs import (
    CAPACITY,
    SECOND,
    SEGMENT,
    attach_to,
    make_slab,
    put_one,
    same,
    send_segments,
    to_device,
    to_host,
)
from memory.fakecuda import Broken, Code, FakeApi, driver_over, uuid_of
from support.processes import Pipe, Start, starting

NewApi = Callable[..., FakeApi]
KINDS = pytest.mark.parametrize("kind", [VMM, IPC])
FIRST = torch.device("cuda", 0)


def close(*mappings: CudaMapping) -> None:
    for mapping in mappings:
        mapping.close()


# --- bytes ---------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("device", [None, FIRST, SECOND], ids=str)
def test_a_reader_sees_the_bytes_across_borders(
    api: FakeApi, peer_api: FakeApi, kind: str, device: torch.device | None
) -> None:
    slab = make_slab(api, kind, committed=4 * SEGMENT)
    value = torch.arange(3 * SEGMENT // 8)
    spec = put_one(slab, 512, value)
    reader = attach_to(slab, peer_api, device)
    assert reader.end_bytes == slab.end_bytes
    ordinal = 0 if device is None else device.index
    assert reader.can_copy_to(torch.device("cuda", ordinal))
    assert reader.can_copy_to(None)
    assert reader.can_copy_to(torch.device("cpu"))
    out = to_device(reader, peer_api, 512, spec, ordinal)
    peer_api.run_all()
    for seen in (out, reader.view(512, spec), to_host(reader, 512, spec)):
        assert same(seen, value)
    close(reader, slab)


@KINDS
def test_a_payment_comes_after_the_read(api: FakeApi, peer_api: FakeApi, kind: str) -> None:
    slab = make_slab(api, kind, committed=CAPACITY)
    value = torch.rand(100)
    spec = put_one(slab, 0, value)
    reader = attach_to(slab, peer_api)
    page, fd = SessionWords.create(4)
    paid = reader.adopt(page, page.released)
    peer_api.side_stream()
    order = reader.order()
    out = to_device(reader, peer_api, 0, spec)
    reader.signal(paid, 1, 77, order)
    assert (page.released[1], same(out, value)) == (0, False)
    peer_api.step(peer_api.current[0])
    assert (page.released[1], same(out, value)) == (0, True)
    peer_api.run_all()
    assert page.released[1] == 77
    close(reader, slab)
    os.close(fd)


def test_a_reader_can_not_write(api: FakeApi, new_api: NewApi) -> None:
    slab = make_slab(api, committed=SEGMENT)
    peer_api = new_api()
    reader = attach_to(slab, peer_api)
    with pytest.raises(Broken, match="may not"):
        reader._home.copy_now(reader._home.address, torch.rand(4).data_ptr(), 16)
    peer_api.broken.clear()
    close(reader, slab)


async def _read_in_a_child(
    pipe: Pipe, kind: str, device_name: str, handle: bytes, segments: list[tuple[int, int, int]]
) -> None:
    api = FakeApi()
    reader = attach(driver_over(api), PeerSlab(kind, device_name, CAPACITY, 0, handle, []), None)
    owner = os.getppid()
    pipe.say("attached")
    owner, spec, offset = await pipe.hear()
    for start, size, number in segments:
        fd = os.open(f"/proc/{owner}/fd/{number}", os.O_RDWR)
        reader.extend(start, size, fd)
        os.close(fd)
    out = to_device(reader, api, offset, spec)
    api.run_all()
    view, host = reader.view(offset, spec), to_host(reader, offset, spec)
    pipe.say("sums", int(out.sum()), int(view.sum()), int(host.sum()))
    del view, host
    reader.close()
    pipe.say("left", api.leftovers(), api.broken)


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as start:
        yield start


@KINDS
async def test_a_reader_in_another_process(api: FakeApi, start: Start, kind: str) -> None:
    slab = make_slab(api, kind, committed=4 * SEGMENT)
    value = torch.arange(3 * SEGMENT // 8)
    spec = put_one(slab, SEGMENT - 256, value)
    segments = [tuple(segment) for segment in slab.segments(0, CAPACITY)]
    child = start(_read_in_a_child, kind, slab.device_name, slab.handle, segments)
    await child.expect("attached")
    child.tell(os.getpid(), spec, SEGMENT - 256)
    await child.expect("sums", *[int(value.sum())] * 3)
    await child.expect("left", {}, [])
    await child.ends()
    slab.close()


# --- devices -------------------------------------------------------------------------------------


@KINDS
def test_another_device_opens_the_slab_later(api: FakeApi, peer_api: FakeApi, kind: str) -> None:
    slab = make_slab(api, kind, committed=2 * SEGMENT)
    spec = put_one(slab, 0, torch.arange(SEGMENT // 8 + 8))
    reader = attach_to(slab, peer_api)
    for use in (lambda: reader.order(SECOND), lambda: reader.view(0, spec, SECOND)):
        assert not reader.can_copy_to(SECOND)
        with pytest.raises(Unreachable, match="has not opened"):
            use()
    reader.enable_device(SECOND)
    before = len(peer_api.calls)
    reader.enable_device(SECOND)
    reader.enable_device(FIRST)
    assert len(peer_api.calls) == before, "they are open"
    slab.commit(2 * SEGMENT, 4 * SEGMENT, prefault=False)
    send_segments(slab, reader)
    later = put_one(slab, 2 * SEGMENT, torch.arange(SEGMENT // 4))
    for ordinal, offset, what in ((0, 0, spec), (1, 0, spec), (1, 2 * SEGMENT, later)):
        out = to_device(reader, peer_api, offset, what, ordinal)
        peer_api.run_all()
        assert same(out, to_host(slab, offset, what))
        assert same(reader.view(offset, what, torch.device("cuda", ordinal)), out)
    close(reader, slab)


def test_the_owner_reads_on_its_other_device(api: FakeApi, new_api: NewApi) -> None:
    slab = make_slab(api, committed=SEGMENT)
    value = torch.rand(8)
    spec = put_one(slab, 0, value)
    slab.enable_device(SECOND)
    out = to_device(slab, api, 0, spec, 1)
    api.run_all()
    assert same(out, value)
    slab.close()
    legacy = make_slab(api, IPC)
    with pytest.raises(Unreachable):
        legacy.enable_device(SECOND)
    assert not legacy.can_copy_to(SECOND)
    legacy.close()


@KINDS
def test_no_peer_access(api: FakeApi, new_api: NewApi, kind: str) -> None:
    slab = make_slab(api, kind, committed=SEGMENT)
    apart = new_api(peers=False)
    with pytest.raises(Unreachable, match="no peer access"):
        attach_to(slab, apart, SECOND)
    spec = put_one(slab, 0, torch.rand(8))
    reader = attach_to(slab, apart)
    with pytest.raises(Unreachable, match=r"PEER_ACCESS_UNSUPPORTED \(217\)"):
        reader.enable_device(SECOND)
    assert not reader.can_copy_to(SECOND)
    out = to_device(reader, apart, 0, spec)
    apart.run_all()
    assert same(out, to_host(slab, 0, spec)), "the first goes on as before"
    close(reader, slab)


@KINDS
def test_the_slabs_device_is_hidden_from_the_reader(
    api: FakeApi, new_api: NewApi, kind: str
) -> None:
    slab = make_slab(api, kind, committed=SEGMENT)
    spec = put_one(slab, 0, torch.rand(8))
    peer_api = new_api((1,))
    assert driver_over(peer_api).ordinal_of(uuid_of(0)) is None
    reader = attach_to(slab, peer_api, FIRST)  # its own first one, the machine's second
    out = to_device(reader, peer_api, 0, spec)
    peer_api.run_all()
    assert same(out, to_host(slab, 0, spec))
    reader.close()
    with pytest.raises(Unreachable, match="PEER_ACCESS_UNSUPPORTED"):
        attach_to(slab, new_api((1,), peers=False), FIRST)
    slab.close()


# --- what a reader must not believe ----------------------------------------------------------------


def test_segments_that_do_not_follow(api: FakeApi, peer_api: FakeApi) -> None:
    slab = make_slab(api, committed=2 * SEGMENT)
    reader = attach_to(slab, peer_api)
    fd = slab.segments(0, CAPACITY)[0].fd
    for start, size in (
        (0, SEGMENT),
        (SEGMENT, SEGMENT),
        (3 * SEGMENT, SEGMENT),
        (2 * SEGMENT, CAPACITY),
    ):
        with pytest.raises(AttachRefused, match="does not follow"):
            reader.extend(start, size, fd)
    for size in (2 * SEGMENT, 1, 0, SEGMENT - 1):
        with pytest.raises(DriverError, match="cuMemMap: CUDA_ERROR_INVALID_VALUE"):
            reader.extend(2 * SEGMENT, size, fd)
    assert reader.end_bytes == 2 * SEGMENT
    close(reader, slab)


def test_descriptors_of_something_else(api: FakeApi, peer_api: FakeApi) -> None:
    slab = make_slab(api, committed=SEGMENT)
    reader = attach_to(slab, peer_api)
    fd = os.memfd_create("fakecudalike")
    for wrong in (fd, 999_999):
        with pytest.raises(DriverError, match="cuMemImportFromShareableHandle"):
            reader.extend(SEGMENT, SEGMENT, wrong)
    os.close(fd)
    close(reader, slab)


def test_legacy_handles_of_nothing(api: FakeApi, peer_api: FakeApi) -> None:
    slab = make_slab(api, IPC)
    driver = driver_over(peer_api)
    for handle in (bytes(64), slab.handle[:16] + bytes(48)):
        with pytest.raises(BackendUnavailable, match="cuIpcOpenMemHandle"):
            attach(driver, PeerSlab(IPC, slab.device_name, CAPACITY, 0, handle, []), None)
    with pytest.raises(BackendUnavailable, match="INVALID_CONTEXT"):
        attach(
            driver_over(api), PeerSlab(IPC, slab.device_name, CAPACITY, 0, slab.handle, []), None
        )
    reader = attach_to(slab, peer_api)
    with pytest.raises(AttachRefused, match="one fixed"):
        reader.extend(0, SEGMENT, 0)
    reader.cut(0)
    assert reader.end_bytes == CAPACITY
    close(reader, slab)


# --- growing and shrinking -----------------------------------------------------------------------


def _write_and_read(slab: CudaSlab, reader: CudaMapping, offset: int, value: int) -> None:
    spec = put_one(slab, offset, torch.full((SEGMENT // 4,), value, dtype=torch.int32))
    assert same(to_host(reader, offset, spec), to_host(slab, offset, spec))
    assert int(reader.view(offset, spec)[-1]) == value


def test_a_slab_grows_and_shrinks_at_the_same_offsets(api: FakeApi, peer_api: FakeApi) -> None:
    slab = make_slab(api)
    reader = attach_to(slab, peer_api)
    slab.commit(0, 3 * SEGMENT, prefault=True)
    assert [s[:2] for s in slab.segments(0, CAPACITY)] == [(0, 3 * SEGMENT)], "one, never released"
    slab.commit(3 * SEGMENT, 6 * SEGMENT, prefault=False)
    send_segments(slab, reader)
    kept = put_one(slab, 0, torch.arange(100))
    for value in (1, 2, 3):
        assert [s.start_bytes for s in slab.segments(3 * SEGMENT, CAPACITY)] == [
            start * SEGMENT for start in (3, 4, 5)
        ]
        _write_and_read(slab, reader, 4 * SEGMENT - 4096, value)
        for mapping in (reader, slab):
            mapping.cut(4 * SEGMENT)
            assert mapping.end_bytes == 4 * SEGMENT
        slab.decommit(3 * SEGMENT, 4 * SEGMENT)
        reader.cut(3 * SEGMENT)
        slab.commit(3 * SEGMENT, 6 * SEGMENT, prefault=False)
        send_segments(slab, reader)
        fresh = TensorSpec(None, "uint8", (3 * SEGMENT,), 0)
        assert not reader.view(3 * SEGMENT, fresh).any(), "new memory, not the old"
    assert same(to_host(reader, 0, kept), torch.arange(100))
    close(reader, slab)


def test_given_back_memory_is_free_when_the_reader_lets_it_go(
    api: FakeApi, peer_api: FakeApi
) -> None:
    slab = make_slab(api, committed=CAPACITY)
    api.memory.total_bytes = CAPACITY
    reader = attach_to(slab, peer_api)
    slab.decommit(SEGMENT, CAPACITY)
    with pytest.raises(MemoryError, match=r"cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        slab.commit(SEGMENT, CAPACITY, prefault=False)
    assert slab.end_bytes == SEGMENT
    reader.cut(SEGMENT)
    slab.commit(SEGMENT, CAPACITY, prefault=False)
    close(reader, slab)


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_out_of_memory_amid_a_commit_changes_nothing(api: FakeApi, call: str) -> None:
    slab = make_slab(api, committed=2 * SEGMENT)
    before = slab.segments(0, CAPACITY)
    spec = put_one(slab, SEGMENT, torch.rand(9))
    api.fail(call, 3, Code.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(MemoryError, match=call):
        slab.commit(2 * SEGMENT, CAPACITY, prefault=False)
    assert slab.segments(0, CAPACITY) == before
    assert slab.end_bytes == 2 * SEGMENT
    assert len(api.memory.handles) == 2
    to_host(slab, SEGMENT, spec)
    slab.commit(2 * SEGMENT, CAPACITY, prefault=False)
    assert slab.end_bytes == CAPACITY
    slab.close()


@pytest.mark.parametrize("call", ["cuMemUnmap", "cuMemRelease"])
def test_a_segment_that_would_not_go_is_taken_away_before_it_comes_again(
    api: FakeApi, call: str
) -> None:
    slab = make_slab(api, committed=4 * SEGMENT)
    for nth in (1, 2, 3):
        api.fail(call, nth)
        with pytest.raises(DriverError, match=call):
            slab.decommit(SEGMENT, 4 * SEGMENT)
        slab.commit(SEGMENT, 4 * SEGMENT, prefault=False)
        assert [s.start_bytes // SEGMENT for s in slab.segments(0, CAPACITY)] == [0, 1, 2, 3]
        assert len({s.fd for s in slab.segments(0, CAPACITY)}) == 4
    slab.close()


def test_work_on_a_segment_holds_up_nobody_but_who_would_unmap_it(
    api: FakeApi, new_api: NewApi
) -> None:
    slab = make_slab(api, committed=2 * SEGMENT)
    put_one(slab, SEGMENT, api.tensor(torch.rand(4)))
    with pytest.raises(Broken, match="work in flight"):
        slab.decommit(SEGMENT, 2 * SEGMENT)
    slab.finish()
    slab.decommit(SEGMENT, 2 * SEGMENT)
    slab.close()
    api.broken.clear()
