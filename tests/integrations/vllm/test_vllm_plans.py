"""What a scheduler's connector plans where inputs can't be encoded, are there already, or are contested."""

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featcache import PoolFull, blocking
from support.slabs import same

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from featcache.integrations.vllm.ahead import Copies, Orders
from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.flights import Flights
from featcache.integrations.vllm.keys import Keys
from featcache.integrations.vllm.link import LoopLink, ThreadLink
from featcache.integrations.vllm.scheduler import SchedulerSide
from featcache.integrations.vllm.worker import WorkerSide

RANKS = 2
pytestmark = pytest.mark.usefixtures("no_leaks")


class Request:
    """As much of vLLM's request as the scheduler's half looks at."""

    def __init__(self, request_id: str, *identifiers: str, whole: bool = True) -> None:
        self.request_id, self.num_preemptions = request_id, 0
        self.mm_features = [
            SimpleNamespace(
                identifier=each,
                whole=whole,
                mm_position=SimpleNamespace(offset=0, length=4),
            )
            for each in identifiers
        ]


class Rank:
    """One of an engine's tensor-parallel ranks, with no vLLM."""

    def __init__(self, endpoint: str, engine: str, rank: int) -> None:
        self.link = ThreadLink(
            endpoint, Counts(), device=torch.device("cpu"), name=f"{engine}-{rank}"
        )
        assert self.link.wait_attached(20)
        self.side = WorkerSide(
            self.link,
            Keys({}),
            Counts(),
            saver=None,
            agree=None,
            copies=Copies(self.link, engine, rank),
        )

    def load(self, step: Any) -> dict[str, Any]:
        """Run a step's loads, and return vLLM's encoder cache."""
        cache: dict[str, Any] = {}
        self.side.load(cache, step)
        return cache


class Engine:
    """An engine's scheduler and ranks, over an owner, with no vLLM."""

    def __init__(self, endpoint: str) -> None:
        counts, name = Counts(), f"e{id(self)}"
        self.keys = Keys({})
        self.link = LoopLink(endpoint, counts, name=name)
        assert self.link.wait_attached(20)
        self.flights = Flights(self.link, 600.0, counts, keeps_claims=True)
        self.orders = Orders(self.link, name, RANKS, lambda feature: bool(feature.whole))
        self.side = SchedulerSide(
            self.link,
            self.keys,
            self.flights,
            counts,
            loads=True,
            saves=True,
            ranks=RANKS,
            orders=self.orders,
        )
        self.ranks = [Rank(endpoint, name, rank) for rank in range(RANKS)]

    def close(self) -> None:
        for rank in self.ranks:
            rank.side.close()
        self.side.close()

    def ready(self, request: Request, computed: int = 0) -> bool:
        """One pass of vLLM's scheduler, up to the plan."""
        return self.side.is_ready(request, computed)

    def plan(self, request: Request) -> Any:
        """Plan a step with all inputs of a request."""
        for index, feature in enumerate(request.mm_features):
            self.side.has(feature.identifier)
            self.side.allocated(request, index)
        return self.build()

    def build(self) -> Any:
        return self.side.built(SimpleNamespace(scheduled_encoder_inputs={}))


def until(holds: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < give_up_s, "it did not come"


def until_ready(engine: Engine, request: Request) -> None:
    """Pass until a request can be planned, as vLLM's scheduler does; a step ends each pass but the last."""
    until(lambda: engine.ready(request) or (engine.build() and False))


Start = Callable[[], Engine]


@pytest.fixture
def owner() -> Iterator[blocking.FeatureCache]:
    with blocking.create(capacity="1MiB") as cache:
        yield cache


@pytest.fixture
def start(owner: blocking.FeatureCache) -> Iterator[Start]:
    engines: list[Engine] = []

    def started() -> Engine:
        engines.append(Engine(owner.endpoint))
        return engines[-1]

    yield started
    for engine in engines:
        engine.close()


def put(owner: blocking.FeatureCache, engine: Engine, identifier: str) -> str:
    key = engine.keys.key(identifier)
    assert key is not None
    owner.put(torch.ones(4, 8), key=key)
    return key


def test_two_requests_for_the_same_inputs_never_await_each_other(start: Start) -> None:
    """Each engine is granted one of two claims, as when both ask at once, each in its prompt's order."""
    one, other = start(), start()
    small, big = sorted("ab")
    until(lambda: one.ready(Request("1", big)))
    until(lambda: other.ready(Request("2", small)))
    both = Request("3", big, small), Request("4", small, big)

    def done() -> list[bool]:
        found = [one.ready(both[0]), other.ready(both[1])]
        for engine in (one, other):
            engine.build()
        return found

    until(lambda: any(done()))
    ready = done()
    assert ready.count(True) == 1  # and one of the two encodes both


def test_what_brings_only_sizes_is_leased_before_the_plan(
    start: Start, owner: blocking.FeatureCache
) -> None:
    engine = start()
    key = put(owner, engine, "a")
    request = Request("r", "a", whole=False)
    until_ready(engine, request)
    with pytest.raises(PoolFull):  # it does not go for another
        owner.put(torch.ones(1 << 19, dtype=torch.bfloat16), key="big", on_full="raise")
    assert owner.contains(key)
    assert [load.identifier for load in engine.plan(request).loads] == ["a"]


def test_what_brings_only_sizes_is_with_all_ranks_before_the_plan(
    start: Start, owner: blocking.FeatureCache
) -> None:
    """Else an owner that dies between the plan and the load ends the engine."""
    engine = start()
    put(owner, engine, "a")
    put(owner, engine, "b")
    request = Request("r", "a", "b", whole=False)
    until_ready(engine, request)
    step = engine.plan(request)
    owner.close()
    until(lambda: all(rank.link.client is None for rank in engine.ranks))
    for rank in engine.ranks:
        cache = rank.load(step)
        assert sorted(cache) == ["a", "b"]
        assert all(same(output, torch.ones(4, 8)) for output in cache.values())


def test_what_the_ranks_have_is_planned_after_the_owner_died(
    start: Start, owner: blocking.FeatureCache
) -> None:
    engine = start()
    put(owner, engine, "a")
    request = Request("r", "a", whole=False)
    until_ready(engine, request)
    engine.build()  # a step with no room for it
    owner.close()
    until(lambda: engine.link.client is None)
    assert engine.ready(request)
    step = engine.plan(request)
    assert [list(rank.load(step)) for rank in engine.ranks] == [["a"], ["a"]]
    assert engine.side.take_unavailable() == set()


def test_an_order_lost_with_the_pool_does_not_hold_up_the_next(
    start: Start, owner: blocking.FeatureCache
) -> None:
    engine = start()
    engine.orders._next = 3  # as if three had been evicted before any rank read them
    put(owner, engine, "a")
    until_ready(engine, Request("r", "a", whole=False))
    assert engine.orders.has("a")


def test_orders_leave_nothing_in_the_pool(start: Start, owner: blocking.FeatureCache) -> None:
    engine = start()
    put(owner, engine, "a")
    request = Request("r", "a", whole=False)
    until_ready(engine, request)
    engine.plan(request)
    assert len(engine.orders) == 0
    until(lambda: owner.statistics().keys == 1)


def test_ranks_that_copy_nothing_hold_a_request_up_for_a_bounded_time(
    start: Start, owner: blocking.FeatureCache
) -> None:
    engine = start()
    for rank in engine.ranks:
        rank.side.close()
    put(owner, engine, "a")
    request = Request("r", "a", whole=False)
    assert not engine.ready(request)
    engine.build()
    engine.orders._clock = lambda: time.monotonic() + 10
    assert engine.ready(request)
    assert [load.identifier for load in engine.plan(request).loads] == ["a"]


def test_what_brings_only_sizes_fails_without_an_owner(
    start: Start, owner: blocking.FeatureCache
) -> None:
    engine = start()
    owner.close()
    until(lambda: engine.link.client is None)
    assert not engine.ready(Request("r", "a", whole=False))
    assert engine.side.take_unavailable() == {"r"}
    assert engine.ready(Request("w", "a"))
    assert engine.side.take_unavailable() == set()


def test_an_input_that_the_engine_has_for_a_request_is_not_asked_for_again(
    start: Start, owner: blocking.FeatureCache
) -> None:
    engine = start()
    key = put(owner, engine, "a")
    request = Request("r", "a", whole=False)
    until_ready(engine, request)
    engine.plan(request)
    engine.side.told(None)
    engine.side._loading.clear()
    owner.evict(key)
    assert engine.ready(request, computed=2)  # the next chunk of its prefill
    assert engine.side.take_unavailable() == set()
    request.num_preemptions = 1  # and now it has nothing any more
    until(lambda: engine.ready(request) or engine.side.take_unavailable() == {"r"})
    assert not engine.ready(request)


def test_what_vllm_keeps_no_longer_for_a_request_is_looked_for_again(
    start: Start, owner: blocking.FeatureCache
) -> None:
    engine = start()
    put(owner, engine, "a")
    request = Request("r", "a")
    engine.plan(request)
    engine.side.freed(request, 0)
    assert [one.identifier for one in engine.side._needed(request, 0)] == ["a"]
    engine.plan(request)
    assert list(engine.side._needed(request, 0)) == []
    engine.side.finished(request)
    assert engine.side._had == {}
