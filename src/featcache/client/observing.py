"""What an attached observer asks for: the messages of one link, put together into records."""

from typing import Final, TypeVar

import attrs
import numpy as np

from featcache.control import observing
from featcache.control.messages import ProtocolError, Reply
from featcache.control.observer_link import ObserverLink
from featcache.observation import (
    HomeView,
    KeysPage,
    ReadingHostView,
    SessionView,
    SlabMap,
    Snapshot,
)

A = TypeVar("A", bound=observing.Answer)

_MAX_PAGES: Final = 4096
_STEPS: Final = 255.0


class Observing:
    """The engine of an open `Observer`."""

    def __init__(self, link: ObserverLink, timeout_s: float) -> None:
        self.link = link
        self._timeout_s = timeout_s

    async def snapshot(self) -> Snapshot:
        """Return the pool and its sessions."""
        link = self.link
        observed = await self._ask(observing.Observe(link.number()), observing.Observed)
        sessions: list[SessionView] = []
        after = -1
        for _ in range(_MAX_PAGES):
            request = observing.ListSessions(link.number(), after)
            page = await self._ask(request, observing.SessionList)
            sessions += page.sessions
            if not page.more or not page.sessions:
                break
            after = page.sessions[-1].session
        pool = observed.pool
        homes, reading_hosts = await self._hosts() if pool.peers else ((), ())
        return Snapshot(
            **attrs.asdict(pool, recurse=False),
            sessions=tuple(sessions),
            homes=homes,
            reading_hosts=reading_hosts,
        )

    async def _hosts(self) -> tuple[tuple[HomeView, ...], tuple[ReadingHostView, ...]]:
        """Return the hosts that are read from, and those that read."""
        homes: list[HomeView] = []
        reading: list[ReadingHostView] = []
        after: str | None = ""
        for _ in range(_MAX_PAGES):
            request = observing.ListHosts(self.link.number(), after or "")
            page = await self._ask(request, observing.HostList)
            homes += page.homes
            reading += page.reading_hosts
            after = page.next
            if after is None:
                break
        return tuple(homes), tuple(reading)

    async def keys(self, order: observing.Order, after: str, limit: int) -> KeysPage:
        """Return a page of keys."""
        request = observing.ListKeys(self.link.number(), order, after, limit)
        return (await self._ask(request, observing.KeyList)).page

    async def map(self, cells: int) -> SlabMap:
        """Return the slab by offset."""
        request = observing.MapSlab(self.link.number(), cells)
        found = await self._ask(request, observing.SlabCells)
        count = len(found.states)
        if not count or len(found.used) != count or len(found.ages_s) != 4 * count:
            raise ProtocolError("the owner's map of its slab is not whole")
        return SlabMap(
            capacity_bytes=found.capacity_bytes,
            committed_bytes=found.committed_bytes,
            cell_bytes=found.capacity_bytes / count,
            states=found.states.decode("ascii", "replace"),
            used=tuple(step / _STEPS for step in found.used),
            ages_s=tuple(np.frombuffer(found.ages_s, "<f4").tolist()),
        )

    async def evict(self, key: bytes) -> bool:
        """Drop a key; return whether it was there."""
        return (await self._ask(observing.Evict(self.link.number(), key), Reply)).flag

    async def _ask(self, request: observing.Request, kind: type[A]) -> A:
        answer = await self.link.request(request, self._timeout_s)
        if not isinstance(answer, kind) or answer.request != request.request:
            raise ProtocolError(f"the owner answered {request!r} with {type(answer).__name__}")
        return answer

    async def aclose(self) -> None:
        """Say goodbye."""
        await self.link.aclose()

    def forget(self) -> None:
        """Drop descriptors in a forked child."""
        self.link.forget()
