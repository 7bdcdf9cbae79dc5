"""A reader in namespaces of its own, as in another container, that shares only the socket's directory.

    PYTHONPATH=src python tests/bench/cuda_containers.py --out containers.json

The reader runs under `unshare` in PID, IPC, network, UTS and mount namespaces of its own, with a /proc
and a /dev/shm of its own. It attaches and gets (bytes checked), then borrows and is killed in the
middle of it: what it held and what its name still owed must come back. Needs root or user namespaces.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import proofs
from bench.crew import PATIENCE_S, ProofError, quiet, until
from bench.patterns import Patterns
from bench.proofs import MIB, Proof

FEATURE_BYTES = 3 * MIB + 7
NAME = "far"
NAMESPACES = ("pid", "ipc", "net", "uts", "mnt")


def namespaces() -> list[str]:
    return [str(Path(f"/proc/self/ns/{name}").readlink()) for name in NAMESPACES]


# --- inside ---------------------------------------------------------------------------------------


def say(*words: object) -> None:
    print(*words, flush=True)


async def inside(endpoint: str, device: str) -> None:
    """Do as the lines of stdin say: ``get n ref`` or ``borrow n ref``; a borrow never ends."""
    say("namespaces", *namespaces(), "pid", os.getpid())
    patterns = Patterns(device, FEATURE_BYTES)
    async with featcache.connect(endpoint, device=device, name=NAME) as client:
        say("attached")
        while line := await asyncio.to_thread(sys.stdin.readline):
            command, number, data = line.split()
            ref = featcache.FeatureRef.from_bytes(bytes.fromhex(data))
            if command == "get":
                patterns.check(int(number), await client.get(ref, timeout=20))
                say("got", patterns.wrong_bytes())
                continue
            async with client.borrow(ref, timeout=20) as view:
                patterns.check(int(number), view)
                say("holding", patterns.wrong_bytes())
                await asyncio.Event().wait()


# --- outside --------------------------------------------------------------------------------------


def command(endpoint: str, device: str) -> list[str]:
    """The reader's command line: namespaces, then a mount that hides /dev/shm, then Python."""
    unshare = shutil.which("unshare")
    if unshare is None:
        raise ProofError("unshare (util-linux) is not there")
    own = ["--user", "--map-root-user"] if os.geteuid() else []
    flags = [
        "--pid",
        "--fork",
        "--kill-child",
        "--ipc",
        "--net",
        "--uts",
        "--mount",
        "--mount-proc",
    ]
    script = 'mount -t tmpfs none /dev/shm && exec "$0" "$@"'
    this = [sys.executable, str(Path(__file__).resolve()), "--inside", endpoint, "--device", device]
    return [unshare, *own, *flags, "sh", "-c", script, *this]


class Contained:
    """The process outside that holds the reader inside."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, endpoint: str, device: str) -> Contained:
        pipe = asyncio.subprocess.PIPE
        return cls(
            await asyncio.create_subprocess_exec(
                *command(endpoint, device), stdin=pipe, stdout=pipe, stderr=pipe
            )
        )

    async def hear(self, word: str, timeout_s: float = PATIENCE_S) -> list[str]:
        """Wait for a line that begins with the word; otherwise ProofError with the text of stderr."""
        assert self._process.stdout is not None, "piped"
        line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
        found = line.decode().split()
        if not found or found[0] != word:
            raise ProofError(f"{word!r} was due, not {line!r}: {await self._last_words()}")
        return found[1:]

    async def _last_words(self) -> str:
        self.kill()
        assert self._process.stderr is not None, "piped"
        lines = (await self._process.stderr.read()).decode().strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    async def ask(self, words: str, answer: str) -> list[str]:
        assert self._process.stdin is not None, "piped"
        self._process.stdin.write(f"{words}\n".encode())
        await self._process.stdin.drain()
        return await self.hear(answer)

    def kill(self) -> int:
        """Kill the reader itself with SIGKILL, seen from outside; return its pid here."""
        pid = self._process.pid
        try:
            inner = psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return pid
        for process in inner:
            pid = process.pid
            process.kill()
        return pid

    async def close(self) -> None:
        self.kill()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


@contextlib.contextmanager
def own_endpoint() -> Iterator[str]:
    """An endpoint in a directory with nothing else in it."""
    with tempfile.TemporaryDirectory(prefix="featcache-") as folder:
        yield str(Path(folder) / "pool.sock")


async def scene(proof: Proof, backend: str, device: str) -> None:
    """Read, then die in a borrow; two more features stay owed by the reader's name."""
    label = f"{backend}, reader on {device}"
    patterns = Patterns(proof.options.device, FEATURE_BYTES)
    lost: list[featcache.events.Event] = []

    def note_loss(event: featcache.events.Event) -> None:
        if isinstance(event, featcache.events.ReaderLost):
            lost.append(event)

    featcache.events.add_hook(note_loss)
    contained = None
    with own_endpoint() as endpoint:
        cache = featcache.create(
            device=proof.options.device,
            capacity="64MiB",
            segment="16MiB",
            endpoint=endpoint,
            settings=proofs.settings(backend),
        )
        try:
            async with cache:
                contained = await Contained.start(endpoint, device)
                await _inside_reads(proof, label, cache, contained, patterns)
                await _dies_in_a_borrow(proof, label, cache, contained, lost)
        finally:
            featcache.events.remove_hook(note_loss)
            if contained is not None:
                await contained.close()


async def _inside_reads(
    proof: Proof,
    label: str,
    cache: featcache.FeatureCache,
    contained: Contained,
    patterns: Patterns,
) -> None:
    found = await contained.hear("namespaces")
    apart = [
        name
        for name, inner, outer in zip(NAMESPACES, found, namespaces(), strict=False)
        if inner != outer
    ]
    proof.claim(
        f"{label}: namespaces of its own",
        " ".join(apart),
        "all five",
        len(apart) == len(NAMESPACES),
    )
    proof.details[f"{label}: its pid inside"] = int(found[-1])
    await contained.hear("attached")
    wrong_bytes = 0
    for number, verb, answer in ((1, "get", "got"), (2, "get", "got"), (3, "borrow", "holding")):
        feature = patterns.fill(number, FEATURE_BYTES)
        ref = await cache.put(feature, readers=[NAME], timeout=20)
        wrong_bytes += int(
            (await contained.ask(f"{verb} {number} {ref.to_bytes().hex()}", answer))[0]
        )
    proof.claim(f"{label}: wrong bytes (two gets, one borrow)", wrong_bytes, "0", wrong_bytes == 0)
    for number in (4, 5):  # never read: its name owes them when it dies
        await cache.put(patterns.fill(number, FEATURE_BYTES), readers=[NAME], timeout=20)


async def _dies_in_a_borrow(
    proof: Proof,
    label: str,
    cache: featcache.FeatureCache,
    contained: Contained,
    lost: list[featcache.events.Event],
) -> None:
    await asyncio.sleep(0.2)  # past a recycling interval: what can go without the death has gone
    blocking_read_bytes = cache.statistics().used_bytes
    wanted_bytes = 3 * FEATURE_BYTES
    proof.claim(
        f"{label}: bytes held before the kill",
        blocking_read_bytes,
        f">= {wanted_bytes}",
        blocking_read_bytes >= wanted_bytes,
    )
    killed_s = time.monotonic()
    contained.kill()
    try:
        await until("everything came back", lambda: lost and not cache.statistics().used_bytes, 10)
    except ProofError as error:
        proof.details[f"{label}: after the kill"] = str(error)
    took_ms = round(1e3 * (time.monotonic() - killed_s), 1)
    left_bytes = cache.statistics().used_bytes
    proof.claim(f"{label}: used bytes after the kill", left_bytes, "0", left_bytes == 0)
    reads = [getattr(event, "reads_paid", None) for event in lost]
    proof.claim(f"{label}: reader.lost, reads paid for it", reads, "[3]", reads == [3])
    proof.note(f"{label}: ms from kill to empty", took_ms)


async def body(proof: Proof) -> None:
    chosen = proof.options
    count = torch.cuda.device_count()
    devices = list(dict.fromkeys([chosen.device, *([f"cuda:{count - 1}"] if count else [])]))
    if not proofs.is_cuda(chosen.device):
        devices = [chosen.device]
    for backend in proofs.backends(chosen):
        for device in devices:
            try:
                await scene(proof, backend, device)
            except Exception as error:  # noqa: BLE001 - whatever a backend says
                # One backend that is refused says so, and the others are still looked at.
                text = f"{type(error).__name__}: {error}"
                proof.details[f"{backend}, reader on {device}: error"] = text
                proof.claim(f"{backend}, reader on {device}: works", text[:300], "no error", False)
    if count == 1:
        proof.not_run("a contained reader on another GPU", "needs two GPUs")


def parse() -> argparse.Namespace:
    parser = proofs.options(__doc__, limit_s=300)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    chosen: Any = parse()
    if chosen.inside is not None:
        quiet()
        asyncio.run(inside(chosen.inside, chosen.device))
        return 0
    return proofs.run(body, chosen)


if __name__ == "__main__":
    sys.exit(main())
