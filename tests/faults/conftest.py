"""Children for the tests of faults, and what must be so after each of them."""

from collections.abc import Iterator

import pytest
import structlog

from faults.checks import Log
from support import processes


@pytest.fixture(scope="session", autouse=True)
def _server() -> None:
    processes.warm_up()


@pytest.fixture
def start(no_leaks: None) -> Iterator[processes.Start]:
    """Start a script in a process of its own. All are dead before the look for leaks."""
    with processes.starting() as started:
        yield started


@pytest.fixture
def log() -> Iterator[Log]:
    """What this process logs."""
    with structlog.testing.capture_logs() as entries:
        yield entries
