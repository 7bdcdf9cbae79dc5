"""An observer that is asked and answers as the test says, and what is on the screen of an application."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import featcache
from cli.top.records import key, page, slab, snapshot
from featcache import FeatcacheError, KeysPage, OwnerLost, OwnerUnreachable, SlabMap, Snapshot
from featcache.cli.top import screen, watch
from featcache.cli.top.screen import Top


class FakeOwner:
    """Stands at every endpoint. It notes what observers ask for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.evicted: list[bytes] = []
        self.answers = asyncio.Event()
        self.answers.set()
        """Cleared: it is stopped."""
        self.gone: FeatcacheError | None = None
        """What every call fails with."""
        self.keys = page(key("image/1", 9), key("image/2", 8))
        self.seen: dict[str, Any] = {}
        self.asking = self.most_asking = 0
        self.opened = self.closed = 0
        self.before_answer: Callable[[str], object] = lambda _: None

    def observe(self, *_: object, **__: object) -> "FakeObserver":
        return FakeObserver(self)

    async def answer(self, what: str) -> None:
        """Answer one request, once it may."""
        self.asked.append(what)
        self.asking += 1
        self.most_asking = max(self.most_asking, self.asking)
        try:
            await self.answers.wait()
            self.before_answer(what)
        finally:
            self.asking -= 1
        if self.gone is not None:
            raise self.gone

    def dies(self) -> None:
        """Be gone, as an attached observer sees it first and one that dials later."""
        self.gone = OwnerLost("the owner at x is gone: its process died")

    def comes_back(self) -> None:
        """Serve again."""
        self.gone = None


class FakeObserver:
    """One who is attached to it."""

    def __init__(self, owner: FakeOwner) -> None:
        self._owner = owner

    async def open(self) -> "FakeObserver":
        if self._owner.gone is not None:
            raise OwnerUnreachable("nobody listens at x")
        self._owner.opened += 1
        return self

    async def snapshot(self) -> Snapshot:
        await self._owner.answer("snapshot")
        return snapshot(**self._owner.seen)

    async def map(self, cells: int) -> SlabMap:
        await self._owner.answer("map")
        return slab("k" * cells)

    async def keys(self, order: str, *, limit: int) -> KeysPage:
        await self._owner.answer(f"keys by {order}")
        return self._owner.keys

    async def evict(self, name: bytes) -> bool:
        self._owner.evicted.append(name)
        return True

    async def aclose(self) -> None:
        self._owner.closed += 1


class Clock:
    """A clock that runs, and can be put forward."""

    def __init__(self) -> None:
        import time

        self._now = time.monotonic
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return self._now() + self.ahead_s


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> FakeOwner:
    fake = FakeOwner()
    monkeypatch.setattr(featcache, "observe", fake.observe)
    monkeypatch.setattr(watch, "_REDIAL_S", 0.001)
    return fake


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    for module in (watch, screen):
        monkeypatch.setattr(module, "clock", fake)
    return fake


def on_screen(app: Top) -> list[str]:
    """The lines that the terminal has."""
    return [strip.text.rstrip() for strip in app.screen._compositor.render_strips()]


def text_of(app: Top) -> str:
    """The same as one text."""
    return "\n".join(on_screen(app))
