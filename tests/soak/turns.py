"""The length of each turn of an event loop: from the return of its `select` to the next call."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import time
from collections.abc import Mapping
from typing import Any

LONG_S = 0.005
"""What no turn should take."""


class Aside(contextlib.ContextDecorator):
    """The soak's own work in a turn: what it makes and compares is no work of featcache's."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0
        self._depth = 0
        self._began = (0.0, 0.0)

    def __enter__(self) -> None:
        if not self._depth:
            self._began = (time.thread_time(), time.monotonic())
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            began_cpu_s, began_s = self._began
            self.cpu_s += time.thread_time() - began_cpu_s
            self.wall_s += time.monotonic() - began_s


aside = Aside()
"""This process's; its loop runs in one thread, and nothing that is set aside awaits."""


class TimedSelector(selectors.BaseSelector):
    """A selector that measures what its loop does between two of its waits."""

    def __init__(self) -> None:
        self._inner = selectors.DefaultSelector()
        self._wall_s = self._cpu_s = 0.0
        self.turns = self.long_turns = 0
        self.longest_cpu_s = self.longest_wall_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait, and measure the turn that ends here."""
        if self._wall_s:
            cpu_s = time.thread_time() - self._cpu_s - aside.cpu_s
            wall_s = time.monotonic() - self._wall_s - aside.wall_s
            self.turns += 1
            self.long_turns += cpu_s > LONG_S
            self.longest_cpu_s = max(self.longest_cpu_s, cpu_s)
            self.longest_wall_s = max(self.longest_wall_s, wall_s)
        ready = self._inner.select(timeout)
        aside.cpu_s = aside.wall_s = 0.0
        self._cpu_s, self._wall_s = time.thread_time(), time.monotonic()
        return ready

    def reset(self) -> None:
        """Forget the turns of the start."""
        self.turns = self.long_turns = 0
        self.longest_cpu_s = self.longest_wall_s = 0.0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As the inner one."""
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """As the inner one."""
        return self._inner.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As the inner one."""
        return self._inner.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """As the inner one."""
        return self._inner.get_map()

    def close(self) -> None:
        """As the inner one."""
        self._inner.close()


def timed_runner(selector: TimedSelector) -> asyncio.Runner:
    """A runner whose loop's turns are measured."""
    return asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector))
