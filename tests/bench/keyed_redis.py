"""Redis over its Unix socket, as the benchmark of keys uses it.

The server keeps nothing on disk. `BareRedis` is the least that a client can do: it knows how long each
answer is, and receives it with one system call, into memory that is warm. `RedisPy` is redis-py's
asyncio client (with hiredis, where that is installed), which is what a server would use.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Self

import torch

Keys = list[tuple[int, int, str]]
"""(size, number, key)"""


class NoRedis(Exception):
    """Why it can't be compared with here."""


class Served(NamedTuple):
    """A server that runs."""

    path: str
    pid: int

    def cpu_s(self) -> float:
        """The CPU time of all its threads."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextlib.contextmanager
def serve(program: str | None, folder: Path) -> Iterator[Served]:
    """Run a server for the length of a block."""
    program = shutil.which(program or "redis-server")
    if program is None:
        raise NoRedis("there is no redis-server (a package of most systems), nor was one named")
    path = folder / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(path), "--dir", str(folder)]
    command += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        give_up_s = time.monotonic() + 10
        while not path.exists():
            if server.poll() is not None or time.monotonic() > give_up_s:
                raise NoRedis(f"redis-server did not begin to listen (exit {server.poll()})")
            time.sleep(0.01)
        yield Served(str(path), server.pid)
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


@contextlib.contextmanager
def maybe(device: str, program: str | None, folder: Path) -> Iterator[Served | str]:
    """As `serve`, or say why there is none: a GPU has none beside it, and `program` may be ``"none"``."""
    with contextlib.ExitStack() as stack:
        served: Served | str = "left out"
        if device == "cpu" and program != "none":
            try:
                served = stack.enter_context(serve(program, folder))
            except NoRedis as error:
                served = str(error)
        yield served


def version(program: str | None) -> str | None:
    found = shutil.which(program or "redis-server")
    if found is None:
        return None
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    words = [word[2:] for word in done.stdout.split() if word.startswith("v=")]
    return words[0] if words else None


def request(*words: bytes) -> bytes:
    """One command in Redis's protocol."""
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


def load(path: str, features: Iterable[tuple[str, bytes]]) -> None:
    """Set every key."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        for key, data in features:
            sock.sendall(request(b"SET", key.encode(), data))
            if (answer := sock.recv(16)) != b"+OK\r\n":
                raise NoRedis(f"redis-server answered a SET with {answer!r}")


class BareRedis:
    """A blocking socket."""

    def __init__(self, path: str, keys: Keys, flight: int) -> None:
        self.flight = flight
        self.counts = {size: sum(at == size for at, _, _ in keys) for size, _, _ in keys}
        self.requests = {(size, n): request(b"GET", key.encode()) for size, n, key in keys}
        self.heads = {size: b"$%d\r\n" % size for size in self.counts}
        self.buffers = {
            size: bytearray(len(head) + size + len(b"\r\n")) for size, head in self.heads.items()
        }
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def _receive(self, size: int) -> None:
        buffer = self.buffers[size]
        if self.sock.recv_into(buffer, len(buffer), socket.MSG_WAITALL) != len(buffer):
            raise ConnectionError("redis-server is gone")
        if not buffer.startswith(self.heads[size]):
            raise RuntimeError(f"redis-server answered a GET with {bytes(buffer[:16])!r}")

    async def once(self, size: int, number: int) -> torch.Tensor | None:
        self.sock.sendall(self.requests[size, number])
        self._receive(size)
        offset = len(self.heads[size])
        return torch.frombuffer(self.buffers[size], dtype=torch.uint8, count=size, offset=offset)

    async def many(self, size: int, seconds: float) -> tuple[int, float]:
        batches = self._batches(size)
        count, began = 0, perf_counter()
        while perf_counter() < began + seconds:
            self.sock.sendall(batches[count // self.flight % len(batches)])
            for _ in range(self.flight):
                self._receive(size)
            count += self.flight
        return count, perf_counter() - began

    def _batches(self, size: int) -> list[bytes]:
        """Keys of one call: all in turn, until they begin where the first batch did."""
        keys = self.counts[size]
        return [
            b"".join(self.requests[size, (first + n) % keys] for n in range(self.flight))
            for first in range(0, keys * self.flight, self.flight)
        ]


class RedisPy:
    """redis-py, in the client's event loop."""

    def __init__(self, path: str, keys: Keys, flight: int) -> None:
        self.flight = flight
        self.keys: dict[int, list[str]] = {}
        for size, _, key in keys:
            self.keys.setdefault(size, []).append(key)
        self.redis: Any = importlib.import_module("redis.asyncio").Redis(unix_socket_path=path)
        # torch says that a bytes object can't be written to: nobody does.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")

    @staticmethod
    def exists() -> bool:
        return find_spec("redis") is not None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.redis.aclose()

    async def once(self, size: int, number: int) -> torch.Tensor | None:
        return torch.frombuffer(await self.redis.get(self.keys[size][number]), dtype=torch.uint8)

    async def many(self, size: int, seconds: float) -> tuple[int, float]:
        keys = self.keys[size]
        count, began = 0, perf_counter()
        while perf_counter() < began + seconds:
            pipe = self.redis.pipeline(transaction=False)
            for at in range(count, count + self.flight):
                pipe.get(keys[at % len(keys)])
            for data in await pipe.execute():
                torch.frombuffer(data, dtype=torch.uint8)
            count += self.flight
        return count, perf_counter() - began
