"""Checked calls: what a failed one says, and how the real driver is opened."""

import pickle
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from featcache.errors import BackendUnavailable
from featcache.memory.cuda import driver as driver_module
from featcache.memory.cuda.driver import DeviceMemoryError, Driver, DriverError, load
from memory.fakecuda import GRANULARITY_BYTES, Code, FakeApi, driver_over, uuid_of


@pytest.mark.parametrize("code", [code for code in Code if code])
def test_an_error_names_the_call_the_code_and_what_to_do(api: FakeApi, code: Code) -> None:
    driver = driver_over(api)
    api.fail("cuDeviceGetCount", code=code)
    with pytest.raises(BackendUnavailable) as caught:
        driver.device_count()
    error = caught.value
    assert isinstance(error, DriverError)
    assert (error.call, error.code) == ("cuDeviceGetCount", code)
    head, _, advice = str(error).partition(f"cuDeviceGetCount: {code.name} ({code.value}): ")
    assert head == ""
    assert len(advice) > 10
    assert isinstance(error, MemoryError) == (code is Code.CUDA_ERROR_OUT_OF_MEMORY)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, BackendUnavailable)
    assert str(again) == str(error)


def test_a_code_that_nobody_knows(api: FakeApi) -> None:
    with pytest.raises(DriverError, match=r"cuX: an unknown code \(4711\)"):
        driver_over(api).fail("cuX", 4711)


@pytest.mark.parametrize(
    ("visible", "code"),
    [((), Code.CUDA_ERROR_NO_DEVICE), ((0,), Code.CUDA_ERROR_NOT_INITIALIZED)],
    ids=["no device", "no driver"],
)
def test_no_driver_without_a_device(visible: tuple[int, ...], code: Code) -> None:
    api = FakeApi(visible)
    api.fail("cuInit", code=code)
    with pytest.raises(DriverError, match=f"cuInit: {code.name}"):
        driver_over(api)


def test_devices_by_their_names(api: FakeApi) -> None:
    driver = driver_over(FakeApi((3, 1)))
    assert [driver.uuid_of(n) for n in range(driver.device_count())] == [uuid_of(3), uuid_of(1)]
    assert driver.ordinal_of(uuid_of(1)) == 1
    assert driver.ordinal_of(uuid_of(0)) is None
    assert driver.can_reach(0, 1)
    assert driver.can_reach(1, 1)
    assert driver.granularity_bytes(1) == GRANULARITY_BYTES
    with pytest.raises(DriverError, match=r"cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
        driver.uuid_of(2)
    apart = driver_over(FakeApi(peers=False))
    assert not apart.can_reach(0, 1)
    assert apart.can_reach(1, 1)


def test_contexts_are_retained_once_and_nest(api: FakeApi) -> None:
    driver = driver_over(api)
    with driver.on(0), driver.on(1):
        assert api._stack == [0, 1]
    with pytest.raises(KeyError), driver.on(0):
        raise KeyError
    assert api._stack == []
    assert api.calls.count("cuDevicePrimaryCtxRetain") == 2


def test_an_event_that_is_not_recorded_is_dropped(api: FakeApi) -> None:
    driver = driver_over(api)
    api.fail("cuEventRecord")
    with driver.on(0), pytest.raises(DriverError, match="cuEventRecord"):
        driver.mark(api.CUstream(0))
    assert api.leftovers() == {}


# --- the real one ---------------------------------------------------------------------------------


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "_loaded", [])
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_the_bindings_it_says_what_to_install(nothing_loaded: None) -> None:
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=r"pip install 'featcache\[cuda\]'"):
            load()


def test_the_driver_is_opened_once(
    nothing_loaded: None, monkeypatch: pytest.MonkeyPatch, api: FakeApi
) -> None:
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", api)
    api.fail("cuInit")
    with pytest.raises(DriverError, match="cuInit"):
        load()
    driver = load()
    assert isinstance(driver, Driver)
    assert load() is driver
    assert driver.device(1) == torch.device("cuda", 1)
    assert api.calls == ["cuInit"] * 2


def test_running_out_of_memory_is_both(api: FakeApi) -> None:
    driver = driver_over(api)
    api.memory.total_bytes = GRANULARITY_BYTES
    with driver.on(0):
        for allocate in (
            lambda: driver.create(0, 2 * GRANULARITY_BYTES),
            lambda: driver.allocate(2 * GRANULARITY_BYTES),
        ):
            with pytest.raises(DeviceMemoryError, match="no such memory left"):
                allocate()


def test_segments_are_made_for_network_cards_where_the_device_can(api: FakeApi) -> None:
    api.attributes[110] = 1
    driver = driver_over(api)
    with driver.on(0):
        handle = driver.create(0, GRANULARITY_BYTES)
        driver.release(handle)
    assert api.for_rdma == [True]


def test_segments_are_made_as_ever_where_the_device_can_not(api: FakeApi) -> None:
    driver = driver_over(api)
    with driver.on(0):
        driver.release(driver.create(0, GRANULARITY_BYTES))
    assert api.for_rdma == [False]


@pytest.mark.parametrize(
    "code", [Code.CUDA_ERROR_NOT_SUPPORTED, Code.CUDA_ERROR_NOT_PERMITTED], ids=lambda c: c.name
)
def test_a_segment_that_is_refused_for_network_cards_is_made_without(
    api: FakeApi, code: Code
) -> None:
    """And so are all after it: it is not tried twice."""
    api.attributes[110], api.rdma_refused = 1, code
    driver = driver_over(api)
    with driver.on(0):
        for _ in range(2):
            driver.release(driver.create(0, GRANULARITY_BYTES))
    assert api.for_rdma == [False, False]
    assert api.calls.count("cuMemCreate") == 3


def test_a_granularity_that_is_refused_for_network_cards_is_asked_for_without(
    api: FakeApi,
) -> None:
    api.attributes[110] = 1
    api.fail("cuMemGetAllocationGranularity", code=Code.CUDA_ERROR_NOT_SUPPORTED)
    assert driver_over(api).granularity_bytes(0) == GRANULARITY_BYTES


def test_memory_that_runs_out_is_not_asked_for_twice(api: FakeApi) -> None:
    api.attributes[110], api.rdma_refused = 1, Code.CUDA_ERROR_OUT_OF_MEMORY
    driver = driver_over(api)
    with driver.on(0), pytest.raises(DeviceMemoryError):
        driver.create(0, GRANULARITY_BYTES)
    assert api.calls.count("cuMemCreate") == 1


@pytest.mark.parametrize(
    ("ordering", "options", "needs"),
    [(0, 1, True), (100, 1, True), (200, 1, False), (100, 2, False)],
    ids=["none", "owner alone", "all devices", "no call of the host's"],
)
def test_writes_of_network_cards_are_flushed_where_the_device_does_not_order_them(
    api: FakeApi, ordering: int, options: int, needs: bool
) -> None:
    api.attributes[118], api.attributes[117] = ordering, options
    assert driver_over(api).needs_flush(0) is needs


def test_a_thread_that_enters_a_device_stays_there(api: FakeApi) -> None:
    driver, stayed = driver_over(api), list[int]()

    def work() -> None:
        driver.enter(1)
        with driver.on(0):
            pass
        driver.flush_remote_writes()
        stayed.append(int(api.cuCtxGetCurrent()[1]) - int(driver.context(0)))

    api.attributes[117] = 1
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert stayed == [1]
