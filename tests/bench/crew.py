"""The processes of a proof: spawned, spoken to through a pipe, killed at the end.

CUDA does not survive a fork, so they are spawned. Each wait for one has a limit; a child also dies
with the process that started it, however that ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import anyio
import structlog
import torch

from support import processes

PATIENCE_S = 90.0
"""For a process to be ready: it imports torch and makes a CUDA context first."""
_CONTEXT = multiprocessing.get_context("spawn")
_PR_SET_PDEATHSIG = 1


class ProofError(Exception):
    """A process failed, or said nothing in time."""


def quiet() -> None:
    """Log nothing: the benchmarks count instead."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


class Pipe:
    """A child's end: `say` and `hear`."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def say(self, *message: Any) -> None:
        self.connection.send(message)

    async def hear(self) -> Any:
        if not self.connection.poll():
            await anyio.wait_readable(self.connection)
        return self.connection.recv()


Script = Callable[..., Awaitable[None]]


def _child(connection: Connection, script: Script, arguments: tuple[Any, ...]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    quiet()
    torch.set_num_threads(1)
    pipe = Pipe(connection)
    try:
        asyncio.run(script(pipe, *arguments))  # type: ignore[arg-type]  # any coroutine
    except BaseException:  # noqa: BLE001 - whatever it is, the proof is told
        with contextlib.suppress(OSError):
            pipe.say("failed", traceback.format_exc())
        raise SystemExit(1) from None


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables for children started inside, set before they run anything."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Child:
    """A process that runs a script, as the proof holds it."""

    def __init__(
        self, script: Script, *arguments: Any, environment: dict[str, str] | None = None
    ) -> None:
        self._connection, far = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_child, args=(far, script, arguments), daemon=True)
        with _environment(environment or {}):
            self._process.start()
        far.close()
        assert self._process.pid is not None, "started"
        self.pid = self._process.pid

    def tell(self, *message: Any) -> None:
        self._connection.send(message)

    async def hear(self, timeout_s: float = PATIENCE_S) -> Any:
        """Wait in the loop for the next message; ProofError if there is none, or a failure."""
        try:
            with anyio.fail_after(timeout_s):
                if not self._connection.poll():
                    await anyio.wait_readable(self._connection)
            message = self._connection.recv()
        except TimeoutError:
            raise ProofError(f"process {self.pid} said nothing within {timeout_s} s") from None
        except (EOFError, ConnectionError):
            self._process.join(5)
            raise ProofError(f"process {self.pid} ended: {self._process.exitcode}") from None
        if message[0] == "failed":
            raise ProofError(f"process {self.pid} failed:\n{message[1]}")
        return message

    async def expect(self, word: str, timeout_s: float = PATIENCE_S) -> Any:
        """Wait for a message that begins with this word; return the rest of it."""
        message = await self.hear(timeout_s)
        if message[0] != word:
            raise ProofError(f"process {self.pid} said {message!r} where {word!r} was due")
        return message[1:]

    async def ask(self, *message: Any, timeout_s: float = PATIENCE_S) -> Any:
        """Tell, and return the answer, which begins with the same word."""
        self.tell(*message)
        return await self.expect(message[0], timeout_s)

    def kill(self) -> None:
        """Kill with SIGKILL; dead when this returns. Idempotent."""
        self._process.kill()
        self._process.join(30)

    async def murder(self) -> None:
        """Kill with SIGKILL and wait in the loop: a CUDA context takes its time to go."""
        self._process.kill()
        await asyncio.to_thread(self._process.join, 30)

    def failure(self) -> str | None:
        """The traceback of its failure, if it failed and nobody has heard of it yet."""
        with contextlib.suppress(EOFError, OSError):
            while self._connection.poll():
                word, *rest = self._connection.recv()
                if word == "failed":
                    return str(rest[0])
        return None

    async def ends(self, timeout_s: float = 30.0) -> None:
        """Wait until it has ended by itself."""
        await asyncio.to_thread(self._process.join, timeout_s)
        if self._process.is_alive():
            raise ProofError(f"process {self.pid} did not end within {timeout_s} s")


class Crew:
    """Starts children; all of them are killed when its block ends."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def start(self, script: Script, *arguments: Any, **names: Any) -> Child:
        self._children.append(Child(script, *arguments, **names))
        return self._children[-1]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # a child that failed is often why something else did not come
            for child in self._children:
                if (failure := child.failure()) is not None:
                    print(f"process {child.pid} failed:\n{failure}", file=sys.stderr)
        for child in self._children:
            child.kill()


def one_way() -> tuple[Connection, Connection]:
    """A pipe for refs, (read end, write end): both may be given to `Crew.start`."""
    return _CONTEXT.Pipe(duplex=False)


def shared_numbers(count: int) -> Any:
    """Numbers that two processes see, also after one of them died; given to `Crew.start`."""
    return _CONTEXT.Array("q", count, lock=False)


class Post:
    """Sends messages from a thread: a full pipe must not hold the owner's loop."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[tuple[bytes, list[Connection]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, message: bytes, outboxes: Iterable[Connection]) -> None:
        self._messages.put((message, list(outboxes)))

    def _run(self) -> None:
        while True:
            message, outboxes = self._messages.get()
            for outbox in outboxes:
                with contextlib.suppress(OSError):  # its reader died: seen, and told, elsewhere
                    outbox.send_bytes(message)


async def receive(inbox: Connection) -> bytes:
    """Wait in the loop for the next message of a `Post`."""
    if not inbox.poll():
        await anyio.wait_readable(inbox)
    return inbox.recv_bytes()


async def until(what: str, holds: Callable[[], object], timeout_s: float = 30.0) -> float:
    """Let the loop run until something holds; return the seconds it took."""
    began_s = time.monotonic()
    try:
        await processes.until(holds, timeout_s, what=what)
    except processes.NotSo as error:
        raise ProofError(str(error)) from None
    return time.monotonic() - began_s
