"""The data plane over NIXL: one agent in one thread of its own, spoken to through a queue.

The agent's library is not thread-safe, its calls may block (the first to a peer by some tenths of a
second), and a process that ends with an agent in it can crash: so all of its calls are made in this
thread, and it is taken down, transfers first, before the thread ends.
"""

import asyncio
import atexit
import contextlib
import ctypes
import importlib
import logging
import queue
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import torch

from featcache.errors import BackendUnavailable, CacheClosed
from featcache.reach.gpu import NO_UCX, PlaneGpu
from featcache.reach.nixl_agent import make_agent
from featcache.reach.plane import HOST, Memory, Piece

T = TypeVar("T")
_MODULES: Final = ("nixl_cu12._api", "nixl_cu13._api", "nixl._api")
_MISSING: Final = "other hosts need the extra: pip install 'featcache[reach]'"
_PAUSE_S: Final = 50e-6
_PAUSE_PART: Final = 1 / 8
"""Of a transfer's age: the pause between two looks, from `_PAUSE_S` to `_OFTEN_S`. Looking without any would
take the core, and the interpreter's lock, from what the transfer waits for. A look also makes progress: UCX
does not always wake its own thread for what comes after a transfer was begun in another."""
_RARELY_S: Final = 20e-3
"""Between looks at transfers that nobody waits for, and at notifications that nobody expects."""
_OFTEN_S: Final = 1e-3
_CLOSE_S: Final = 5.0


def _api() -> Any:
    cuda = f"nixl_cu{(torch.version.cuda or '').partition('.')[0]}."
    for name in sorted(_MODULES, key=lambda each: not each.startswith(cuda)):
        with contextlib.suppress(ImportError):
            api = importlib.import_module(name)
            # It tells of each agent on stdout, which is the program's own.
            getattr(api, "logger", logging.getLogger("nixl")).setLevel(logging.WARNING)
            return api
    raise BackendUnavailable(_MISSING)


class NixlTransfer:
    """A read on its way. Its fields are the plane's thread's."""

    def __init__(self, ended: "asyncio.Future[None]") -> None:
        self.ended = ended
        self.since_s = self.look_s = 0.0
        self.handle: Any = None
        self.abandoned = False

    def abandon(self) -> None:
        """Look at it rarely from now on."""
        self.abandoned = True


class NixlPlane:
    """The `plane.DataPlane` over NIXL."""

    def __init__(
        self,
        api: Any,
        name: str,
        loop: asyncio.AbstractEventLoop,
        memory: Memory = HOST,
        gpu: PlaneGpu | None = None,
    ) -> None:
        self.on_notification: Callable[[bytes], object] = lambda _: None
        self._api = api
        self._name = name
        self._loop = loop
        self._memory = memory
        self._gpu = gpu
        """Of the slab, if it is on one."""
        # No SimpleQueue: its `get` may wait without end when a short timeout is over as it is woken.
        self._commands: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._agent: Any = None
        self._registered: dict[int, Any] = {}
        self._transfers: set[NixlTransfer] = set()
        self._expects = False
        self._closed = False
        self._over: asyncio.Future[None] = loop.create_future()
        _living.add(self)
        self._thread = threading.Thread(target=self._run, name="featcache-nixl", daemon=True)
        self._thread.start()

    @classmethod
    def make(
        cls,
        name: str,
        loop: asyncio.AbstractEventLoop,
        memory: Memory = HOST,
        *,
        by_segments: bool = False,
    ) -> "NixlPlane":
        """Return a plane whose agent is made as its thread begins, or raise BackendUnavailable."""
        gpu = None
        if memory.kind == "VRAM":
            gpu = PlaneGpu(memory.device, by_segments=by_segments)
        api = _api()
        try:
            return cls(api, name, loop, memory, gpu)
        except RuntimeError as error:
            raise BackendUnavailable(f"no thread can be started for NIXL: {error}") from error

    # --- in the loop ----------------------------------------------------------------------------------

    def register(self, address: int, nbytes: int) -> Awaitable[None]:
        return self._do(lambda: self._register(address, nbytes))

    def deregister(self, address: int) -> Awaitable[None]:
        return self._do(lambda: self._deregister(address))

    def metadata(self) -> Awaitable[bytes]:
        return self._do(lambda: bytes(self._agent.get_agent_metadata()))

    def add_peer(self, metadata: bytes) -> Awaitable[str]:
        return self._do(lambda: _text(self._agent.add_remote_agent(metadata)))

    def read(self, peer: str, pieces: Sequence[Piece], there: Memory = HOST) -> NixlTransfer:
        transfer = NixlTransfer(self._loop.create_future())
        if self._closed:
            transfer.ended.set_exception(CacheClosed("the cache was closed"))
        else:
            self._commands.put(lambda: self._begin(transfer, peer, pieces, there))
        return transfer

    def notify(self, peer: str, payload: bytes) -> None:
        def send() -> None:
            with contextlib.suppress(Exception):  # one that is lost is told over TCP
                self._agent.send_notif(peer, payload)

        self._commands.put(send)

    def expect(self, *, notifications: bool) -> None:
        begins = notifications and not self._expects
        self._expects = notifications
        if begins:
            self._commands.put(lambda: None)  # it may wait without end

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._commands.put(None)
        # The agent's end waits for nothing that a peer does; should it all the same, it keeps the process
        # from ending no longer than this, and its thread is a daemon.
        await asyncio.wait([self._over], timeout=_CLOSE_S)

    def forget(self) -> None:
        # Never destroyed in this process: it would end transfers, and connections, of its parent's.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._agent))
        self._closed = True
        _living.discard(self)

    def end(self) -> None:
        """Take the agent down at the process's end, if nobody closed it."""
        self._closed = True
        self._commands.put(None)
        self._thread.join(_CLOSE_S)

    def _do(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(CacheClosed("the cache was closed"))
            return future

        def call() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - told to the caller
                self._tell(_set_error, future, _of_nixl(error))
            else:
                self._tell(_set_result, future, result)

        self._commands.put(call)
        return future

    # --- in the thread --------------------------------------------------------------------------------

    def _tell(self, call: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(call, *args)

    def _run(self) -> None:
        why: Exception | None = None
        try:
            if self._gpu is not None:
                self._gpu.enter()
            ucx = None if self._gpu is None else self._gpu.ucx
            self._agent = make_agent(self._api, self._name, ucx)
            if self._gpu is not None:
                self._gpu.check()
        except Exception as error:  # noqa: BLE001 - each call fails with it
            why, self._agent = error, None
        notified_s = 0.0
        while True:
            try:
                command = self._commands.get(timeout=self._wait_s(time.monotonic()))
            except queue.Empty:
                pass
            else:
                if command is None:
                    break
                if why is not None:
                    self._agent = _Broken(why)
                command()
            now_s = time.monotonic()
            self._look(now_s)
            due = self._expects and now_s - notified_s >= _OFTEN_S
            if due and self._agent is not None and why is None:
                notified_s = now_s
                self._take_notifications()
        self._end()

    def _wait_s(self, now_s: float) -> float | None:
        """Return how long to wait for a command; None while there is nothing else to do."""
        waits_s = [max(each.look_s - now_s, 0.0) for each in self._transfers]
        if self._expects:
            waits_s.append(_OFTEN_S)
        return min(waits_s, default=None)

    def _register(self, address: int, nbytes: int) -> None:
        kind, device = self._memory
        try:
            registered = self._agent.register_memory([(address, nbytes, device, "")], mem_type=kind)
        except Exception as error:
            if self._gpu is None or isinstance(error, BackendUnavailable):
                raise
            raise BackendUnavailable(f"{_of_nixl(error)}: it may be that {NO_UCX}") from error
        self._registered[address] = registered

    def _deregister(self, address: int) -> None:
        registered = self._registered.pop(address, None)
        if registered is not None:
            self._agent.deregister_memory(registered)

    def _begin(
        self, transfer: NixlTransfer, peer: str, pieces: Sequence[Piece], there: Memory
    ) -> None:
        agent, (kind, device) = self._agent, self._memory
        try:
            ours = agent.get_xfer_descs([(p.here, p.nbytes, device) for p in pieces], mem_type=kind)
            theirs = agent.get_xfer_descs(
                [(p.there, p.nbytes, there.device) for p in pieces], mem_type=there.kind
            )
            transfer.handle = agent.initialize_xfer("READ", ours, theirs, peer)
            transfer.since_s = time.monotonic()
            self._transfers.add(transfer)
            state = agent.transfer(transfer.handle)
            transfer.look_s = transfer.since_s + _PAUSE_S
        except Exception as error:  # noqa: BLE001 - told to the caller
            self._finish(transfer, _of_nixl(error))
            return
        self._take_state(transfer, state)

    def _look(self, now_s: float) -> None:
        for transfer in list(self._transfers):
            if now_s < transfer.look_s:
                continue
            age_s = now_s - transfer.since_s
            pause_s = min(max(age_s * _PAUSE_PART, _PAUSE_S), _OFTEN_S)
            transfer.look_s = now_s + (_RARELY_S if transfer.abandoned else pause_s)
            try:
                state = self._agent.check_xfer_state(transfer.handle)
            except Exception as error:  # noqa: BLE001 - told to the caller
                self._finish(transfer, _of_nixl(error))
            else:
                self._take_state(transfer, state)

    def _take_state(self, transfer: NixlTransfer, state: str) -> None:
        if state == "DONE":
            self._finish(transfer, self._seen())
        elif state == "ERR":
            self._finish(transfer, BackendUnavailable("the data plane's read failed"))

    def _seen(self) -> Exception | None:
        """Make a read that is done visible to the GPU's kernels, before anyone is told of it."""
        try:
            if self._gpu is not None:
                self._gpu.landed()
        except Exception as error:  # noqa: BLE001 - told to the caller
            return error
        return None

    def _finish(self, transfer: NixlTransfer, error: Exception | None) -> None:
        self._transfers.discard(transfer)
        if transfer.handle is not None:
            # Only now: releasing the handle of one in progress does not keep it from writing.
            with contextlib.suppress(Exception):
                self._agent.release_xfer_handle(transfer.handle)
            transfer.handle = None
        if error is None:
            self._tell(_set_result, transfer.ended, None)
        else:
            self._tell(_set_error, transfer.ended, error)

    def _take_notifications(self) -> None:
        try:
            told = self._agent.get_new_notifs()
        except Exception:  # noqa: BLE001 - what is lost so is told over TCP
            return
        for payloads in told.values():
            for payload in payloads:
                self._tell(self._notified, bytes(payload))

    def _notified(self, payload: bytes) -> None:
        self.on_notification(payload)

    def _end(self) -> None:
        """Take the agent down. Its worker goes with it, and so whatever still wrote into the slab."""
        agent, self._agent = self._agent, None
        if agent is not None and not isinstance(agent, _Broken):
            for registered in self._registered.values():
                with contextlib.suppress(Exception):
                    agent.deregister_memory(registered)
        self._registered.clear()
        closed = CacheClosed("the cache was closed")
        for transfer in self._transfers:
            if transfer.handle is not None and agent is not None:
                with contextlib.suppress(Exception):
                    agent.release_xfer_handle(transfer.handle)
                transfer.handle = None
        del agent
        for transfer in self._transfers:
            self._tell(_set_error, transfer.ended, closed)
        self._transfers.clear()
        while True:  # commands that came too late
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                break
            if command is not None:
                self._agent = _Broken(closed)
                command()
        self._agent = None
        _living.discard(self)
        self._tell(_set_result, self._over, None)


_living: "weakref.WeakSet[NixlPlane]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Take down the agents of owners that nobody closed: left to the interpreter's end they can crash it."""
    for plane in list(_living):
        plane.end()


class _Broken:
    """Stands in for an agent that there is not: each of its calls raises why."""

    def __init__(self, why: Exception) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        """Raise it."""
        raise self._why


def _of_nixl(error: Exception) -> Exception:
    if isinstance(error, BackendUnavailable | CacheClosed):
        return error
    return BackendUnavailable(f"NIXL: {type(error).__name__}: {error}")


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _set_result(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_error(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # retrieved: nobody may wait for it any more
