"""Single flight over engines, as their schedulers see it: nothing waits, and one of all encodes."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from featcache import blocking
from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.flights import MAX_FLIGHTS, Flights
from featcache.integrations.vllm.link import LoopLink

pytestmark = pytest.mark.usefixtures("no_leaks")

KEY = "vllm:d:image"


class Scheduler:
    """An engine's link and flights, with a clock that the test moves."""

    def __init__(self, endpoint: str, *, wait_s: float = 100.0, keeps_claims: bool = True) -> None:
        self.counts = Counts()
        self.link = LoopLink(endpoint, self.counts, name=f"s{id(self)}")
        assert self.link.wait_attached(20)
        self.now_s = 0.0
        self.flights = Flights(
            self.link,
            wait_s,
            self.counts,
            keeps_claims=keeps_claims,
            clock=lambda: self.now_s,
        )

    def may_encode(self, key: str = KEY) -> bool:
        client = self.link.client
        assert client is not None
        return self.flights.may_encode(key, client)

    def missing(self, *keys: str) -> set[str]:
        client = self.link.client
        assert client is not None
        return self.flights.missing(keys, client)

    def holds_claim(self, key: str = KEY) -> bool:
        return self.flights.claimed_unused(key)

    def waits(self) -> bool:
        return any(flight.answered for flight in self.flights._flights.values())


def until(holds: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < give_up_s, "it did not come"


@pytest.fixture
def owner() -> Iterator[blocking.FeatureCache]:
    with blocking.create(capacity="1MiB") as cache:
        yield cache


@pytest.fixture
def engine(owner: blocking.FeatureCache) -> Iterator[Callable[..., Scheduler]]:
    with ExitStack() as stack:

        def start(**how: object) -> Scheduler:
            scheduler = Scheduler(owner.endpoint, **how)  # type: ignore[arg-type]
            stack.callback(scheduler.link.close)
            return scheduler

        yield start


Start = Callable[..., Scheduler]


def test_the_first_look_asks_and_does_not_wait(engine: Start) -> None:
    one = engine()
    assert not one.may_encode()
    until(one.may_encode)
    assert one.holds_claim()


def test_a_second_engine_waits_until_the_feature_is_there(
    engine: Start, owner: blocking.FeatureCache
) -> None:
    one, other = engine(), engine()
    until(one.may_encode)
    assert not other.may_encode()
    until(other.waits)
    other.now_s = 99.0
    assert not other.may_encode()
    owner.put(torch.ones(4), key=KEY)
    until(other.may_encode)
    assert other.flights.found(KEY)
    assert other.counts.take() == {"waits": 1}


def test_behind_a_key_that_is_awaited_a_claim_is_given_up_and_no_key_asked_for(
    engine: Start, owner: blocking.FeatureCache
) -> None:
    one, other = engine(), engine()
    first, second, third = (f"vllm:d:{number}" for number in range(3))
    until(lambda: one.may_encode(first))
    assert other.missing(second) == {second}
    until(lambda: other.holds_claim(second))

    until(lambda: other.missing(first) == {first} and other.waits())
    assert other.missing(first, second) == {first}  # others may encode it now
    other.now_s = 1.0
    assert other.missing(first, second, third) == {first, second, third}
    until(lambda: one.may_encode(second))
    assert one.missing(third) == {third}
    until(lambda: one.holds_claim(third))

    for key in (second, first, third):
        owner.put(torch.ones(4), key=key)
    until(lambda: other.missing(first, second, third) == set())
    assert other.counts.take() == {"waits": 1}


def test_a_claim_that_is_given_up_passes_on(engine: Start) -> None:
    one, other = engine(), engine()
    until(one.may_encode)
    assert not other.may_encode()
    until(other.waits)
    one.flights.end(KEY)
    until(other.may_encode)
    assert other.holds_claim()


def test_an_engine_that_is_gone_leaves_its_claims(engine: Start) -> None:
    one, other = engine(), engine()
    until(one.may_encode)
    assert not other.may_encode()
    one.link.close()
    until(other.may_encode)
    until(other.holds_claim)


def test_who_has_waited_its_time_encodes(engine: Start) -> None:
    one, other = engine(), engine()
    until(one.may_encode)
    assert not other.may_encode()
    until(other.waits)
    other.now_s = 101.0
    assert other.may_encode()
    assert other.counts.take() == {"waits": 1, "wait_timeouts": 1}


def test_an_owner_that_does_not_answer_is_not_waited_for_so_long(engine: Start) -> None:
    one = engine()
    one.link.spawn = lambda work: None  # type: ignore[method-assign]
    assert not one.may_encode()
    one.now_s = 1.0
    assert one.may_encode()


def test_who_saves_nothing_keeps_no_claim(engine: Start) -> None:
    one, other = engine(keeps_claims=False), engine()
    until(one.may_encode)
    until(other.may_encode)
    until(other.holds_claim)


def test_a_claim_ends_when_its_feature_is_there_though_nobody_tells(
    engine: Start, owner: blocking.FeatureCache
) -> None:
    one = engine()
    until(one.may_encode)
    one.flights.encoding(KEY)
    owner.put(torch.ones(4), key=KEY)
    until(lambda: one.flights._flights[KEY].claim is None)


def test_a_request_that_is_gone_gives_its_claim_up_unless_a_step_encodes(engine: Start) -> None:
    one = engine()
    until(one.may_encode)
    one.flights.encoding(KEY)
    one.flights.abandon(KEY)
    assert len(one.flights) == 1
    until(lambda: one.may_encode("vllm:d:other"))
    one.flights.abandon("vllm:d:other")
    assert len(one.flights) == 1


def test_flights_are_bounded_and_expire(engine: Start) -> None:
    one = engine()
    one.link.spawn = lambda work: None  # type: ignore[method-assign]
    asked = [one.may_encode(f"vllm:d:{number}") for number in range(MAX_FLIGHTS + 1)]
    assert asked == [False] * MAX_FLIGHTS + [True]
    one.now_s = 1000.0
    one.flights.expire()
    assert len(one.flights) == 0


def test_with_no_wait_all_is_encoded_at_once(engine: Start) -> None:
    assert engine(wait_s=0.0).may_encode()
