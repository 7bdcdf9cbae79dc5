"""Children for the tests of faults, and what must be so after each of them."""

from collections.abc import Iterator

import pytest
import structlog

import helpers
from faults.checks import Log


@pytest.fixture(scope="session", autouse=True)
def _server() -> None:
    helpers.warm_up()


@pytest.fixture
def start(no_leaks: None) -> Iterator[helpers.Start]:
    """Start a script in a process of its own. All are dead before the look for leaks."""
    with helpers.starting() as started:
        yield started


@pytest.fixture
def log() -> Iterator[Log]:
    """What this process logs."""
    with structlog.testing.capture_logs() as entries:
        yield entries
