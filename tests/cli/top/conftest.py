from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.top.fakes import clock as clock  # noqa: PLC0414 - fixtures
from cli.top.fakes import owner as owner  # noqa: PLC0414 - fixtures
from cli.top.terminals import Terminal, terminals

InTerminal = Callable[..., Terminal]


@pytest.fixture
def in_terminal(runtime_dir: Path) -> Iterator[InTerminal]:
    """Run commands in terminals; whatever becomes of them, none is left."""
    with terminals() as run:
        yield run
