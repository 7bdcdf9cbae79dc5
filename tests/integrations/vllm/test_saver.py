"""Saves beside the steps: bounded, in their own thread, and counted when they are dropped."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from featcache import blocking
from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.link import ThreadLink
from featcache.integrations.vllm.outages import outages
from featcache.integrations.vllm.saver import Saver
from support.slabs import same

pytestmark = pytest.mark.usefixtures("no_leaks")

OUTPUT = torch.arange(64, dtype=torch.float32).reshape(8, 8)


@pytest.fixture
def owner() -> Iterator[blocking.FeatureCache]:
    with blocking.create(capacity="1MiB") as cache:
        yield cache


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def link(owner: blocking.FeatureCache, counts: Counts) -> Iterator[ThreadLink]:
    made = ThreadLink(owner.endpoint, counts, device=torch.device("cpu"), name="worker")
    assert made.wait_attached(20)
    yield made
    made.close()


def test_what_is_queued_is_saved_by_the_time_of_the_close(
    link: ThreadLink, counts: Counts, owner: blocking.FeatureCache
) -> None:
    saver = Saver(link, counts, 4)
    saver.offer("a", "ka", OUTPUT)
    saver.offer("b", "kb", [OUTPUT, OUTPUT.to(torch.bfloat16)])
    saver.close()
    assert same(owner.get("ka"), OUTPUT)
    assert set(owner.get("kb")) == {"level0", "level1"}
    assert saver.take_ended() == (["a", "b"], [])
    assert counts.take() == {"saves": 2, "save_bytes": OUTPUT.nbytes * 2.5}


def test_what_is_there_already_is_not_saved_again(
    link: ThreadLink, counts: Counts, owner: blocking.FeatureCache
) -> None:
    owner.put(OUTPUT, key="ka")
    saver = Saver(link, counts, 4)
    saver.offer("a", "ka", OUTPUT + 1)
    saver.close()
    assert same(owner.get("ka"), OUTPUT)
    assert saver.take_ended() == (["a"], [])
    assert counts.take() == {"saves_skipped": 1}


def test_a_full_queue_drops_and_never_waits(
    link: ThreadLink, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, go = threading.Event(), threading.Event()
    save = Saver._save

    def stuck(saver: Saver, one: Any) -> None:
        held.set()
        assert go.wait(20)
        save(saver, one)

    monkeypatch.setattr(Saver, "_save", stuck)
    saver = Saver(link, counts, 2)
    saver.offer("a", "ka", OUTPUT)
    assert held.wait(20)
    for name in "bcde":
        saver.offer(name, f"k{name}", OUTPUT)
    assert saver.take_ended() == ([], ["d", "e"])
    go.set()
    saver.close()
    assert saver.take_ended() == (["a", "b", "c"], [])
    assert counts.take()["saves_dropped"] == 2


@pytest.mark.parametrize("megabytes", [1, 2])
def test_a_full_pool_or_a_feature_too_large_drops(
    link: ThreadLink, counts: Counts, owner: blocking.FeatureCache, megabytes: int
) -> None:
    owner.put(torch.zeros(1000, dtype=torch.uint8))  # a read is owed
    saver = Saver(link, counts, 2)
    saver.offer("a", "ka", torch.zeros(megabytes << 20, dtype=torch.uint8))
    saver.close()
    assert saver.take_ended() == ([], ["a"])
    assert counts.take() == {"saves_dropped": 1}


def test_without_an_owner_saves_are_dropped_and_one_line_tells(
    link: ThreadLink,
    counts: Counts,
    owner: blocking.FeatureCache,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other, endpoint = Counts(), owner.endpoint
    outages.watch(endpoint, other, warns=True)
    saver = Saver(link, counts, 2)
    with caplog.at_level(logging.INFO):
        owner.close()
        while link.client is not None:
            pass
        saver.offer("a", "ka", OUTPUT)
        assert saver.take_ended() == ([], ["a"])
        saver.close()
    outages.unwatch(endpoint, other)
    told = [record for record in caplog.records if "no owner at" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"]
    assert counts.take() == {"saves_dropped": 1, "owner_losses": 1}
    assert other.take() == {"owner_losses": 1}
