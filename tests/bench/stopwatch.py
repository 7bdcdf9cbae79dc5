"""Times the pieces of a call by wrapping the functions that it is made of, one inside the other."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any


@dataclass(slots=True)
class Step:
    """All calls of one function."""

    depth: int = 0
    calls: int = 0
    total_ns: int = 0
    own_ns: int = 0
    """without the time in the wrapped functions that it called"""


def find(path: str) -> tuple[Any, str] | None:
    """Return where a function is defined, `package.module:Class.method`, and its name; None if nowhere."""
    module_name, _, names = path.partition(":")
    *outer, name = names.split(".")
    try:
        holder: Any = importlib.import_module(module_name)
        for part in outer:
            holder = getattr(holder, part)
        if isinstance(holder, type):
            holder = next(each for each in holder.__mro__ if name in vars(each))
        getattr(holder, name)
    except (ImportError, AttributeError, StopIteration):
        return None
    return holder, name


class Stopwatch:
    """The wrapped functions and their times, in one thread; other threads are not timed."""

    def __init__(self) -> None:
        self.steps: dict[str, Step] = {}
        self.missing: list[str] = []
        self._inner: list[int] = []

    def wrap(self, path: str) -> None:
        """Time a function by its path, `package.module:Class.method`; it may be absent."""
        found = find(path)
        if found is None:
            self.missing.append(path)
        else:
            self.wrap_in(*found, path.rpartition(":")[2])

    def wrap_in(self, holder: Any, name: str, label: str) -> None:
        """Time an attribute of a class, a module or an object."""
        function = (
            vars(holder).get(name) if isinstance(holder, type) else getattr(holder, name, None)
        )
        if not callable(function):
            self.missing.append(label)
            return
        try:
            setattr(holder, name, self._timed(function, label))
        except (AttributeError, TypeError):
            self.missing.append(label)

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        inner = self._inner
        steps = self.steps

        @functools.wraps(function, updated=())
        def timed(*arguments: Any, **named: Any) -> Any:
            step = steps.get(label)
            if step is None:  # before what it calls, so that the table reads from the outside in
                step = steps[label] = Step(len(inner))
            inner.append(0)
            began_ns = perf_counter_ns()
            try:
                return function(*arguments, **named)
            finally:
                took_ns = perf_counter_ns() - began_ns
                below_ns = inner.pop()
                if inner:
                    inner[-1] += took_ns
                step.calls += 1
                step.total_ns += took_ns
                step.own_ns += took_ns - below_ns

        return timed

    def take(self, count: int) -> list[dict[str, Any]]:
        """The steps of `count` calls since the last `take`, in microseconds for each call."""
        rows = [
            {
                "step": "  " * step.depth + label,
                "calls": round(step.calls / count, 2),
                "us": round(step.total_ns / count / 1e3, 2),
                "own_us": round(step.own_ns / count / 1e3, 2),
            }
            for label, step in self.steps.items()
        ]
        self.steps.clear()
        return rows


def overhead_us() -> float:
    """The cost of the wrapping to a caller, in microseconds a call."""
    watch = Stopwatch()

    def nothing() -> None:
        pass

    timed = watch._timed(nothing, "nothing")
    count = 20000
    began_ns = perf_counter_ns()
    for _ in range(count):
        nothing()
    plain_ns = perf_counter_ns() - began_ns
    began_ns = perf_counter_ns()
    for _ in range(count):
        timed()
    return round((perf_counter_ns() - began_ns - plain_ns) / count / 1e3, 2)
