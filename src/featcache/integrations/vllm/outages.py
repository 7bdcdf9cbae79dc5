"""An owner that is away is told once by a process, however many of its sessions met it."""

import logging
import threading
from typing import Any, Final

from featcache.events import Event, OwnerBack, OwnerGone
from featcache.events.hooks import LOGGER, add_hook, remove_hook
from featcache.integrations.vllm.counts import Counts

logger: Final = logging.getLogger("vllm.featcache")
"""Under vLLM's own logger, whose handlers and level it has."""
_EVENTS: Final = "featcache.owner."


class Outages:
    """The endpoints that connectors of this process use, and which of them nobody serves now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[str, list[tuple[Counts, bool]]] = {}
        self._away: set[str] = set()

    def watch(self, endpoint: str, counts: Counts, *, warns: bool) -> None:
        """Count the losses of an owner from now on; `warns` of one of them, or tell it at INFO."""
        with self._lock:
            if not self._users:
                add_hook(self._on_event)
                logging.getLogger(LOGGER).addFilter(self._is_not_told_here)
            self._users.setdefault(endpoint, []).append((counts, warns))

    def unwatch(self, endpoint: str, counts: Counts) -> None:
        """Undo `watch`."""
        with self._lock:
            users = [one for one in self._users.get(endpoint, []) if one[0] is not counts]
            self._users[endpoint] = users
            if not users:
                del self._users[endpoint]
                self._away.discard(endpoint)
            if not self._users:
                remove_hook(self._on_event)
                logging.getLogger(LOGGER).removeFilter(self._is_not_told_here)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, OwnerGone):
            self._gone(event)
        elif isinstance(event, OwnerBack):
            self._back(event)

    def _gone(self, event: OwnerGone) -> None:
        with self._lock:
            users = self._users.get(event.endpoint)
            if users is None or event.endpoint in self._away:
                return
            self._away.add(event.endpoint)
            for counts, _ in users:
                counts.add("owner_losses")
            warns = any(warns for _, warns in users)
        logger.log(
            logging.WARNING if warns else logging.INFO,
            "featcache: no owner at %s (%s): every input is encoded here until one is back",
            event.endpoint,
            event.reason,
        )

    def _back(self, event: OwnerBack) -> None:
        with self._lock:
            if event.endpoint not in self._away:
                return
            self._away.discard(event.endpoint)
        logger.info("featcache: an owner is back at %s", event.endpoint)

    def _is_not_told_here(self, record: logging.LogRecord) -> bool:
        """Keep featcache's own lines of the same out of the log."""
        endpoint: Any = getattr(record, "endpoint", None)
        return endpoint not in self._users or not record.getMessage().startswith(_EVENTS)


outages: Final = Outages()
"""Those of this process."""
