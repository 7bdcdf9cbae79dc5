"""Reads of another host's features, beside raw NIXL reads and the bytes over a plain TCP socket.

Two processes of one host, over UCX's TCP unless ``UCX_TLS`` says otherwise::

    PYTHONPATH=src:tests python tests/bench/reach.py [SIZE_BYTES …]

For each size: the median and the 90th percentile of one read at a time, and throughput. The reader of
featcache is the owner of its host itself, so that the figure has the fetch, the copy that the caller owns
and the payment, and no message of a client besides.
"""

import asyncio
import contextlib
import importlib
import multiprocessing as mp
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

import featcache

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
KEY = "a key for the benchmark alone"


def rounds_of(nbytes: int) -> int:
    return max(12, min(200, (256 * MIB) // nbytes))


def api() -> Any:
    for name in ("nixl_cu12._api", "nixl_cu13._api", "nixl._api"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise SystemExit("NIXL is not installed: pip install 'featcache[reach]'")


# --- the three homes, each in a process of its own ---------------------------------------------------


def featcache_home(pipe: Connection) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        settings = featcache.Settings(capacity="512MiB", initial="512MiB")
        async with featcache.create(
            settings=settings, listen="127.0.0.1:0", cluster_key=KEY
        ) as home:
            pipe.send(home.address)
            while (asked := await loop.run_in_executor(None, pipe.recv)) is not None:
                feature = torch.zeros(asked, dtype=torch.uint8)
                refs = [(await home.put(feature)).to_bytes() for _ in range(rounds_of(asked) // 4)]
                pipe.send(refs)

    asyncio.run(serve())


def nixl_home(pipe: Connection) -> None:
    nixl = api()
    agent = nixl.nixl_agent("bench-home", nixl.nixl_agent_config(backends=["UCX"]))
    memory = torch.zeros(SIZES[-1], dtype=torch.uint8)
    agent.register_memory([(memory.data_ptr(), memory.nbytes, 0, "")], mem_type="DRAM")
    pipe.send((agent.get_agent_metadata(), memory.data_ptr()))
    pipe.recv()
    os._exit(0)


def tcp_home(pipe: Connection) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    sock, _ = listener.accept()
    memory = memoryview(bytearray(SIZES[-1]))
    with contextlib.suppress(OSError):
        while asked := sock.recv(8):
            sock.sendall(memory[: int.from_bytes(asked, "little")])


# --- the three readers -------------------------------------------------------------------------------


def told(what: str, nbytes: int, times: list[float]) -> None:
    times.sort()
    median, late = statistics.median(times), times[int(len(times) * 0.9)]
    rate = nbytes / median / 1e9
    spread = f"{median * 1e6:9.0f} µs  p90 {late * 1e6:9.0f} µs"
    print(f"{what:10} {nbytes >> 10:7} KiB  {spread}  {rate:6.2f} GB/s")


async def read_featcache(pipe: Connection, sizes: tuple[int, ...]) -> None:
    settings = featcache.Settings(capacity="512MiB", initial="512MiB")
    address = pipe.recv()
    assert address
    loop = asyncio.get_running_loop()
    async with featcache.create(settings=settings, cluster_key=KEY) as reader:
        for nbytes in sizes:
            out, times = torch.zeros(nbytes, dtype=torch.uint8), []
            for _ in range(4):
                pipe.send(nbytes)
                for data in await loop.run_in_executor(None, pipe.recv):
                    ref = featcache.FeatureRef.from_bytes(data)
                    since = time.perf_counter()
                    await reader.get(ref, out=out)
                    times.append(time.perf_counter() - since)
            told("featcache", nbytes, times[len(times) // 10 :])
    pipe.send(None)


def read_nixl(pipe: Connection, sizes: tuple[int, ...]) -> None:
    nixl = api()
    agent = nixl.nixl_agent("bench-reader", nixl.nixl_agent_config(backends=["UCX"]))
    metadata, address = pipe.recv()
    peer = agent.add_remote_agent(metadata)
    memory = torch.zeros(SIZES[-1], dtype=torch.uint8)
    agent.register_memory([(memory.data_ptr(), memory.nbytes, 0, "")], mem_type="DRAM")
    for nbytes in sizes:
        times = []
        for _ in range(rounds_of(nbytes)):
            since = time.perf_counter()
            here = agent.get_xfer_descs([(memory.data_ptr(), nbytes, 0)], mem_type="DRAM")
            there = agent.get_xfer_descs([(address, nbytes, 0)], mem_type="DRAM")
            handle = agent.initialize_xfer("READ", here, there, peer)
            state = agent.transfer(handle)
            while state not in ("DONE", "ERR"):
                state = agent.check_xfer_state(handle)
            assert state == "DONE"
            agent.release_xfer_handle(handle)
            times.append(time.perf_counter() - since)
        told("raw NIXL", nbytes, times[len(times) // 10 :])
    pipe.send(None)


def read_tcp(pipe: Connection, sizes: tuple[int, ...]) -> None:
    sock = socket.create_connection(("127.0.0.1", pipe.recv()))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(bytearray(SIZES[-1]))
    for nbytes in sizes:
        times = []
        for _ in range(rounds_of(nbytes)):
            since = time.perf_counter()
            sock.sendall(nbytes.to_bytes(8, "little"))
            got = 0
            while got < nbytes:
                got += sock.recv_into(memory[got:nbytes])
            times.append(time.perf_counter() - since)
        told("plain TCP", nbytes, times[len(times) // 10 :])
    sock.close()


def beside(home: Callable[[Connection], None], read: Callable[[Connection], object]) -> None:
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=home, args=(theirs,))
    process.start()
    try:
        read(ours)
        process.join(10)
    finally:
        process.kill()
        process.join()


def main() -> None:
    os.environ.setdefault("UCX_TLS", "tcp")
    sizes = tuple(int(each) for each in sys.argv[1:]) or SIZES
    print(f"UCX_TLS={os.environ['UCX_TLS']}")
    beside(tcp_home, lambda pipe: read_tcp(pipe, sizes))
    beside(nixl_home, lambda pipe: read_nixl(pipe, sizes))
    beside(featcache_home, lambda pipe: asyncio.run(read_featcache(pipe, sizes)))
    sys.stdout.flush()
    os._exit(0)  # the raw agent, left to the interpreter's end, can crash it


if __name__ == "__main__":
    main()
