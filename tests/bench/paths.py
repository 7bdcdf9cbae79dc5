"""How many of featcache's own Python calls stand on each main path, warm, for features of 64 KiB.

    PYTHONPATH=src python tests/bench/paths.py
    PYTHONPATH=src python tests/bench/paths.py --beside ../older/src --json

Owner and client run in loops of two threads, so a call belongs to the side in whose thread it is made;
the deaths are those of real processes, counted in the process that survives. Counted are calls of Python
functions of the package: not those into C or other packages, nor methods that attrs generated. *Resumes*
are the times that a coroutine or generator of the package goes on after a wait; they are no calls, but
frames all the same. Only what the operation causes is counted: intervals are long, both loops are quiet
when a count begins, and it goes on until they are quiet again.

A figure is the median of the runs. *Files* are the files of the package that were entered, *crossings*
the calls from one file into another, and *rooms* those from one folder into another (a file at the root
counts as a folder); a call from outside the package is a crossing too.

Only public names are used, so the same file counts older trees: `--beside` runs it on one in a process
of its own and prints both.
"""

from __future__ import annotations

import argparse
import asyncio
import dis
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import crew
from bench.report import table

PACKAGE = f"{Path(featcache.__file__).parent}{os.sep}"
RESUME = dis.opmap["RESUME"]
NEVER_S = 3600.0
TICK_S = 0.03
QUIET_S = 0.005
PATIENCE_S = 30.0
FEATURE_BYTES = 64 << 10
WARM = 3
"""Runs before those that count."""
T = TypeVar("T")


# --- counting -------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of a function of the package, beside the package's call that it is made from."""

    code: CodeType
    caller: CodeType | None
    depth: int
    """How many calls of the package it is made inside of."""


class Trace:
    """The package's calls in one thread."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.resumes = 0

    def on(self) -> None:
        """Begin, or go on, in the calling thread."""
        sys.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        at = frame.f_lasti
        if code.co_code[at] == RESUME and code.co_code[at + 1] & 3:  # 0 at a function's start
            self.resumes += 1
            return
        callers = []
        below = frame.f_back
        while below is not None:
            if below.f_code.co_filename.startswith(PACKAGE):
                callers.append(below.f_code)
            below = below.f_back
        self.calls.append(Call(code, callers[0] if callers else None, len(callers)))

    def clear(self) -> None:
        self.calls, self.resumes = [], 0

    async def until(self, holds: Callable[[], bool]) -> None:
        """Trace until something holds, but not the look whether it does."""
        off()
        while not holds():
            self.on()
            await asyncio.sleep(QUIET_S)
            off()
        self.on()

    def parts(self, depth: int) -> list[list[Call]]:
        """The calls at a depth, each with those that are made inside it."""
        found: list[list[Call]] = []
        inside = False
        for call in self.calls:
            if call.depth == depth:
                found.append([])
            inside = call.depth >= depth
            if inside:
                found[-1].append(call)
        return found


def off() -> None:
    """Count no more in the calling thread."""
    sys.setprofile(None)


def file_of(code: CodeType | None) -> str | None:
    return None if code is None else code.co_filename.removeprefix(PACKAGE)


def room_of(code: CodeType | None) -> str | None:
    """The folder in the package, or the file at its root."""
    return None if code is None else code.co_filename.removeprefix(PACKAGE).partition(os.sep)[0]


Counts = dict[str, float]


def counts(calls: list[Call], resumes: int = 0) -> Counts:
    return {
        "calls": len(calls),
        "resumes": resumes,
        "files": len({file_of(call.code) for call in calls}),
        "crossings": sum(file_of(call.code) != file_of(call.caller) for call in calls),
        "rooms": sum(room_of(call.code) != room_of(call.caller) for call in calls),
    }


# --- two sides ------------------------------------------------------------------------------------


class Side:
    """A loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.trace = Trace()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function in the loop."""

        async def work() -> None:
            function()

        self.run(work())

    def counts(self) -> Counts:
        return counts(self.trace.calls, self.trace.resumes)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        self.loop.close()


def settle(*sides: Side) -> None:
    """Wait until no side makes a call for a while."""
    seen = -1
    while seen != (seen := sum(len(side.trace.calls) for side in sides)):
        time.sleep(QUIET_S)
        for side in sides:
            side.run(asyncio.sleep(0))


def count(work: Coroutine[Any, Any, object], at: Side, *others: Side) -> None:
    """Run `work` in the first side's loop and trace all sides until they are quiet."""
    for side in (at, *others):
        side.trace.clear()
        side.call(side.trace.on)
    at.run(work)
    settle(at, *others)
    for side in (at, *others):
        side.call(off)


SETTINGS: dict[str, Any] = {
    "capacity": "64MiB",
    "segment": "64MiB",
    "ttl": None,
    "recycle_interval": NEVER_S,
    "pressure_interval": NEVER_S,
    "log_interval": NEVER_S,
}
FULL = SETTINGS | {"capacity": FEATURE_BYTES, "segment": FEATURE_BYTES}


def feature() -> torch.Tensor:
    return torch.zeros(FEATURE_BYTES, dtype=torch.uint8)


class Pair:
    """An owner and a client in two threads; nothing that runs by itself."""

    def __init__(self, **changes: Any) -> None:
        self._settings = featcache.Settings(**(SETTINGS | changes))
        self._contexts = AsyncExitStack(), AsyncExitStack()
        self.feature = feature()
        self.near, self.far = Side(), Side()

    def __enter__(self) -> Pair:
        settings, (near, far) = self._settings, self._contexts
        self.owner = self.near.run(near.enter_async_context(featcache.create(settings=settings)))
        endpoint = self.owner.endpoint
        client = featcache.connect(endpoint, settings=settings)
        self.client = self.far.run(far.enter_async_context(client))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        near, far = self._contexts
        self.far.run(far.aclose())
        self.near.run(near.aclose())
        self.far.close()
        self.near.close()

    def put(self, key: str | None = None) -> featcache.FeatureRef:
        """Put a feature, which is not counted."""
        return self.near.run(self.owner.put(self.feature, key=key))

    def own(self, work: Coroutine[Any, Any, object]) -> Counts:
        """Count the owner's calls in work of its own."""
        count(work, self.near, self.far)
        return self.near.counts()

    def read(self, work: Coroutine[Any, Any, object]) -> Counts:
        """Count the client's calls in its work."""
        count(work, self.far, self.near)
        return self.far.counts()

    def both(self, path: str, work: Coroutine[Any, Any, object]) -> Found:
        """Count both sides' calls in the client's work."""
        count(work, self.far, self.near)
        return {f"{path}: client": self.far.counts(), f"{path}: owner": self.near.counts()}


# --- the paths ------------------------------------------------------------------------------------

Found = dict[str, Counts]
"""The counts of one run, by the row of the table."""


def put(pair: Pair, _: int) -> Found:
    return {"cache.put(x)": pair.own(pair.owner.put(pair.feature))}


def get(pair: Pair, _: int) -> Found:
    return {"client.get(ref)": pair.read(pair.client.get(pair.put()))}


def get_nowait(pair: Pair, _: int) -> Found:
    async def read(ref: featcache.FeatureRef) -> None:
        pair.client.get_nowait(ref)

    return {"client.get_nowait(ref)": pair.read(read(pair.put()))}


def borrow(pair: Pair, _: int) -> Found:
    async def read(ref: featcache.FeatureRef) -> None:
        async with pair.client.borrow(ref):
            pass

    return {"client.borrow(ref), enter and leave": pair.read(read(pair.put()))}


def get_key(pair: Pair, run: int) -> Found:
    if run == 0:
        pair.put("kept")
    return pair.both("client.get(key), a hit", pair.client.get("kept"))


def own_get_key(pair: Pair, run: int) -> Found:
    if run == 0:
        pair.put("kept")
    return {"cache.get(key), the owner's own hit": pair.own(pair.owner.get("kept"))}


def client_put(pair: Pair, _: int) -> Found:
    return pair.both("client.put(x)", pair.client.put(pair.feature))


def get_or_put(pair: Pair, run: int) -> Found:
    work = pair.client.get_or_put(f"key {run}", lambda: pair.feature)
    return pair.both("client.get_or_put, a miss", work)


def release(pair: Pair, _: int) -> Found:
    return {"client.release(ref)": pair.read(pair.client.release(pair.put()))}


async def _ticks(pair: Pair, ref: featcache.FeatureRef) -> None:
    """Have a ref paid, and trace the owner until it is recycled and some idle ticks have been."""
    asyncio.run_coroutine_threadsafe(pair.client.release(ref), pair.far.loop)
    pair.near.trace.on()
    await asyncio.sleep(8 * TICK_S)  # not by `statistics`, which would look itself
    off()


def recycle(pair: Pair, _: int) -> Found:
    """The look that takes a paid ref back, which is the largest part of a tick of the timer."""
    ref = pair.put()
    pair.near.trace.clear()
    pair.near.run(_ticks(pair, ref))
    ticks = sorted(pair.near.trace.parts(0), key=len)
    return {
        "recycle of that ref": counts(max(pair.near.trace.parts(2), key=len)),
        "a tick that recycles it": counts(ticks[-1]),
        "a tick that finds nothing": counts(ticks[0]),
    }


PATHS: list[Callable[[Pair, int], Found]] = [
    *(put, get, get_nowait, borrow, get_key, own_get_key, client_put, get_or_put, release, recycle),
]


# --- deaths ---------------------------------------------------------------------------------------


async def borrower(pipe: crew.Pipe, endpoint: str, data: bytes) -> None:
    """A session, killed while it borrows."""
    ref = featcache.FeatureRef.from_bytes(data)
    async with featcache.connect(endpoint) as client, client.borrow(ref):
        pipe.say("borrows")
        await pipe.hear()


async def full_owner(pipe: crew.Pipe) -> None:
    """An owner of a full pool, killed while a put waits."""
    async with featcache.create(settings=featcache.Settings(**FULL)) as cache:
        await cache.put(feature())
        pipe.say("full", cache.endpoint)
        await crew.until("a put waits", lambda: cache.statistics().waiters)
        pipe.say("waited for")
        await pipe.hear()


def session_dies(children: crew.Crew, pair: Pair) -> Found:
    """From the death of a session that borrows until its read is paid."""
    ref = pair.put()
    child = children.start(borrower, pair.owner.endpoint, ref.to_bytes())
    asyncio.run(child.expect("borrows"))

    async def lost() -> None:
        child.kill()
        await pair.near.trace.until(lambda: pair.owner.statistics().used_bytes == 0)

    return {"a session dies in a borrow, until it is paid": pair.own(lost())}


def owner_dies(children: crew.Crew, side: Side) -> Found:
    """From the owner's death until a client's put that waits has raised OwnerLost."""
    child = children.start(full_owner)
    (endpoint,) = asyncio.run(child.expect("full"))
    settings = featcache.Settings(**FULL)

    async def begin() -> asyncio.Task[featcache.FeatureRef]:
        return asyncio.create_task(client.put(feature()))

    async def lost() -> None:
        child.kill()
        try:
            await task
        except featcache.OwnerLost:
            return
        raise AssertionError("the put did not wait")

    context = AsyncExitStack()
    connected = context.enter_async_context(featcache.connect(endpoint, settings=settings))
    client = side.run(connected)
    task = side.run(begin())
    asyncio.run(child.expect("waited for"))
    settle(side)
    count(lost(), side)
    found = side.counts()
    side.run(context.aclose())
    return {"the owner dies while a client's put waits": found}


# --- the whole ------------------------------------------------------------------------------------


def medians(runs: list[Found]) -> Found:
    return {
        path: {name: statistics.median(run[path][name] for run in runs) for name in found}
        for path, found in runs[0].items()
    }


def measure(runs: int, *, deaths: bool = True) -> Found:
    """Return the medians of so many runs of each path."""
    result: Found = {}
    for path in PATHS:
        with Pair(**({"recycle_interval": TICK_S} if path is recycle else {})) as pair:
            result |= medians([path(pair, run) for run in range(WARM + runs)][WARM:])
    if deaths:
        with crew.Crew() as children, Pair() as pair:
            result |= medians([session_dies(children, pair) for _ in range(1 + runs)][1:])
        with crew.Crew() as children:
            side = Side()
            result |= medians([owner_dies(children, side) for _ in range(1 + runs)][1:])
            side.close()
    return result


def report(trees: dict[str, Found]) -> str:
    """A table of each count, the trees beside each other."""
    names = list(counts([]))
    columns = [f"{name}, {tree}" if len(trees) > 1 else name for name in names for tree in trees]
    rows = [
        [path, *(f"{found[path][name]:g}" for name in names for found in trees.values())]
        for path in next(iter(trees.values()))
    ]
    return table(["path", *columns], rows)


def measure_beside(source: Path, options: argparse.Namespace) -> Found:
    """Measure another tree in a process of its own."""
    command = [sys.executable, __file__, "--json", "--runs", str(options.runs)]
    command += [] if options.deaths else ["--no-deaths"]
    environment = os.environ | {"PYTHONPATH": str(source.resolve())}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: Found = json.loads(done.stdout)["here"]
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--no-deaths", dest="deaths", action="store_false")
    parser.add_argument("--beside", type=Path, metavar="SRC", help="also count another tree's src")
    options = parser.parse_args(argv)
    crew.quiet()
    torch.set_num_threads(1)
    trees = {"here": measure(options.runs, deaths=options.deaths)}
    if options.beside is not None:
        trees["beside"] = measure_beside(options.beside, options)
    print(json.dumps(trees, indent=1) if options.json else report(trees))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
