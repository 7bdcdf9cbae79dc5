"""What tests of servers share: waits, and the programs that users start beside an example."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import featcache

T = TypeVar("T")

SERVE: Final = Path(featcache.__file__).with_name("__main__.py")
"""The command line, as ``python -m featcache`` runs it."""
WITHIN_S: Final = 30.0


def until(look: Callable[[], T]) -> T:
    """What `look` returns, once that is true. For states of other processes, that give no event."""
    give_up_s = time.monotonic() + WITHIN_S
    while not (found := look()):
        assert time.monotonic() < give_up_s, f"not so within {WITHIN_S} s: {look}"
        time.sleep(0.01)
    return found
