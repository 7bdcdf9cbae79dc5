"""Shared by the benchmarks' tests: processes that start soon, a process left as it was."""

import multiprocessing
from collections.abc import Iterator

import pytest
import structlog

from support.processes import Server


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes that benchmarks spawn: their pickled arguments reach them all the same.

    To spawn them they must import torch, each of them, which takes longer than all else they do
    here. (A benchmark needs it, since CUDA does not survive a fork.)
    """
    server = Server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)
    monkeypatch.setattr("bench.crew._CONTEXT", server)


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Benchmarks silence the log; tests that come after them look at it."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
