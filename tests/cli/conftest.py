"""Commands run as a user runs them, except that they are forked and so find torch imported."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.commands import Daemon, Run, run_command, serving
from support import processes


@pytest.fixture(scope="session", autouse=True)
def _server() -> None:
    processes.warm_up()


@pytest.fixture
def command(runtime_dir: Path) -> Run:
    """Run a command to its end."""
    return run_command(runtime_dir)


Serve = Callable[..., Daemon]


@pytest.fixture
def serve(runtime_dir: Path) -> Iterator[Serve]:
    """Start owners; whatever becomes of them, none is left."""
    with serving(runtime_dir) as start:
        yield start
