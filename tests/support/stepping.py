"""Actors that stop before any access of a shared word: whoever moves them chooses the interleaving.

An actor is a thread, of which one runs at a time and the others stand still before a load or a store of
words that are shared. Its mover (a test, or hypothesis) has it go on by so many of these.
"""

import _thread
import threading
from collections.abc import Callable
from typing import Any, Final

_here: Final = threading.local()


class Killed(BaseException):
    """Unwinds an actor whose process died: nothing that it does meanwhile may reach a shared word."""


class Actor:
    """One thread of one process, which makes so many accesses of shared words as it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.accesses = 0
        """All that it ever made."""
        self._left = 0
        self._work: Callable[[], object] | None = None
        self._error: BaseException | None = None
        self._go, self._back = _thread.allocate_lock(), _thread.allocate_lock()
        self._go.acquire()
        self._back.acquire()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether its work is not done."""
        return self._work is not None

    def begin(self, work: Callable[[], object]) -> None:
        """Have it do something, as it is moved."""
        assert not self.busy
        self._work = work

    def advance(self, accesses: int = 1 << 30) -> bool:
        """Move it by so many accesses, or to the end of its work; return whether it is done."""
        if self._work is not None:
            self._left = accesses
            self._go.release()
            self._back.acquire()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
        return not self.busy

    def do(self, work: Callable[[], object]) -> None:
        """Do something from its begin to its end."""
        self.begin(work)
        assert self.advance(), f"{self.name} stands still: it waits for a lock"

    def end(self) -> None:
        """Let it die where it stands, and end its thread."""
        self.dead = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        _here.actor = self
        while True:
            self._go.acquire()
            if self.dead or self._work is None:
                return
            try:
                self._work()
            except Killed:
                return
            except BaseException as error:  # noqa: BLE001 - raised in the mover
                self._error = error
            self._work = None
            self._back.release()

    def stand(self) -> None:
        """Stand still until it is moved again, in its own thread."""
        self._back.release()
        self._go.acquire()
        if self.dead:
            raise Killed

    def access(self) -> None:
        if self.dead:
            raise Killed  # in what unwinds it: a process that was killed does nothing more
        while self._left <= 0:
            self.stand()
        self._left -= 1
        self.accesses += 1


def access() -> None:
    """Count an access of a shared word, in an actor's thread; elsewhere it is done at once."""
    actor: Actor | None = getattr(_here, "actor", None)
    if actor is not None:
        actor.access()


class StepLock:
    """A lock whose holder may stand still; who wants it meanwhile stands still as well."""

    def __init__(self) -> None:
        self._held = False

    def __enter__(self) -> None:
        access()
        while self._held:
            actor: Actor = _here.actor
            actor.stand()
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False


class Shared:
    """Words, or a mapping, of which each load and each store is an access. A slice is loaded in pieces."""

    def __init__(self, words: Any, on_store: Callable[[int, int], None] | None = None) -> None:
        self.words = words
        self._on_store = on_store

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            part = Slice(self.words[index])
            return part if isinstance(self.words, memoryview) else part.tobytes(64)
        access()
        return self.words[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        access()
        if self._on_store is not None:
            self._on_store(index, value)
        self.words[index] = value


class Slice:
    """A part of some words, whose bytes are taken one word after the other."""

    def __init__(self, words: Any) -> None:
        self._bytes = words.cast("B") if isinstance(words, memoryview) else words

    def tobytes(self, piece: int = 8) -> bytes:
        taken = b""
        for start in range(0, len(self._bytes), piece):
            access()
            taken += bytes(self._bytes[start : start + piece])
        return taken


def finding(find: Callable[..., int]) -> Callable[..., int]:
    """Return a search of a mapping that is one access."""

    def stepped(*args: Any) -> int:
        access()
        return find(*args)

    return stepped
