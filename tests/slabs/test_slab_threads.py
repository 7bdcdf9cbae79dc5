"""The blocking API from threads, each with a stream of its own: it is the thread's order that counts."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import featcache
from featcache import PutTimeout, StaleRef
from featcache.blocking import FeatureCache, FeatureClient
from support.caches import MIB, filled, tensor, tensors
from support.slabs import HOME, Slab, busy, full_of, mark, on_gpu, same, stream_on

pytestmark = pytest.mark.gpu

FEATURE = 2 * MIB


@contextmanager
def blocking(
    slab: Slab, device: str | None = None, capacity: int = FEATURE
) -> Iterator[tuple[FeatureCache, FeatureClient]]:
    settings = slab.settings(capacity=capacity)
    with (
        featcache.blocking.create(device=slab.device, settings=settings) as owner,
        featcache.blocking.connect(owner.endpoint, device=device, settings=settings) as client,
    ):
        yield owner, client


def in_threads(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own; raise what one raises."""
    with ThreadPoolExecutor(len(works)) as threads:
        for future in [threads.submit(work) for work in works]:
            future.result(30)


def test_a_thread_with_a_stream_of_its_own(slab: Slab) -> None:
    with blocking(slab) as (owner, client):
        refs = []

        def put() -> None:
            with torch.cuda.stream(stream_on()):
                source = full_of(1, FEATURE)
                busy()
                source.fill_(7)
                refs.append(owner.put(source, readers=2))
                source.fill_(9)

        def get() -> None:
            side = stream_on()
            with torch.cuda.stream(side):
                busy(0.05)
                used = tensor(client.get(refs[0], device=HOME)) + 1
                out = full_of(0, FEATURE)
                assert owner.get(refs[0], out=out) is out
                out += 2
            side.synchronize()
            assert same(used, filled(FEATURE, 8))
            assert same(out, filled(FEATURE, 9))

        in_threads(put)
        in_threads(get)
        owner.put(full_of(5, FEATURE), timeout=20.0)


@on_gpu
def test_a_borrow_is_paid_in_the_order_of_its_thread(slab: Slab) -> None:
    with blocking(slab) as (owner, client):
        ref = owner.put(full_of(5, FEATURE))

        def borrow() -> None:
            side = stream_on()
            with torch.cuda.stream(side):
                with client.borrow(ref) as view:
                    busy(0.3)
                    out = tensor(view).clone()
                    read = mark()
                assert tensor(view).numel() == 0
                with pytest.raises(StaleRef, match="paid"):
                    client.get(ref)
                try:
                    owner.put(full_of(8, FEATURE), timeout=0.02)
                except PutTimeout:
                    pass
                else:
                    assert read.query(), "there was room before the view was read"
            side.synchronize()
            assert same(out, filled(FEATURE, 5))

        in_threads(borrow)
        after = owner.put(full_of(6, FEATURE), timeout=20.0)
        assert same(client.get(after), filled(FEATURE, 6))


@on_gpu
def test_many_threads_at_once(slab: Slab) -> None:
    with blocking(slab, capacity=8 * MIB) as (owner, client):

        def work(number: int) -> Callable[[], None]:
            def run() -> None:
                side = stream_on()
                for turn in range(20):
                    value = (20 * number + turn) % 251
                    with torch.cuda.stream(side):
                        ref = owner.put(full_of(value, 500_000), timeout=30.0)
                        if turn % 2:
                            wrong = (tensor(client.get(ref)) != value).any()
                        else:
                            with client.borrow(ref) as view:
                                wrong = (tensor(view) != value).any()
                    side.synchronize()
                    assert not bool(wrong)

            return run

        in_threads(*(work(number) for number in range(8)))
        assert owner.statistics().puts == 160


@on_gpu
def test_through_the_host_to_a_thread(slab: Slab) -> None:
    with blocking(slab, device="cpu") as (owner, client):
        feature = {"a": full_of(3, 1000), "b": torch.arange(10)}

        def read() -> None:
            copies = tensors(client.get(owner.put(feature)))
            assert all(same(copies[name], value) for name, value in feature.items())
            with client.borrow(owner.put(feature)) as views:
                assert all(same(tensors(views)[name], value) for name, value in feature.items())

        in_threads(read)
        assert owner.statistics().relayed == 2
