"""The slab on a GPU, over a fake driver that keeps the real one's rules."""

import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from featcache.errors import BackendUnavailable, CacheClosed, SettingsError
from featcache.memory.cuda.backend import choose_kind
from featcache.memory.cuda.backing import IPC, VMM
from featcache.memory.cuda.slab import CudaSlab
from featcache.memory.cuda.streams import StreamOrder
from featcache.memory.pack import DTYPES, pack
from featcache.memory.views import invalidate
from featcache.memory.words import OwnerWords
from featcache.settings import Settings
from memory.cudaslabs import (
    CAPACITY,
    SECOND,
    SEGMENT,
    make_slab,
    put,
    put_one,
    same,
    to_device,
    to_host,
)
from memory.fakecuda import FakeApi, OnDevice, driver_over, uuid_of

KINDS = pytest.mark.parametrize("kind", [VMM, IPC])


@pytest.fixture
def slab(api: FakeApi) -> Iterator[CudaSlab]:
    made = make_slab(api, committed=CAPACITY)
    yield made
    api.run_all()
    made.close()


# --- bytes ---------------------------------------------------------------------------------------


@KINDS
def test_what_a_slab_says_of_itself(api: FakeApi, kind: str) -> None:
    slab = make_slab(api, kind, ordinal=1)
    assert (slab.kind, slab.device_name, slab.capacity_bytes) == (kind, uuid_of(1), CAPACITY)
    assert slab.descriptors() == []
    assert len(slab.handle) == (64 if kind == IPC else 0)
    assert slab.end_bytes == (CAPACITY if kind == IPC else 0)
    slab.close()


@KINDS
def test_from_the_host_and_back(api: FakeApi, kind: str) -> None:
    slab = make_slab(api, kind, committed=CAPACITY)
    value = torch.arange(3 * SEGMENT // 8)
    spec = put_one(slab, SEGMENT - 512, value)  # across borders of segments
    assert same(to_host(slab, SEGMENT - 512, spec), value)
    assert same(slab.view(SEGMENT - 512, spec), value)
    slab.close()


@KINDS
def test_from_the_gpu_and_back_in_the_order_of_a_stream(api: FakeApi, kind: str) -> None:
    slab = make_slab(api, kind, committed=CAPACITY)
    value = torch.rand(SEGMENT // 2)
    raw = api.side_stream()
    spec = put_one(slab, 256, api.tensor(value))
    out = to_device(slab, api, 256, spec)
    assert not slab.view(256, spec).any(), "the copy is on its way"
    api.run()  # the default stream has nothing to do with it
    assert not slab.view(256, spec).any()
    api.run(raw)
    assert same(out, value)
    slab.close()


def _make(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    made = torch.empty(shape, dtype=dtype)
    raw = torch.randint(0, 256, (made.nbytes,), dtype=torch.uint8)
    if dtype is torch.bool:
        raw &= 1
    return made.set_(raw.untyped_storage(), 0, shape, made.stride())


@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (4, 0, 2), (1,)], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_each_dtype_and_shape(api: FakeApi, slab: CudaSlab, shape: tuple[int, ...]) -> None:
    for name, dtype in DTYPES.items():
        value = _make(dtype, shape)
        for source in (value, api.tensor(value)):
            spec = put_one(slab, 4096, source)
            out = to_device(slab, api, 4096, spec)
            api.run_all()
            assert same(out, value), name
            assert same(to_host(slab, 4096, spec), value), name


def _complex() -> torch.Tensor:
    return torch.complex(torch.rand(4, 6), torch.rand(4, 6))


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.rand(4, 6).t(),
    "every second": lambda: torch.rand(48)[::2],
    "transposed float8": lambda: torch.rand(4, 6).to(torch.float8_e4m3fn).t(),
    "transposed complex128": lambda: _complex().to(torch.complex128).t(),
    "conjugated": lambda: _complex().conj(),
    "conjugated and transposed": lambda: _complex().conj().t(),
    "negated": lambda: _complex().conj().imag,
    "conjugated scalar": lambda: _complex().conj()[0, 0],
    "with a gradient": lambda: torch.rand(4, 6, requires_grad=True).t(),
    "a conjugate with a gradient": lambda: torch.rand(
        4, 6, requires_grad=True, dtype=torch.complex64
    ).conj(),
    "a plain leaf": lambda: torch.rand(4, requires_grad=True),
    "expanded": lambda: torch.arange(6).expand(4, 6),
}


@pytest.mark.parametrize("how", ODD)
def test_what_is_not_plain_memory_is_made_so(api: FakeApi, slab: CudaSlab, how: str) -> None:
    value = ODD[how]()
    for source in (value, api.tensor(value.detach())):
        spec = put_one(slab, 256, source)
        api.run_all()
        assert same(to_host(slab, 256, spec), value.detach())


@pytest.mark.parametrize("how", [how for how in ODD if how != "expanded"])
@pytest.mark.parametrize("to", ["the host", "the device"])
def test_reads_into_what_is_not_plain_memory(
    api: FakeApi, slab: CudaSlab, how: str, to: str
) -> None:
    value, out = ODD[how]().detach(), ODD[how]()
    spec = put_one(slab, 256, value)
    assert not same(out.detach(), value)
    if to == "the host":
        slab.read(256, spec, out, None)
    else:
        slab.read(256, spec, api.tensor(out), slab.order())
        api.run_all()
    assert same(out.detach(), value)


def test_a_dict_from_here_and_there(api: FakeApi, slab: CudaSlab) -> None:
    here, there, odd = torch.arange(10), torch.rand(7), torch.rand(3, 4).t()
    feature: dict[str, torch.Tensor] = {
        "here": here,
        "there": api.tensor(there),
        "elsewhere": api.tensor(there + 1, 1),
        "odd": api.tensor(odd),
    }
    specs = put(slab, 4096, feature)
    api.run_all()
    for spec, value in zip(specs, (here, there, there + 1, odd), strict=True):
        assert same(to_host(slab, 4096, spec), value)


def test_while_the_device_is_busy_a_copy_from_the_host_is_a_threads(
    api: FakeApi, slab: CudaSlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To wait for one behind others' work keeps a processor busy."""
    _, parts, _ = pack(torch.rand(4), 1)
    inline_bytes, now_s = Settings().inline_bytes, [100.0]
    monkeypatch.setattr("featcache.memory.cuda.streams._now", lambda: now_s[0])
    finish = slab._driver.finish

    def takes(time_s: float) -> None:
        def late(stream: object) -> None:
            now_s[0] += time_s
            finish(stream)

        monkeypatch.setattr(slab._driver, "finish", late)
        slab.write(0, parts, None)

    def is_inline() -> bool:
        read_bytes = slab.blocking_read_bytes(16, torch.device("cpu"))
        inline = slab.blocking_write_bytes(parts) <= inline_bytes
        assert inline == (read_bytes <= inline_bytes)
        return inline

    assert is_inline()
    takes(0.0)
    assert is_inline()
    takes(0.002)
    assert not is_inline()
    takes(0.0)  # in a thread meanwhile
    assert is_inline()
    takes(0.002)
    now_s[0] += 1.1
    assert is_inline()
    assert slab.blocking_read_bytes(0, torch.device("cpu")) == 0


def test_where_a_part_is_decides_the_order(api: FakeApi, slab: CudaSlab) -> None:
    host, device = torch.rand(4), api.tensor(torch.rand(4))
    _, parts, _ = pack(host, 1)
    assert slab.stage(parts) == (parts, None)
    assert slab.blocking_write_bytes(parts) > host.nbytes
    _, parts, _ = pack(device, 1)
    _, order = slab.stage(parts)
    assert isinstance(order, StreamOrder)
    assert order.raw == 0
    assert slab.blocking_write_bytes(parts) == 0
    for wrong in (pack(api.tensor(torch.rand(4), 1), 1)[1], parts):
        with pytest.raises(SettingsError, match="not staged"):
            slab.write(0, wrong, order if wrong is not parts else None)


def test_the_tensors_of_one_read_are_where_its_order_is(api: FakeApi, slab: CudaSlab) -> None:
    spec = put_one(slab, 0, torch.rand(4))
    with pytest.raises(SettingsError, match="one device"):
        slab.read(0, spec, torch.empty(4), slab.order())
    with pytest.raises(SettingsError, match="one device"):
        slab.read(0, spec, api.tensor(torch.empty(4), 1), slab.order())


def test_the_order_is_the_callers_whatever_is_current_later(api: FakeApi, slab: CudaSlab) -> None:
    raw = api.side_stream()
    specs, parts, _ = pack(api.tensor(torch.arange(9)), 1)
    staged, order = slab.stage(parts)
    out = api.tensor(torch.zeros(9, dtype=torch.int64))
    api.side_stream()  # in the thread that does the work, say
    slab.write(0, staged, order)
    slab.read(0, specs[0], out, order)
    api.run(api.current[0])
    assert not slab.view(0, specs[0]).any()
    api.step(raw)
    assert not out.any()
    api.run(raw)
    assert same(out, torch.arange(9))


def test_orders_are_kept_but_not_for_ever(api: FakeApi, slab: CudaSlab) -> None:
    first = slab.order()
    assert slab.order() is first
    for _ in range(300):
        api.side_stream()
        assert slab.order() is not first
    api.current.clear()
    again = slab.order()
    assert again is not None
    assert again.raw == 0
    assert len(slab._home._orders) <= 256


def test_a_slab_that_is_closed(slab: CudaSlab) -> None:
    spec = put_one(slab, 0, torch.rand(4))
    order = slab.order()
    slab.close()
    slab.close()
    for use in (
        lambda: slab.view(0, spec),
        lambda: slab.view(0, spec, SECOND),
        lambda: slab.read(0, spec, torch.empty(4), None),
        lambda: slab.read(0, spec, OnDevice(torch.empty(4)), order),
        lambda: slab.write(0, pack(torch.rand(4), 1)[1], None),
        partial(slab.order, SECOND),
        lambda: slab.enable_device(SECOND),
        lambda: slab.enable_device(torch.device("cuda", 0)),
        lambda: slab.commit(0, SEGMENT, prefault=False),
    ):
        with pytest.raises(CacheClosed):
            use()


# --- words ---------------------------------------------------------------------------------------


@KINDS
def test_a_word_comes_after_the_bytes(api: FakeApi, kind: str) -> None:
    slab = make_slab(api, kind, committed=CAPACITY)
    block, fd = OwnerWords.create(8)
    words = slab.adopt(block, block.published)
    again = slab.adopt(block, block.live)
    assert api.calls.count("cuMemHostRegister") == 1, "a block is registered once"
    raw = api.side_stream()
    specs, parts, _ = pack(api.tensor(torch.full((64,), 7)), 1)
    staged, order = slab.stage(parts)
    slab.write(0, staged, order)
    slab.signal(words, 3, 41, order)
    slab.signal(again, 2, 5, None)  # the CPU's, at once
    assert block.published[3] == 0
    assert block.live[2] == 5
    api.step(raw)
    assert block.published[3] == 0, "the bytes are there, the word not yet"
    assert int(slab.view(0, specs[0]).sum()) == 7 * 64
    api.run(raw)
    assert list(block.published) == [0, 0, 0, 41, 0, 0, 0, 0]
    slab.close()
    os.close(fd)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 127, 128, 129, 300])
def test_many_words_come_after_the_bytes_in_few_calls(api: FakeApi, count: int) -> None:
    slab = make_slab(api, VMM, committed=CAPACITY)
    block, fd = OwnerWords.create(400)
    words = slab.adopt(block, block.published)
    raw = api.side_stream()
    values = [(399 - n, 7 + n) for n in range(count)]
    slab.signal_many(words, values[:1], None)  # the CPU's, at once
    assert sum(block.published) == sum(value for _, value in values[:1])
    for _ in range(2):  # the records of a batch are used again
        _, parts, _ = pack(api.tensor(torch.full((64,), 7)), 1)
        staged, order = slab.stage(parts)
        slab.write(0, staged, order)
        slab.signal_many(words, values, order)
        api.step(raw)
        assert not any(block.published[index] for index, _ in values[1:])
        api.run(raw)
        assert [block.published[index] for index, _ in values] == [value for _, value in values]
        for index, _ in values:
            block.published[index] = 0
    assert api.calls.count("cuStreamWriteValue64") == (2 * count if count < 3 else 0)
    assert api.calls.count("cuStreamBatchMemOp") == (0 if count < 3 else 2 * -(-count // 128))
    slab.close()
    os.close(fd)


def test_a_batch_of_words_that_the_driver_refuses_is_an_error(api: FakeApi) -> None:
    slab = make_slab(api, VMM, committed=CAPACITY)
    block, fd = OwnerWords.create(8)
    words = slab.adopt(block, block.published)
    api.fail("cuStreamBatchMemOp")
    with pytest.raises(BackendUnavailable, match="cuStreamBatchMemOp"):
        slab.signal_many(words, [(n, 1) for n in range(8)], slab.order())
    slab.close()
    os.close(fd)


@pytest.mark.parametrize("streams", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("kind", ["default streams", "streams of their own"])
def test_a_word_behind_reads_on_several_streams(
    api: FakeApi, slab: CudaSlab, streams: tuple[int, int], kind: str
) -> None:
    spec = put_one(slab, 0, torch.full((8,), 3))
    slab.enable_device(SECOND)
    block, fd = OwnerWords.create(8)
    words = slab.adopt(block, block.published)
    orders, outs = [], []
    for ordinal in streams:
        if kind != "default streams":
            api.side_stream(ordinal)
        outs.append(to_device(slab, api, 0, spec, ordinal))
        orders.append(slab.order(torch.device("cuda", ordinal)))
    last = slab.follow(orders[1], orders)
    assert last is orders[1]
    slab.signal(words, 0, 9, last)
    assert last is not None
    api.run(last.raw, last.streams.ordinal)
    done = streams[0] == streams[1] and kind == "default streams"
    assert block.published[0] == (9 if done else 0), "not before the other stream's read is done"
    first = orders[0]
    assert first is not None
    api.run(first.raw, first.streams.ordinal)
    api.run(last.raw, last.streams.ordinal)
    assert all(int(out.sum()) == 24 for out in outs)
    assert block.published[0] == 9
    slab.close()
    os.close(fd)


def test_behind_what_there_is_to_be_behind_of(api: FakeApi, slab: CudaSlab) -> None:
    order = slab.order()
    assert slab.follow(None, []) is None
    assert slab.follow(None, [None]) is None
    assert slab.follow(order, [None, order]) is order
    assert slab.follow(None, [order, None]) is order
    assert "cuEventCreate" not in api.calls


# --- which kind of slab --------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", [None, 102, 103])
def test_choosing_a_backend(api: FakeApi, lacking: int | None) -> None:
    driver = driver_over(api)
    if lacking is not None:
        api.attributes[lacking] = 0
    assert choose_kind(driver, 0, "ipc")[0] == IPC
    kind, why = choose_kind(driver, 0, "auto")
    assert kind == (VMM if lacking is None else IPC)
    assert ("can't" in why) == (lacking is not None)
    if lacking is None:
        assert choose_kind(driver, 0, "vmm")[0] == VMM
    else:
        with pytest.raises(BackendUnavailable, match="backend='ipc'"):
            choose_kind(driver, 0, "vmm")


def test_views_of_one_place_are_tensors_of_their_own(slab: CudaSlab) -> None:
    spec = put_one(slab, 0, torch.arange(6, dtype=torch.int32).view(2, 3))
    first, second = slab.view(0, spec), slab.view(0, spec)
    invalidate(first)
    assert first.numel() == 0
    assert second.shape == (2, 3)
    assert slab.view(0, spec).shape == (2, 3)


def test_views_are_kept_but_not_for_ever_and_not_past_the_end(slab: CudaSlab) -> None:
    spec = put_one(slab, 0, torch.arange(6, dtype=torch.int32))
    for offset in range(0, 4 * 5000, 4):
        slab.view(offset, spec)
    kept = slab._home._views
    assert 0 < len(kept) <= 4096
    slab.close()
    assert not kept
