"""What a scheduler's connector plans where inputs can't be encoded, are there already, or are contested."""

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featcache import PoolFull, blocking

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.flights import Flights
from featcache.integrations.vllm.keys import Keys
from featcache.integrations.vllm.link import LoopLink
from featcache.integrations.vllm.scheduler import SchedulerSide

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


class Engine:
    """An engine's scheduler, over an owner, with no vLLM."""

    def __init__(self, endpoint: str) -> None:
        counts = Counts()
        self.keys = Keys({})
        self.link = LoopLink(endpoint, counts, name=f"e{id(self)}")
        assert self.link.wait_attached(20)
        self.flights = Flights(self.link, 600.0, counts, keeps_claims=True)
        self.side = SchedulerSide(
            self.link,
            self.keys,
            self.flights,
            counts,
            loads=True,
            saves=True,
            ranks=1,
            encodable=lambda feature: bool(feature.whole),
        )

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
        engine.side.close()


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
    assert engine.ready(request)
    with pytest.raises(PoolFull):  # it does not go for another
        owner.put(torch.ones(1 << 19, dtype=torch.bfloat16), key="big", on_full="raise")
    assert owner.contains(key)
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
    assert engine.ready(request)
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
