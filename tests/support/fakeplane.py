"""A data plane in memory: what `reach.plane.DataPlane` promises, between owners of one process.

Reads are copies between addresses, done in the loop's next turn, or when the test says so.
"""

import asyncio
import ctypes
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar

import pytest

from featcache.errors import BackendUnavailable, CacheClosed
from featcache.owner import beyond
from featcache.reach.plane import HOST, Memory, Piece


class FakeTransfer:
    """A read that a test may hold up."""

    def __init__(
        self, plane: "FakePlane", peer: str, pieces: Sequence[Piece], there: Memory
    ) -> None:
        self.ended: asyncio.Future[None] = plane.loop.create_future()
        self.abandoned = False
        self.peer = peer
        self.pieces = pieces
        self.there = there
        self._plane = plane

    def abandon(self) -> None:
        self.abandoned = True

    def land(self) -> None:
        """Copy the bytes, and end."""
        if self.ended.done():
            return
        peer = FakePlane.planes.get(self.peer)
        try:
            for piece in self.pieces:
                self._plane.check(piece.here, piece.nbytes)
                if peer is None:
                    raise BackendUnavailable("remote disconnected")
                if peer.memory != self.there:
                    raise BackendUnavailable("not registered as memory of this kind")
                peer.check(piece.there, piece.nbytes)
                ctypes.memmove(piece.here, piece.there, piece.nbytes)
        except BackendUnavailable as error:
            self.fail(error)
        else:
            self.ended.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)
            self.ended.exception()


class FakePlane:
    """One owner's."""

    planes: ClassVar[dict[str, "FakePlane"]] = {}

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        memory: Memory = HOST,
        *,
        by_segments: bool = False,
    ) -> None:
        self.on_notification: Callable[[bytes], object] = lambda _: None
        self.name, self.loop, self.memory = name, loop, memory
        self.by_segments = by_segments
        self.registered: dict[int, int] = {}
        self.transfers: list[FakeTransfer] = []
        self.held = False
        """Whether reads stay in progress until the test lands them."""
        self.notifications = 1
        """How often each notification arrives: 0 if it is lost."""
        self.sent: list[bytes] = []
        self.expects = False
        self._known: set[str] = set()
        FakePlane.planes[name] = self

    def check(self, address: int, nbytes: int) -> None:
        """Refuse what is not in one registration, as NIXL does."""
        for start, size in self.registered.items():
            if start <= address and address + nbytes <= start + size:
                return
        raise BackendUnavailable("not registered")

    def _now(self, call: Callable[[], object]) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = self.loop.create_future()

        def run() -> None:
            call()
            if not future.done():
                future.set_result(None)

        self.loop.call_soon(run)
        return future

    def register(self, address: int, nbytes: int) -> Awaitable[None]:
        return self._now(lambda: self.registered.update({address: nbytes}))

    def deregister(self, address: int) -> Awaitable[None]:
        return self._now(lambda: self.registered.pop(address))

    async def metadata(self) -> bytes:
        return self.name.encode()

    async def add_peer(self, metadata: bytes) -> str:
        self._known.add(metadata.decode())
        return metadata.decode()

    def read(self, peer: str, pieces: Sequence[Piece], there: Memory = HOST) -> FakeTransfer:
        assert peer in self._known, "its metadata came first"
        transfer = FakeTransfer(self, peer, pieces, there)
        self.transfers.append(transfer)
        if not self.held:
            self.loop.call_soon(transfer.land)
        return transfer

    def notify(self, peer: str, payload: bytes) -> None:
        self.sent.append(payload)
        target = FakePlane.planes.get(peer)
        for _ in range(self.notifications if target is not None else 0):
            self.loop.call_soon(lambda: target is not None and target.on_notification(payload))

    def expect(self, *, notifications: bool) -> None:
        self.expects = notifications

    def forget(self) -> None:
        pass

    async def close(self) -> None:
        FakePlane.planes.pop(self.name, None)
        for transfer in self.transfers:
            transfer.fail(CacheClosed("the cache was closed"))
        self.registered.clear()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have owners made from now on use fake planes."""
    FakePlane.planes.clear()
    monkeypatch.setattr(beyond, "make_plane", FakePlane)


def pieces_of(transfers: Sequence[FakeTransfer]) -> list[int]:
    """The sizes of all the pieces that were read."""
    return [piece.nbytes for piece in itertools.chain(*(each.pieces for each in transfers))]
