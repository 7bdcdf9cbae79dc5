"""A worker's link to an owner that keeps its attach waiting."""

import threading
from typing import Any

import pytest
import torch

from featcache import blocking
from featcache.integrations.vllm import link as links
from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.link import ThreadLink


class SlowClient:
    """A client whose `open` waits for the test."""

    def __init__(self) -> None:
        self.opening, self.goes_on, self.closed = (threading.Event() for _ in range(3))
        self.is_attached = True

    def open(self) -> None:
        """Open once the test says so."""
        self.opening.set()
        assert self.goes_on.wait(30), "the test let it open"

    def close(self) -> None:
        """Note it."""
        self.closed.set()


def test_a_client_that_opens_after_its_link_was_closed_is_closed_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client: Any = SlowClient()
    monkeypatch.setattr(blocking, "connect", lambda *_, **__: client)
    monkeypatch.setattr(links, "_CLOSE_S", 0.01)
    link = ThreadLink("/nowhere", Counts(), device=torch.device("cpu"), name="rank0")
    assert client.opening.wait(30)
    link.close()
    client.goes_on.set()
    assert client.closed.wait(30)
