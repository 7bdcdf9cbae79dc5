"""Processes for tests: started in milliseconds, told what to do over a pipe, killed at named steps.

Importing torch takes seconds, so children are forked from a server that has imported it once and
holds no cache (multiprocessing's forkserver). A child runs one coroutine of a test module with a
`Pipe`; the test holds the other end in a `Child`. Each child ends when the test's end is gone, so
that not even a killed test run leaves any behind.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import anyio
import pytest

PATIENCE_S = 20.0
"""How long a test waits for what must come. Only a failing test waits so long."""
_PRELOAD = ["pytest", "torch", "structlog", "featcache"]  # pytest: children import the main module


class NotSo(AssertionError):
    """What was waited for did not come."""


async def until(
    holds: Callable[[], object], timeout_s: float = PATIENCE_S, *, what: str | None = None
) -> None:
    """Let the loop run until something holds: for states that come by events of the loop."""
    give_up_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > give_up_s:
            raise NotSo(f"not so within {timeout_s} s: {what or holds}")
        await asyncio.sleep(0.002)


def gone(pid: int, timeout_s: float = PATIENCE_S) -> None:
    """Wait, without the loop, until a process is dead (a zombie is)."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(timeout_s * 1000), f"process {pid} did not die within {timeout_s} s"
    finally:
        os.close(pidfd)


class Pipe:
    """A child's end."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def say(self, *message: Any) -> None:
        """Tell the test something."""
        self._connection.send(message)

    async def hear(self) -> Any:
        """Wait in the loop for what the test says."""
        await anyio.wait_readable(self._connection)
        return self._receive()

    def stand(self, step: str) -> Any:
        """Say that a named step is reached and stand still there, loop and all, until told to go on."""
        self.say("at", step)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError):
            os._exit(0)  # the test is gone


Script = Callable[..., Awaitable[None]]


def _main(script: Script, connection: Connection, given: Any) -> None:
    import structlog
    import torch

    torch.set_num_threads(1)
    structlog.configure(processors=[structlog.testing.LogCapture()])
    pipe = Pipe(connection)
    arguments, names = given
    try:
        asyncio.run(script(pipe, *arguments, **names))  # type: ignore[arg-type]  # any coroutine
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.say("failed", traceback.format_exc())
        raise


_FOUND_BY = ("_forkserver_address", "_forkserver_authkey")
"""Where a server listens, and what it is opened with since Python 3.14."""


class Forked(ForkServerProcess):
    """A process that the server forked, with the environment that there is at its start.

    Processes that it starts itself are forked by the same server.
    """

    _environment: dict[str, str]
    _server: dict[str, Any]

    def start(self) -> None:
        """Start it."""
        server = forkserver._forkserver
        server.ensure_running()
        self._environment = dict(os.environ)
        self._server = {name: getattr(server, name, None) for name in _FOUND_BY}
        super().start()

    def run(self) -> None:
        """Do what it is for, in the process."""
        os.environ.clear()  # that of the server is older
        os.environ.update(self._environment)
        vars(forkserver._forkserver).update(self._server, ensure_running=lambda: None)
        gc.freeze()  # what the server imported is looked through no more
        super().run()


def preload(module: str) -> None:
    """Have the server import one more module before it starts."""
    _PRELOAD.append(module)


class Server(ForkServerContext):
    """The context of the server; it starts at the first use, `warm_up` does one."""

    Process = Forked

    def __init__(self) -> None:
        super().__init__()
        self.set_forkserver_preload(_PRELOAD)


class Child:
    """A process that runs a script, as the test holds it."""

    def __init__(self, process: Forked, connection: Connection) -> None:
        self._process = process
        self._connection = connection
        assert process.pid is not None, "started"
        self.pid = process.pid

    def tell(self, *message: Any) -> None:
        """Send the child a message."""
        self._connection.send(message)

    async def hear(self, timeout_s: float = PATIENCE_S) -> Any:
        """Wait in the loop for the child's next message."""
        with anyio.fail_after(timeout_s):
            await anyio.wait_readable(self._connection)
        return self._receive()

    def hear_now(self, timeout_s: float = PATIENCE_S) -> Any:
        """Wait for the child's next message while the loop of this process stands still."""
        assert self._connection.poll(timeout_s), "the child said nothing in time"
        return self._receive()

    def said(self) -> bool:
        """Whether there is something to hear, or the child is gone."""
        return self._connection.poll(0)

    def _receive(self) -> Any:
        message = self._connection.recv()
        assert message[0] != "failed", f"the child failed:\n{message[1]}"
        return message

    async def expect(self, *message: Any) -> None:
        """Wait for a message, which must be this one."""
        assert await self.hear() == message

    async def ask(self, *message: Any) -> Any:
        """Tell and hear the answer."""
        self.tell(*message)
        return await self.hear()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal. A process that is stopped is so when this returns."""
        os.kill(self.pid, number)
        if number is signal.SIGSTOP:
            self._until_state("T")

    def _until_state(self, wanted: str) -> None:
        give_up_s = time.monotonic() + PATIENCE_S
        while True:
            with open(f"/proc/{self.pid}/stat") as file:  # noqa: PTH123 - shorter
                state = file.read().rpartition(") ")[2][0]
            if state == wanted:
                return
            assert time.monotonic() < give_up_s, f"state {state}, not {wanted}"
            time.sleep(0.001)  # the kernel tells only the parent, which is the server

    def kill(self) -> None:
        """Kill with SIGKILL; dead when this returns. The loop of this process has not run."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        gone(self.pid)

    async def ends(self) -> int | None:
        """Wait in the loop until the process has ended by itself; return its exit code."""
        with anyio.fail_after(PATIENCE_S), contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
            try:
                await anyio.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        self._process.join(PATIENCE_S)
        return self._process.exitcode

    def close(self) -> None:
        """Kill it if it lives, and leave nothing of it here. Idempotent."""
        if self._connection.closed:
            return
        self.kill()
        self._connection.close()
        self._process.join(PATIENCE_S)
        self._process.close()


Start = Callable[..., Child]


def warm_up(patience_s: float = 2 * PATIENCE_S) -> None:
    """Start the server, whose descriptors this process then keeps to its end."""
    process = Server().Process(target=int)
    process.start()
    process.join(patience_s)
    process.close()


@contextlib.contextmanager
def starting() -> Iterator[Start]:
    """Give a function that starts a script in a process of its own; all are killed at the end."""
    children: list[Child] = []

    def start(script: Script, *arguments: Any, **names: Any) -> Child:
        here, there = multiprocessing.Pipe()
        process = Server().Process(
            target=_main, args=(script, there, (arguments, names)), daemon=True
        )
        process.start()
        there.close()
        children.append(Child(process, here))
        return children[-1]

    try:
        yield start
    finally:
        for child in children:
            child.close()


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """Refuse to start threads of featcache's, as the system does at RLIMIT_NPROC or RLIMIT_AS."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("featcache"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield
