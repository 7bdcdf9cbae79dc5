"""What the benchmarks change in the process that they run in is as it was after each of their tests."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Benchmarks silence the log; tests that come after them look at it."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
