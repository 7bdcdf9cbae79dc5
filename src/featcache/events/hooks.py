"""Hooks: what is called with each event; the first of them writes the application's log.

They run in the thread that met the fact and must return at once; one that raises is reported on stderr
and never harms the cache.
"""

import contextlib
import inspect
import json
import logging
import re
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import structlog

from featcache.errors import SettingsError

if TYPE_CHECKING:
    from featcache.events.event import Event

__all__ = ["Hook", "Throttle", "add_hook", "emit", "is_emitting", "log_event", "remove_hook"]

Hook = Callable[["Event"], object]

LOGGER: Final = "featcache"
_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_PLAIN: Final = re.compile(r'[^\s"=\\]+')
_logger: Final = logging.getLogger(LOGGER)


def log_event(event: "Event") -> None:
    """Write the record to the log: the event's name, then its facts as key-values.

    To structlog if the application configured that, else to the logger ``featcache`` of `logging`, in
    the message and as attributes of its record. So with nothing configured warnings reach stderr, by
    the last resort of `logging`, and nothing reaches stdout.
    """
    severity = event.urgency
    level = _LEVELS[severity]
    # Looked at anew each time, so that a later structlog.configure (or a test's capture) holds.
    if structlog.is_configured():
        log = structlog.get_logger(LOGGER).bind()
        # Of the class: the instance may hand any name on to the logger that it wraps.
        is_enabled_for = getattr(type(log), "is_enabled_for", None)
        if is_enabled_for is None or is_enabled_for(log, level):
            getattr(log, severity)(event.name, **event.logged())
    elif _logger.isEnabledFor(level):
        facts = event.logged()
        _logger.log(level, _line(event.name, facts), extra=facts)


def _line(name: str, facts: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={_text(value)}" for key, value in facts.items())])


def _text(value: object) -> str:
    """Return a value on one line, quoted unless it is a plain word: names and keys are others'."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "; ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if not text.isprintable():
        return json.dumps(text)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


_hooks: tuple[Hook, ...] = (log_event,)
_here = threading.local()


def add_hook(hook: Hook) -> None:
    """Have `hook` called with every `Event` of this process from now on. Safe in any thread.

    It is called in the thread and the loop where the fact is met, and must not block.

    Raises:
        SettingsError: it can't be called, or it is a coroutine function, which nobody would await.

    """
    global _hooks  # noqa: PLW0603 - one process-wide tuple, replaced whole so that emit needs no lock
    if not callable(hook):
        raise SettingsError(f"a hook is called with each event: {hook!r} can't be called")
    if inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(type(hook).__call__):
        raise SettingsError(f"hook {hook!r} is a coroutine function: nobody would await it")
    _hooks = (*_hooks, hook)


def remove_hook(hook: Hook) -> None:
    """Undo `add_hook`; the first hook, `log_event`, can be removed too. Unknown hooks are ignored.

    Safe in any thread.
    """
    global _hooks  # noqa: PLW0603 - see add_hook
    # By equality: a bound method is another object each time that it is named.
    _hooks = tuple(known for known in _hooks if known != hook)


def emit(event: "Event") -> None:
    """Hand one record to every hook."""
    outer, _here.emitting = is_emitting(), True
    try:
        for hook in _hooks:
            _call(hook, event)
    finally:
        _here.emitting = outer


def is_emitting() -> bool:
    """Whether this thread is in a hook: its pool may be in the midst of a decision."""
    return getattr(_here, "emitting", False)


def _call(hook: Hook, event: "Event") -> None:
    try:
        hook(event)
    except Exception as error:  # noqa: BLE001 - a hook's fault must not become the pool's
        # Not through the log, which may be what failed; and stderr may be closed, or not there.
        with contextlib.suppress(Exception):
            sys.stderr.write(f"featcache: hook {hook!r} failed: {error!r}\n")


class Throttle:
    """Lets `burst` events of a busy kind through in an interval, and counts the others."""

    def __init__(self, interval_s: float, *, burst: int = 1) -> None:
        self._interval_s = interval_s
        self._burst = burst
        self._left = 0
        self._next_s = float("-inf")
        self._held_back = 0

    def pass_(self, now_s: float) -> int | None:
        """Return how many were held back since the last that passed, or None to hold this one."""
        if now_s >= self._next_s:
            self._next_s = now_s + self._interval_s
            self._left = self._burst
        if not self._left:
            self._held_back += 1
            return None
        self._left -= 1
        held_back, self._held_back = self._held_back, 0
        return held_back

    def emit(self, now_s: float, make: Callable[[int], "Event"]) -> None:
        """Emit the event that `make` returns, told how many were held back; or hold it back too."""
        held_back = self.pass_(now_s)
        if held_back is not None:
            emit(make(held_back))
