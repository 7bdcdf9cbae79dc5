"""Whole vLLM engines over one owner: what they answer is what an engine without a connector answers."""

from pathlib import Path
from typing import Final

import pytest
import torch

from featcache import blocking
from integrations.vllm.fleet import Engines, attached, encoded, fresh, kept, right, until
from integrations.vllm.owners import Owner

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.timeout(400)

MIB: Final = 1 << 20


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


def test_an_owner_killed_between_plan_and_load_of_what_brings_only_sizes_costs_nothing(
    engines: Engines, owner: Owner, endpoint: Path
) -> None:
    """Nobody could encode it in that step: without pixels vLLM can't, and the engine would end."""
    left, first = engines["left"], engines["first"]
    seeds = fresh(3)
    assert encoded(left, seeds, engines) == 3
    until(kept(endpoint, 3))
    before = first.encoded
    first.call("set_sizes_only", True)
    try:
        first.call("kill_when_planned", owner.pid)
        answers = first.call("ask_of_all", [seeds], 8)
    finally:
        first.call("set_sizes_only", False)
    assert answers == engines["plain"].call("ask_of_all", [seeds], 8)
    assert first.encoded == before


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
