"""Tests of the plugin in SGLang run where SGLang is installed; each in the server's own environment."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from featcache.integrations.sglang.clients import close_clients
from support import processes

HAS_SGLANG = importlib.util.find_spec("sglang") is not None
_IMPORTS_S = 300.0
"""How long the import of SGLang may take, where ranks are forked from: it needs 13 s of a processor."""

if HAS_SGLANG:
    # Where ranks are forked from, modules are looked for along PYTHONPATH alone.
    found = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, found))
    processes.preload("integrations.sglang.real")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Import SGLang where ranks are forked from before the first test's time runs."""
    if HAS_SGLANG and session.items and not session.config.option.collectonly:
        processes.warm_up(_IMPORTS_S)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integrations/sglang" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("default"))  # SGLang has warnings of its own


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server's id of each test's own; the sessions that it read in are closed."""
    name = "test"  # each test has a runtime folder of its own
    monkeypatch.setenv("FEATCACHE_SGLANG_SERVER", name)
    monkeypatch.setenv("FEATCACHE_SGLANG_SPILL", "16MiB")  # made whole at the start
    monkeypatch.setenv("FEATCACHE_PREFAULT", "no")
    yield name
    close_clients()
