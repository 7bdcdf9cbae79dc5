"""The parts of the plugin that need no SGLang: its settings, its slab, its proxies."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featcache import MalformedRef, SettingsError, blocking
from featcache.integrations.sglang import proxy as proxies
from featcache.integrations.sglang.config import Config, capacity_bytes, server_id
from featcache.integrations.sglang.pool import PoolEnd, SglangContext, open_end
from featcache.integrations.sglang.proxy import FeatureProxy
from featcache.integrations.sglang.readers import Readers, readers_of
from featcache.integrations.sglang.slab import Plan, Slab, acquire, release
from support.processes import until

MIB = 1 << 20


class Proxy(FeatureProxy):
    """A proxy whose rank is a test's."""

    rank = 0
    rank_of = staticmethod(lambda count: Proxy.rank % count)


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda rank: monkeypatch.setattr(Proxy, "rank", rank)


@pytest.fixture
def no_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_SGLANG_SPILL", "0")


def plan(capacity: int = 8 * MIB) -> Plan:
    config = Config.from_environment()
    return Plan(config=config, device=torch.device("cpu"), capacity_bytes=capacity, slots=64)


@pytest.fixture
def slab(request: pytest.FixtureRequest) -> Iterator[Slab]:
    opened = acquire(plan())
    yield opened
    release(opened)


def put(slab: Slab, feature: torch.Tensor, ranks: int = 2, wait_s: float = 0.0) -> Proxy | None:
    readers = Readers(ranks, "sglang-test")
    ref = slab.put(feature, readers, wait_s)
    return None if ref is None else Proxy(ref, readers)


def copies(proxy: FeatureProxy, count: int) -> list[FeatureProxy]:
    return [type(proxy).from_bytes(proxy.to_bytes()) for _ in range(count)]


# --- settings and names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [("WAIT", "soon"), ("WAIT", "-1"), ("SPILL", "lots"), ("TTL", "0")],
)
def test_a_variable_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(f"FEATCACHE_SGLANG_{variable}", value)

    with pytest.raises(SettingsError, match=f"FEATCACHE_SGLANG_{variable}"):
        Config.from_environment()


def test_a_servers_id_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEATCACHE_SGLANG_SERVER")

    assert server_id() == server_id() != ""


def test_the_workers_shares_are_one_slab_of_the_budget_as_it_is_now() -> None:
    known = 1024 * MIB
    assert capacity_bytes(known // 3, 3, known, known) == known
    assert capacity_bytes(known // 3, 3, 3 * known, known) == 3 * known  # raised after the import
    assert capacity_bytes(MIB, 3, known, known) == 3 * MIB  # of the caller's own choice


def test_ranks_have_names_where_the_tokenizer_knows_them() -> None:
    named = readers_of("a", 2, SimpleNamespace(dp_size=1, pp_size=1))
    assert named.owed() == ["sglang-a.0", "sglang-a.1"]
    assert named.name_of(1) == "sglang-a.1"
    with pytest.raises(RuntimeError, match="outside"):
        named.name_of(2)
    for sizes in ({"dp_size": 2}, {"pp_size": 2}):
        anybody = readers_of("a", 2, SimpleNamespace(**sizes))
        assert (anybody.owed(), anybody.name_of(0)) == (2, None)


@pytest.mark.parametrize("data", [b"", b"\x92", b"\x92\xc4\x01a\x91\x02", b"\xff" * 40])
def test_bytes_that_are_no_proxy_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedRef):
        Proxy.from_bytes(data)


# --- reads and payments ---------------------------------------------------------------------------


async def test_each_rank_pays_once_however_often_it_says_so(slab: Slab, as_rank: Any) -> None:
    feature = torch.arange(12.0).reshape(3, 4)
    proxy = put(slab, feature)
    assert proxy is not None
    first, second = copies(proxy, 2)

    assert torch.equal(first.reconstruct_on_target_device(0), feature)
    assert first.reconstruct_on_target_device(0) is first.reconstruct_tensor
    first.acknowledge_consumption()
    first.release_without_reconstruction()
    assert slab.in_use == 1  # the other rank's read is owed
    as_rank(1)
    second.acknowledge_consumption()
    await until(lambda: slab.in_use == 0)
    with pytest.raises(RuntimeError, match="released"):
        second.reconstruct_on_target_device(0)
    assert second.borrow_on_target_device(0) is None


async def test_a_payment_alone_opens_no_session_on_another_device(
    slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread's current GPU need not be its rank's: a session there were a context of its own."""
    first, second = put(slab, torch.ones(4)), put(slab, torch.ones(4))
    assert first is not None
    assert second is not None
    first.reconstruct_on_target_device(0)
    opened: list[object] = []
    monkeypatch.setattr(blocking, "connect", lambda **how: opened.append(how))
    monkeypatch.setattr(proxies, "device_of", lambda index: torch.device("cuda", 7))

    second.acknowledge_consumption()

    assert opened == []
    for each in (first, second):
        slab.discard(each.ref)
    await until(lambda: slab.in_use == 0)


async def test_a_borrow_is_paid_as_it_is_released(slab: Slab) -> None:
    feature = torch.arange(6)
    proxy = put(slab, feature, ranks=1)
    assert proxy is not None

    view = proxy.borrow_on_target_device(0)
    assert view is not None
    assert torch.equal(view, feature)
    assert slab.in_use == 1
    with pytest.raises(RuntimeError, match="borrowed"):
        proxy.reconstruct_on_target_device(0)
    proxy.release_borrowed_on_current_stream()
    proxy.release_borrowed_on_current_stream()

    assert view.numel() == 0
    await until(lambda: slab.in_use == 0)


@pytest.mark.parametrize("call", ["reconstruct", "borrow", "acknowledge", "release"])
async def test_one_can_pay_for_the_whole_group(slab: Slab, call: str) -> None:
    proxy = put(slab, torch.ones(8), ranks=3)
    assert proxy is not None

    if call == "reconstruct":
        proxy.reconstruct_on_target_device(0, consumer_count=3)
    elif call == "borrow":
        proxy.borrow_on_target_device(0)
        proxy.release_borrowed_on_current_stream(3)
    elif call == "acknowledge":
        proxy.acknowledge_consumption(3)
    else:
        proxy.release_without_reconstruction(3)

    await until(lambda: slab.in_use == 0)


def test_nobody_pays_for_a_part_of_a_group(slab: Slab) -> None:
    proxy = put(slab, torch.ones(8), ranks=3)
    assert proxy is not None

    with pytest.raises(ValueError, match="2 of 3"):
        proxy.reconstruct_on_target_device(0, consumer_count=2)

    assert proxy.reconstruct_tensor is None


async def test_reads_that_are_anybodys_are_paid_by_sessions_without_names(slab: Slab) -> None:
    readers = Readers(1)
    ref = slab.put(torch.ones(4), readers, 0.0)
    assert ref is not None

    assert Proxy(ref, readers).reconstruct_on_target_device(0).sum() == 4

    await until(lambda: slab.in_use == 0)


async def test_what_is_taken_back_is_gone_for_its_ranks(slab: Slab) -> None:
    end = PoolEnd(slab, Readers(2, "sglang-test"))
    proxy = put(slab, torch.ones(4))
    assert proxy is not None

    end.cancel(proxy)
    end.cancel(proxy)

    await until(lambda: slab.in_use == 0)
    with pytest.raises(RuntimeError, match="is lost"):
        proxy.reconstruct_on_target_device(0)
    proxy.acknowledge_consumption()  # nothing is owed
    with pytest.raises(RuntimeError, match="does not belong"):
        end.cancel(object())


# --- a full slab ----------------------------------------------------------------------------------


async def test_a_full_slab_spills(slab: Slab) -> None:
    proxies = [put(slab, torch.full((3 * MIB,), k, dtype=torch.uint8), 1) for k in range(4)]

    assert all(proxies)
    assert [proxy.reconstruct_on_target_device(0)[-1].item() for proxy in proxies if proxy] == [
        *range(4)
    ]
    await until(lambda: slab.in_use == 0)


@pytest.mark.usefixtures("no_spill")
def test_a_full_slab_is_waited_for_where_the_caller_can(caplog: pytest.LogCaptureFixture) -> None:
    slab = acquire(plan(4 * MIB))
    first = put(slab, torch.zeros(3 * MIB, dtype=torch.uint8), 1)
    assert first is not None

    with caplog.at_level(logging.WARNING, "featcache"):
        assert put(slab, torch.zeros(3 * MIB, dtype=torch.uint8), 1) is None
        assert put(slab, torch.zeros(3 * MIB, dtype=torch.uint8), 1, wait_s=0.001) is None
        assert put(slab, torch.zeros(5 * MIB, dtype=torch.uint8), 1, wait_s=0.001) is None
    assert sum("SGLANG_MM_FEATURE_CACHE_MB" in text for text in caplog.messages) == 1

    import threading

    pays = threading.Timer(0.05, first.acknowledge_consumption)
    pays.start()
    assert put(slab, torch.zeros(3 * MIB, dtype=torch.uint8), 1, wait_s=10.0) is not None
    pays.join()
    release(slab)


def test_nothing_waits_in_an_event_loop(slab: Slab) -> None:
    end = PoolEnd(slab, Readers(1))

    async def wait_s() -> float:
        return end.wait_s()

    assert asyncio.run(wait_s()) == 0.0
    assert end.wait_s() == slab.plan.config.wait_s
    with end.one_wait():
        assert end.wait_s() <= slab.plan.config.wait_s


async def test_what_is_never_dispatched_ends_with_its_ttl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer worker that was killed in between: no rank knows of the feature."""
    monkeypatch.setenv("FEATCACHE_SGLANG_TTL", "0.05")
    slab = acquire(plan())

    proxies = [put(slab, torch.ones(4)) for _ in range(6)]  # the last of them in room ahead

    assert all(proxies)
    await until(lambda: slab.in_use == 0)
    release(slab)


async def test_large_features_and_small_ones_are_put_side_by_side(slab: Slab) -> None:
    """The large by the owner that is here, the small by this worker's session: in one slab."""
    sizes = [64, 2 * MIB] * 3
    for value, size in enumerate(sizes):
        proxy = put(slab, torch.full((size,), value, dtype=torch.uint8), 1, wait_s=1.0)
        assert proxy is not None
        assert proxy.reconstruct_on_target_device(0).sum() == value * size
    await until(lambda: slab.in_use == 0)


# --- owners ---------------------------------------------------------------------------------------


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, runtime_dir: Path) -> str:
    path = str(runtime_dir / "daemon.sock")
    monkeypatch.setenv("FEATCACHE_ENDPOINT", path)
    return path


async def test_a_daemon_may_come_late_die_and_come_back(daemon: str) -> None:
    slab = acquire(plan())
    assert put(slab, torch.ones(4), 1) is None

    for _ in range(2):
        with blocking.create(capacity=8 * MIB, endpoint=daemon):
            await until(lambda: put(slab, torch.ones(4), 1) is not None)
            proxy = put(slab, torch.ones(4), 1)
            assert proxy is not None
            assert proxy.reconstruct_on_target_device(0).sum() == 4
        assert put(slab, torch.ones(4), 1) is None
        with pytest.raises(RuntimeError, match="is lost"):
            copies(proxy, 1)[0].reconstruct_on_target_device(0)

    release(slab)


async def test_a_daemon_without_a_host_slab_takes_what_fits(daemon: str) -> None:
    with blocking.create(capacity=8 * MIB, endpoint=daemon):
        slab = acquire(plan())
        assert put(slab, torch.ones(4), 1) is not None
        assert put(slab, torch.ones(4 * MIB), 1) is None
        release(slab)


async def test_the_next_worker_takes_the_place_of_the_one_that_owned_the_slab() -> None:
    owner, follower = Slab(plan()), Slab(plan())
    owner.open()
    follower.open()
    assert put(follower, torch.ones(4), 1) is not None

    owner.close()

    await until(lambda: put(follower, torch.ones(4), 1) is not None)
    third = Slab(plan())
    third.open()
    await until(lambda: third.in_use > 0)  # told at the owner's interval
    third.close()
    follower.close()


def test_pools_of_one_process_share_a_slab_until_the_last_has_left() -> None:
    context = SglangContext(0, lambda: 1, lambda: 1, lambda: None)
    ends = [open_end(8 * MIB, 0, 1, 64, context) for _ in range(2)]
    first, second = ends
    assert first is not None
    assert second is not None
    assert first.slab is second.slab

    first.shutdown()
    first.shutdown()
    assert second.put(torch.ones(4)) is not None
    second.shutdown()

    assert second.put(torch.ones(4)) is None


@pytest.mark.parametrize(("share_bytes", "consumers"), [(0, 1), (MIB, 0)])
def test_sizes_and_counts_are_positive(share_bytes: int, consumers: int) -> None:
    context = SglangContext(0, lambda: 1, lambda: 1, lambda: None)

    with pytest.raises(ValueError, match="must be positive"):
        open_end(share_bytes, 0, consumers, 64, context)


def test_where_there_can_be_no_slab_sglangs_own_pool_is_to_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEATCACHE_SGLANG_WAIT", "soon")
    context = SglangContext(0, lambda: 1, lambda: 1, lambda: None)

    assert open_end(8 * MIB, 0, 1, 64, context) is None

    assert "its own is used instead" in caplog.text
