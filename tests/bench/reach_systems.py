"""The systems that `reach.py` has take turns: for each a home and a reader, in processes of their own."""

import asyncio
import contextlib
import ctypes
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

import featcache
from featcache.errors import BackendUnavailable
from featcache.reach import nixl_agent, nixl_plane
from featcache.reach.handshake import Conversation, Role
from featcache.reach.stream import Stream

KIB, MIB = 1 << 10, 1 << 20
SLAB_BYTES: Final = 512 * MIB
KEY: Final = "a key for the benchmark alone"
ECHO_BYTES: Final = 100
PAUSE_S: Final = 50e-6


class Turn(NamedTuple):
    """Reads of one size, so many at a time."""

    nbytes: int
    reads: int
    window: int


class System(NamedTuple):
    """What runs on either host. `reader` returns what takes a turn."""

    home: Callable[[Connection, str], None]
    reader: Callable[[Connection, Connection], None]


def api() -> Any:
    try:
        return nixl_plane._api()
    except BackendUnavailable as error:
        raise SystemExit(str(error)) from None


def enter(network: str) -> None:
    """Move this process into a network namespace, and /sys with it: UCX looks there for its devices."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), name)

    new_mounts, detached, slave = 0x20000, 2, (1 << 19) | (1 << 14)
    with Path(f"/run/netns/{network}").open() as file:
        call("setns", file.fileno(), 0)
    call("unshare", new_mounts)
    call("mount", b"", b"/", None, ctypes.c_ulong(slave), None)
    libc.umount2(b"/sys", detached)
    call("mount", network.encode(), b"/sys", b"sysfs", ctypes.c_ulong(0), None)


def run(end: Any, network: str | None, pipe: Connection, host: str, turns: Any) -> None:
    """Run one end, in a network namespace if one is named."""
    if network is not None:
        enter(network)
    torch.set_num_threads(1)
    end(pipe, host if turns is None else turns)
    os._exit(0)  # an agent that is left to the interpreter's end can crash it


def serve(turns: Connection, kinds: dict[str, Callable[[Turn], list[float]]]) -> None:
    """Take turns: each kind of read in each."""
    turns.send("ready")
    while True:
        turn = turns.recv()
        turns.send({name: take(turn) for name, take in kinds.items()})


# --- plain TCP ---------------------------------------------------------------------------------------


def tcp_home(pipe: Connection, host: str) -> None:
    listener = socket.create_server((host, 0))
    pipe.send(listener.getsockname()[:2])
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE))
    while asked := sock.recv(8, socket.MSG_WAITALL):
        sock.sendall(memory[: int.from_bytes(asked, "little")])


def tcp_reader(pipe: Connection, turns: Connection) -> None:
    sock = socket.create_connection(pipe.recv())
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(mmap.mmap(-1, SLAB_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE))

    def take(turn: Turn) -> list[float]:
        times, asked, began_s = list[float](), 0, time.perf_counter()
        for number in range(turn.reads):
            since_s = time.perf_counter()
            while asked < min(turn.reads, number + turn.window):
                sock.sendall(turn.nbytes.to_bytes(8, "little"))
                asked += 1
            at = (number * turn.nbytes) % SLAB_BYTES
            sock.recv_into(memory[at : at + turn.nbytes], turn.nbytes, socket.MSG_WAITALL)
            times.append(time.perf_counter() - since_s)
        return times if turn.window == 1 else [time.perf_counter() - began_s]

    serve(turns, {"tcp": take})


# --- raw NIXL ----------------------------------------------------------------------------------------


def memory_of(agent: Any) -> tuple[mmap.mmap, int]:
    """Return memory as large as a slab, registered, its pages there."""
    memory = mmap.mmap(-1, SLAB_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    agent.register_memory([(address, SLAB_BYTES, 0, "")], mem_type="DRAM")
    return memory, address


def nixl_home(pipe: Connection, _: str) -> None:
    agent = nixl_agent.make_agent(api(), "bench-home")
    memory, address = memory_of(agent)
    pipe.send((agent.get_agent_metadata(), address))
    threading.Event().wait()
    del memory


def nixl_reader(pipe: Connection, turns: Connection) -> None:
    agent = nixl_agent.make_agent(api(), "bench-reader")
    metadata, there = pipe.recv()
    peer = agent.add_remote_agent(metadata)
    memory, here = memory_of(agent)

    def begin(at: int, nbytes: int) -> Any:
        ours = agent.get_xfer_descs([(here + at, nbytes, 0)], mem_type="DRAM")
        theirs = agent.get_xfer_descs([(there + at, nbytes, 0)], mem_type="DRAM")
        handle = agent.initialize_xfer("READ", ours, theirs, peer)
        agent.transfer(handle)
        return handle

    def finish(handle: Any, pause_s: float) -> None:
        while (state := agent.check_xfer_state(handle)) != "DONE":
            assert state != "ERR"
            if pause_s:
                time.sleep(pause_s)
        agent.release_xfer_handle(handle)

    def taker(pause_s: float, *, copies: bool) -> Callable[[Turn], list[float]]:
        def take(turn: Turn) -> list[float]:
            times, handles, began_s = list[float](), list[Any](), time.perf_counter()
            begun = 0
            for number in range(turn.reads):
                since_s = time.perf_counter()
                while begun < min(turn.reads, number + turn.window):
                    handles.append(begin((begun * turn.nbytes) % SLAB_BYTES, turn.nbytes))
                    begun += 1
                finish(handles.pop(0), pause_s)
                if copies:
                    at = (number * turn.nbytes) % SLAB_BYTES
                    view = torch.frombuffer(memory, dtype=torch.uint8, count=turn.nbytes, offset=at)
                    view.clone()
                times.append(time.perf_counter() - since_s)
            return times if turn.window == 1 else [time.perf_counter() - began_s]

        return take

    serve(
        turns,
        {
            "nixl": taker(0, copies=False),
            "nixl, pausing": taker(PAUSE_S, copies=False),
            "nixl+copy": taker(0, copies=True),
            "nixl+copy, pausing": taker(PAUSE_S, copies=True),
        },
    )


# --- featcache ---------------------------------------------------------------------------------------


def settings() -> featcache.Settings:
    size = f"{SLAB_BYTES >> 20}MiB"
    return featcache.Settings(capacity=size, initial=size, peer_timeout=30.0, peer_lease=100.0)


def featcache_home(pipe: Connection, host: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        def echo() -> Stream:
            stream = Stream(Conversation(Role.LISTENER, KEY.encode(), b"h" * 16), 30.0)
            stream.on_message = stream.send
            return stream

        echoes = await loop.create_server(echo, host, 0)
        async with featcache.create(
            settings=settings(), listen=f"{host}:0", cluster_key=KEY
        ) as home:
            pipe.send(echoes.sockets[0].getsockname()[:2])
            while True:
                turn = await loop.run_in_executor(None, pipe.recv)
                feature = torch.zeros(turn.nbytes, dtype=torch.uint8)
                refs = [(await home.put(feature)).to_bytes() for _ in range(turn.reads)]
                pipe.send(refs)

    asyncio.run(main())


async def echoes(where: Sequence[Any]) -> Callable[[Turn], Any]:
    """Return what times echoes of a sealed frame, as those of the control connection are."""
    loop = asyncio.get_running_loop()
    stream = Stream(Conversation(Role.DIALER, KEY.encode(), b"d" * 16), 30.0)
    opened: asyncio.Future[None] = loop.create_future()
    stream.on_open = lambda: opened.set_result(None)
    await loop.create_connection(lambda: stream, *where)
    await opened
    payload = bytes(ECHO_BYTES)

    async def take(turn: Turn) -> list[float]:
        times = list[float]()
        for _ in range(turn.reads):
            back: asyncio.Future[bytes] = loop.create_future()
            stream.on_message = back.set_result
            since_s = time.perf_counter()
            stream.send(payload)
            await back
            times.append(time.perf_counter() - since_s)
        return times

    return take


def featcache_reader(pipe: Connection, turns: Connection) -> None:
    async def borrow(reader: featcache.FeatureCache, ref: featcache.FeatureRef) -> None:
        async with reader.borrow(ref):
            pass

    async def take(turn: Turn, one: Callable[[featcache.FeatureRef], Any]) -> list[float]:
        pipe.send(turn)
        told = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        refs = iter([featcache.FeatureRef.from_bytes(data) for data in told])
        times, began_s = list[float](), time.perf_counter()

        async def some() -> None:
            for ref in refs:
                since_s = time.perf_counter()
                await one(ref)
                times.append(time.perf_counter() - since_s)

        await asyncio.gather(*(some() for _ in range(turn.window)))
        return times if turn.window == 1 else [time.perf_counter() - began_s]

    async def main() -> None:
        echo = await echoes(pipe.recv())
        loop = asyncio.get_running_loop()
        async with featcache.create(settings=settings(), cluster_key=KEY) as reader:
            turns.send("ready")
            while True:
                turn = await loop.run_in_executor(None, turns.recv)
                told = {
                    "get": await take(turn, reader.get),
                    "borrow": await take(turn, lambda ref: borrow(reader, ref)),
                }
                if turn.window == 1:
                    told["echo"] = await echo(turn)
                turns.send(told)

    with contextlib.suppress(EOFError):
        asyncio.run(main())


SYSTEMS: Final = {
    "tcp": System(tcp_home, tcp_reader),
    "nixl": System(nixl_home, nixl_reader),
    "featcache": System(featcache_home, featcache_reader),
}
