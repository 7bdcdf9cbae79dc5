"""What is behind a slab's addresses: kept up by tensors, taken down once, never by a forked child."""

import os
import signal
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from featcache.errors import CacheClosed
from featcache.memory.cuda.backend import attach
from featcache.memory.cuda.backing import IPC, VMM, IpcBacking, SegmentBacking
from featcache.memory.cuda.driver import DriverError
from featcache.memory.cuda.mapping import CudaMapping
from featcache.memory.slab import PeerSlab, Unreachable
from featcache.ref import TensorSpec
from memory.cudaslabs import (
    CAPACITY,
    SECOND,
    SEGMENT,
    attach_to,
    make_slab,
    put_one,
    same,
    to_device,
    to_host,
)
from memory.fakecuda import Code, FakeApi, driver_over
from support.processes import no_threads

NewApi = Callable[..., FakeApi]
KINDS = pytest.mark.parametrize("kind", [VMM, IPC])


class _Ended:
    """Sees the threads that take backings down, and waits for them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.threads: list[threading.Thread] = []
        self.started = threading.Event()
        start = threading.Thread.start

        def seen(thread: threading.Thread) -> None:
            self.threads.append(thread)
            start(thread)
            self.started.set()

        patch.setattr(threading.Thread, "start", seen)

    def wait(self) -> None:
        """Wait until one has started, and all have ended."""
        assert self.started.wait(20)
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> _Ended:
    return _Ended(monkeypatch)


# --- tensors keep it up ---------------------------------------------------------------------------


@KINDS
def test_tensors_keep_the_memory_when_the_mapping_is_closed(
    api: FakeApi, peer_api: FakeApi, kind: str, ended: _Ended
) -> None:
    slab = make_slab(api, kind, committed=2 * SEGMENT)
    value = torch.arange(SEGMENT // 8 + 5)
    spec = put_one(slab, 0, value)
    reader = attach_to(slab, peer_api)
    reader.enable_device(SECOND)
    views = [mapping.view(0, spec) for mapping in (slab, reader)]
    part = reader.view(0, spec, SECOND)[3:].view(torch.uint8)
    for mapping in (reader, slab):
        mapping.close()
        mapping.close()
    assert all(same(view, value) for view in views)
    assert api.leftovers().keys() <= {"handles", "regions", "reservations"}, "no descriptors"
    del views
    assert same(part.view(torch.int64), value[3:])
    peers = len(peer_api.leftovers())
    assert peers
    del part
    ended.wait()
    assert len(ended.threads) == 2
    assert peer_api.leftovers() == {}
    assert api.leftovers() == {}


@pytest.mark.parametrize("ordinal", [0, 1])
def test_what_read_it_last_is_waited_for(
    api: FakeApi, peer_api: FakeApi, ended: _Ended, ordinal: int
) -> None:
    slab = make_slab(api, committed=2 * SEGMENT)
    spec = put_one(slab, 0, torch.rand(5))
    reader = attach_to(slab, peer_api)
    reader.enable_device(SECOND)
    view = reader.view(0, spec)
    peer_api.side_stream(ordinal)
    out = to_device(reader, peer_api, 0, spec, ordinal)  # in progress, as a user's kernel may be
    reader.close()
    assert not same(out, view)
    value = view.clone()
    del view
    ended.wait()
    assert same(out, value)
    assert peer_api.leftovers() == {}
    slab.close()


def test_a_lost_context_when_the_last_tensor_goes(
    new_api: NewApi, api: FakeApi, ended: _Ended
) -> None:
    slab = make_slab(api, committed=2 * SEGMENT)
    view = slab.view(0, put_one(slab, 0, torch.rand(5)))
    slab.close()
    api.lose()
    del view
    ended.wait()  # a thread that raised would be a warning, which is an error
    assert "descriptors" not in api.leftovers()
    api.end()


def test_no_thread_can_be_started_for_the_last_tensor(api: FakeApi) -> None:
    slab = make_slab(api, committed=SEGMENT)
    view = slab.view(0, put_one(slab, 0, torch.rand(5)))
    slab.close()
    with no_threads():
        del view
    assert api.leftovers() == {}


def test_the_last_tensor_goes_in_the_middle_of_a_change(api: FakeApi) -> None:
    """As when the collector drops it in the thread that holds the lock of changes."""
    slab = make_slab(api, committed=SEGMENT)
    view = slab.view(0, put_one(slab, 0, torch.rand(5)))
    slab.close()
    with slab._memory._changing, no_threads():
        del view
        assert api.leftovers()
    slab.close()
    assert api.leftovers() == {}


def test_the_last_tensor_goes_while_the_interpreter_ends(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab = make_slab(api, committed=SEGMENT)
    view = slab.view(0, put_one(slab, 0, torch.rand(5)))
    slab.close()
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    with no_threads():
        del view
    assert api.leftovers()
    slab.close()
    assert api.leftovers() == {}


def test_closing_again_while_the_last_tensor_goes(api: FakeApi, ended: _Ended) -> None:
    slab = make_slab(api, committed=4 * SEGMENT)
    view = slab.view(0, put_one(slab, 0, torch.rand(5)))
    slab.close()
    del view
    slab.close()
    ended.wait()
    slab.close()
    assert api.calls.count("cuMemAddressFree") == 1
    assert api.leftovers() == {}


@KINDS
def test_a_storage_that_torch_does_not_make(
    api: FakeApi, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_capsule: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("featcache.memory.dlpack.from_dlpack", refuse)
        with pytest.raises(RuntimeError, match="out of memory"):
            make_slab(api, kind)
    assert api.leftovers() == {}
    make_slab(api, kind).close()


# --- several threads ------------------------------------------------------------------------------


class Meeting:
    """Has a thread stand in a call until another one comes there too, or to a lock that bars it."""

    def __init__(self, api: FakeApi, call: str) -> None:
        self.inside = threading.Event()
        self._other = threading.Semaphore(0)
        api.before[call] = self._stand

    def _stand(self) -> None:
        if self.inside.is_set():
            self._other.release()
        else:
            self.inside.set()
            assert self._other.acquire(timeout=20)

    def at(self, owner: object, name: str) -> None:
        """Take the place of a lock."""
        lock, meeting = getattr(owner, name), self

        class Seen:
            def __enter__(self) -> None:
                if meeting.inside.is_set():
                    meeting._other.release()
                lock.acquire()

            def __exit__(self, *_: object) -> None:
                lock.release()

        setattr(owner, name, Seen())

    def hold(self, first: Callable[[], object], second: Callable[[], object]) -> None:
        """Do both, the second while the first stands in the call."""
        thread = threading.Thread(target=first)
        thread.start()
        assert self.inside.wait(20)
        second()
        thread.join(20)
        assert not thread.is_alive()


def test_a_device_is_opened_while_a_segment_comes(api: FakeApi, peer_api: FakeApi) -> None:
    slab = make_slab(api, committed=2 * SEGMENT)
    reader = attach(
        driver_over(peer_api), PeerSlab(VMM, slab.device_name, CAPACITY, 0, b"", []), None
    )
    first, second = slab.segments(0, CAPACITY)
    reader.extend(*first)
    meeting = Meeting(peer_api, "cuMemSetAccess")
    meeting.at(reader._backing, "_changing")
    meeting.hold(lambda: reader.enable_device(SECOND), lambda: reader.extend(*second))
    spec = put_one(slab, 0, torch.arange(2 * SEGMENT // 8))
    out = to_device(reader, peer_api, 0, spec, 1)
    peer_api.run_all()
    assert same(out, to_host(slab, 0, spec))
    reader.close()
    slab.close()


def test_copies_to_the_host_in_threads_share_one_stream(api: FakeApi) -> None:
    slab = make_slab(api, committed=SEGMENT)
    spec = TensorSpec(None, "uint8", (64,), 0)
    meeting = Meeting(api, "cuStreamCreate")
    meeting.at(slab._home, "_lock")
    meeting.hold(lambda: to_host(slab, 0, spec), lambda: to_host(slab, 0, spec))
    assert api.calls.count("cuStreamCreate") == 1
    slab.close()


def test_a_thread_that_never_used_cuda(api: FakeApi) -> None:
    slab = make_slab(api, committed=SEGMENT)
    spec = put_one(slab, 0, torch.arange(64))
    found: list[torch.Tensor] = []
    worker = threading.Thread(target=lambda: found.append(to_device(slab, api, 0, spec)))
    worker.start()
    worker.join(20)
    api.run_all()
    assert same(found[0], torch.arange(64))
    assert api.calls.count("cuCtxGetCurrent") >= 2
    slab.close()


def test_another_context_is_current(api: FakeApi) -> None:
    slab = make_slab(api, committed=SEGMENT)
    spec = put_one(slab, 0, torch.arange(64))
    with driver_over(api).on(1):
        out = to_device(slab, api, 0, spec)
        assert api._stack == [1]
    api.run_all()
    assert same(out, torch.arange(64))
    slab.close()


def test_a_context_that_is_current_is_not_pushed_again(api: FakeApi) -> None:
    slab = make_slab(api, committed=SEGMENT)
    spec = put_one(slab, 0, torch.arange(64))
    out = api.tensor(torch.empty(64, dtype=torch.int64))
    with driver_over(api).on(0):
        before = len(api.calls)
        slab.read(0, spec, out, slab.order())
        assert api.calls[before:] == ["cuCtxGetCurrent", "cuMemcpyAsync"]
    slab.finish()
    slab.close()


# --- forks ----------------------------------------------------------------------------------------


def in_fork(work: Callable[[], None]) -> None:
    """Do something in a forked child, which fails the test if it raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # one that hangs dies
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@KINDS
@pytest.mark.parametrize("who", ["owner", "reader"])
def test_a_forked_child_makes_no_call(api: FakeApi, peer_api: FakeApi, kind: str, who: str) -> None:
    slab = make_slab(api, kind, committed=2 * SEGMENT)
    spec = put_one(slab, 0, torch.rand(4))
    reader = attach_to(slab, peer_api)
    mapping: CudaMapping = slab if who == "owner" else reader
    kept = [mapping.view(0, spec)]
    fds = [segment.fd for segment in slab.segments(0, CAPACITY)] if who == "owner" else []
    backing = mapping._backing
    assert isinstance(backing, (SegmentBacking, IpcBacking))
    before = len(api.calls), len(peer_api.calls)

    def forget() -> None:
        mapping.forget()
        kept.clear()  # the last tensor goes here, in a child, where nobody takes anything down
        backing.close()
        assert (len(api.calls), len(peer_api.calls)) == before
        for fd in fds:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        with pytest.raises(CacheClosed):
            mapping.view(0, spec)

    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with backing._lock, backing._changing:
            held.set()
            go_on.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(20)
    in_fork(forget)
    go_on.set()
    holder.join(20)
    assert same(mapping.view(0, spec), kept[0])
    kept.clear()
    reader.close()
    slab.close()


def test_a_driver_called_in_a_forked_child_refuses(api: FakeApi) -> None:
    driver = driver_over(api)

    def call() -> None:
        with pytest.raises(DriverError, match="cuDeviceGetCount: CUDA_ERROR_NOT_INITIALIZED"):
            driver.device_count()

    in_fork(call)


# --- failures that are not the driver's ------------------------------------------------------------


def test_a_device_that_can_not_be_opened_leaves_the_others(api: FakeApi, peer_api: FakeApi) -> None:
    slab = make_slab(api, committed=4 * SEGMENT)
    spec = put_one(slab, 0, torch.rand(SEGMENT // 4 + 4))
    reader = attach_to(slab, peer_api)
    peer_api.fail("cuMemSetAccess", 3, Code.CUDA_ERROR_NOT_PERMITTED)
    with pytest.raises(Unreachable, match="cuMemSetAccess"):
        reader.enable_device(SECOND)
    assert not reader.can_copy_to(SECOND)
    reader.enable_device(SECOND)
    out = to_device(reader, peer_api, 0, spec, 1)
    peer_api.run_all()
    assert same(out, to_host(slab, 0, spec))
    reader.close()
    slab.close()
