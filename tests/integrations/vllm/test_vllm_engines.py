"""Whole vLLM engines over one owner: what they answer is what an engine without a connector answers."""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from featcache import blocking
from integrations.vllm import tiny_llava
from integrations.vllm.enginehost import MODULE, Answer, Engine
from integrations.vllm.owners import Owner

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.timeout(400)

MIB: Final = 1 << 20
_seeds = count(1)
Engines = dict[str, Engine]


def fresh(number: int) -> list[int]:
    """Seeds of images that no engine has seen."""
    return [next(_seeds) for _ in range(number)]


def config(endpoint: Path, name: str, role: str, **extra: Any) -> dict[str, Any]:
    return {
        "ec_connector": "FeatcacheECConnector",
        "ec_connector_module_path": MODULE,
        "ec_role": role,
        "engine_id": name,
        "ec_connector_extra_config": {"endpoint": str(endpoint), **extra},
    }


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fc-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def endpoint(folder: Path) -> Path:
    return folder / "owner.sock"


@pytest.fixture(scope="module")
def engines(folder: Path, endpoint: Path) -> Iterator[Engines]:
    """Five engines that start side by side, with no owner yet."""
    model = tiny_llava.write(folder / "model")
    # A long wait: on a busy machine an engine takes its time, and one encoder is what is to be seen.
    extra = {"peer_wait": 60.0, "connect_wait": 0.0}
    roles = {
        "producer": "ec_producer",
        "first": "ec_consumer",
        "second": "ec_consumer",
        "left": "ec_both",
        "right": "ec_both",
    }
    started = {"plain": Engine(model)}
    for name, role in roles.items():
        started[name] = Engine(model, config(endpoint, name, role, **extra))
    try:
        for engine in started.values():
            engine.ready()
        yield started
    finally:
        for engine in started.values():
            engine.close()


@pytest.fixture
def owner(endpoint: Path, engines: Engines) -> Iterator[Owner]:
    with Owner(endpoint) as serving:
        attached(engines)
        yield serving


def attached(engines: Engines) -> None:
    """Return when all engines have attached to the owner that is there now."""
    for name, engine in engines.items():
        if name != "plain":
            until(partial(engine.call, "attached"))


def until(holds: Callable[[], Any], patience_s: float = 30.0) -> None:
    give_up_s = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < give_up_s, "it did not come"


def right(engines: Engines, seeds: list[int], answers: list[Answer]) -> bool:
    """Whether these are the answers of the engine without a connector."""
    return answers == engines["plain"].ask(*seeds)


def encoded(engine: Engine, seeds: list[int], engines: Engines) -> int:
    """Ask an engine, hold its answers to those without a connector; return how many it encoded."""
    before = engine.encoded
    assert right(engines, seeds, engine.ask(*seeds))
    return engine.encoded - before


def kept(endpoint: Path, number: int) -> Callable[[], bool]:
    def reached() -> bool:
        with blocking.connect(str(endpoint)) as client:
            return client.statistics().keys >= number

    return reached


def test_answers_tell_images_apart(engines: Engines) -> None:
    first, second = engines["plain"].ask(*fresh(2))
    assert first != second


def test_engines_that_start_without_an_owner_answer_right(engines: Engines) -> None:
    seeds = fresh(2)
    assert encoded(engines["left"], seeds, engines) == 2
    assert encoded(engines["first"], seeds, engines) == 2
    assert "no owner" in "\n".join(engines["left"].lines)


def test_a_producer_encodes_once_for_two_consumers(
    engines: Engines, owner: Owner, endpoint: Path
) -> None:
    seeds = fresh(4)
    producer = engines["producer"]
    before = producer.encoded
    producer.ask(*seeds)
    assert producer.encoded - before == 4
    until(kept(endpoint, 4))
    for name in ("first", "second"):
        assert encoded(engines[name], seeds, engines) == 0
        assert engines[name].call("leased") == 0
    producer.ask(*seeds)  # and not a second time
    assert producer.encoded - before == 4


def test_what_one_engine_encodes_now_is_awaited_by_the_other(
    engines: Engines, owner: Owner
) -> None:
    left, right_ = engines["left"], engines["right"]
    before = left.encoded + right_.encoded
    seeds = fresh(6)
    left.begin("ask", seeds, 8)
    right_.begin("ask", seeds, 8)
    answers = [left.result(), right_.result()]
    assert all(right(engines, seeds, each) for each in answers)
    assert left.encoded + right_.encoded - before == 6


def test_requests_for_the_same_images_in_any_order_never_await_each_other(
    engines: Engines, owner: Owner
) -> None:
    """Each would else have the claim of one image and await the other, for all of `peer_wait`."""
    left, right_ = engines["left"], engines["right"]
    before = left.encoded + right_.encoded
    timeouts = left.counts().get("wait_timeouts", 0) + right_.counts().get("wait_timeouts", 0)
    first, second, third = fresh(3)
    forth = [[first, second], [third, third, first], [second, third]]
    back = [[second, first], [third, second], [first, third, third]]
    left.begin("ask_of_all", forth, 8)
    right_.begin("ask_of_all", back, 8)
    answers = left.result(), right_.result()
    for requests, found in zip((forth, back), answers, strict=True):
        assert found == engines["plain"].call("ask_of_all", requests, 8)
    assert left.encoded + right_.encoded - before == 3
    later = left.counts().get("wait_timeouts", 0) + right_.counts().get("wait_timeouts", 0)
    assert later == timeouts


def test_an_owner_that_is_killed_and_comes_back_costs_hits_alone(
    engines: Engines, owner: Owner, endpoint: Path
) -> None:
    left, right_ = engines["left"], engines["right"]
    seeds = fresh(4)
    assert encoded(left, seeds, engines) == 4
    more = seeds + fresh(12)
    for engine in (left, right_):
        engine.begin("ask", more, 8)
    owner.kill()
    for engine in (left, right_):
        assert right(engines, more, engine.result())
    assert right(engines, more, left.ask(*more))  # with none
    with Owner(endpoint):
        attached(engines)
        again = fresh(3)
        assert encoded(left, again, engines) == 3
        until(kept(endpoint, 3))
        assert encoded(right_, again, engines) == 0


def test_an_owner_killed_between_steps_again_and_again_is_only_slower(
    engines: Engines, endpoint: Path
) -> None:
    for _ in range(3):
        with Owner(endpoint) as serving:
            attached(engines)
            seeds = fresh(3)
            engines["left"].begin("ask", seeds, 8)
            engines["right"].begin("ask", seeds, 8)
            serving.kill()
            assert right(engines, seeds, engines["left"].result())
            assert right(engines, seeds, engines["right"].result())


def test_what_is_evicted_between_plan_and_load_is_encoded_in_the_same_step(
    engines: Engines, owner: Owner, endpoint: Path
) -> None:
    left, first = engines["left"], engines["first"]
    seeds = fresh(3)
    assert encoded(left, seeds, engines) == 3
    until(kept(endpoint, 3))
    first.call("evict_what_is_planned", str(endpoint))
    try:
        assert encoded(first, seeds, engines) == 3
    finally:
        first.call("evict_no_more")
    assert first.counts()["reencoded"] == 3
    assert first.call("leased") == 0


def test_a_pool_far_too_small_evicts_and_answers_stay_right(
    engines: Engines, endpoint: Path
) -> None:
    with Owner(endpoint, capacity_bytes=64 << 10):
        attached(engines)
        seeds = fresh(24)
        for _ in range(2):
            for engine in (engines["left"], engines["right"]):
                engine.begin("ask", seeds, 4)
            wanted = engines["plain"].ask(*seeds, tokens=4)
            assert engines["left"].result() == wanted
            assert engines["right"].result() == wanted


def test_saves_that_find_a_full_pool_are_dropped_and_counted(
    engines: Engines, endpoint: Path
) -> None:
    left = engines["left"]
    with Owner(endpoint, capacity_bytes=MIB), blocking.connect(str(endpoint)) as writer:
        attached(engines)
        before = left.counts().get("saves_dropped", 0)
        writer.put(torch.zeros(MIB, dtype=torch.uint8))  # a read is owed: nothing can go
        seeds = fresh(3)
        assert encoded(left, seeds, engines) == 3
        until(lambda: left.counts().get("saves_dropped", 0) == before + 3)


def test_each_outage_is_warned_of_once(engines: Engines) -> None:
    lines = [line for line in engines["right"].lines if "featcache" in line and "WARNING" in line]
    back = [line for line in engines["right"].lines if "featcache: an owner is back" in line]
    assert lines
    assert len(lines) <= len(back) + 1
