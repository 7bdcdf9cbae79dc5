"""The cost of a put, a lookup and a collection of paid reads, with few and many features and sessions.

    PYTHONPATH=src python tests/bench/keyed_scale.py --out tests/bench/results/keyed-scale.json

Pools with 100, 1,000, 4,000 and 100,000 features of 1 KiB that are kept under keys, and pools of 1,000
with 1, 8, 32 and 64 sessions attached, all open at once in one process. They take turns; a figure is the
median over the rounds of the CPU time of one call, in batches.

- put: with room for it. put, evicting: of a new key into a pool that has room for nothing else, so that
  the longest unused feature goes first.
- lookup: `get(key)`, copy and all, by the owner and by a client, which needs no owner. Of so many keys
  that the session does not remember them all, the first reads the slot's record; then the same again.
- recycle: a collection of paid reads, for each ref and each grant that it finds paid, 64 of them; and for
  itself, where nothing was.
- compare: numpy's time to compare as many words as one session's page has in use, and find none.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import statistics
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from time import thread_time_ns
from typing import Any

import attrs
import numpy as np
import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import featcache
from bench import crew, machine, resultfile
from bench.host import parse_counts
from bench.keyed_fleet import commit
from bench.report import number, table

FEATURE_BYTES = 1024
BATCH = 64
GROWTH = 1.25
"""the most that a figure may grow from the fewest features to the most"""
FIGURES = {
    "put": "put",
    "put_evicting": "put, evicting",
    "lookup_own_first": "lookup by the owner, of any key",
    "lookup_own": "lookup by the owner, again",
    "lookup_first": "lookup by a client, of any key",
    "lookup": "lookup by a client, again",
    "recycle_ref": "recycle, a ref",
    "recycle_grant": "recycle, a grant",
    "recycle_again": "recycle, a grant of what was just read before",
    "look": "recycle, nothing paid",
    "compare": "compare",
}
SETTINGS = featcache.Settings(slots=8192, recycle_interval=60.0, sessions=64, segment="16MiB")
Figures = dict[str, float]


class Case:
    """Two pools: one that has room, with sessions, and one that is full."""

    def __init__(self, features: int, sessions: int) -> None:
        self.features = features
        self.sessions = sessions
        self.random = random.Random(features)
        self.feature = torch.zeros(FEATURE_BYTES, dtype=torch.uint8)
        self.new_keys = 0
        words = np.zeros(features + BATCH, dtype=np.uint64)
        self.words = words, words.copy()

    async def open(self, stack: AsyncExitStack) -> Case:
        room_bytes = (self.features + 4 * BATCH) * FEATURE_BYTES
        full_bytes = self.features * FEATURE_BYTES
        self.cache, self.full = [
            await stack.enter_async_context(
                featcache.create(capacity=size, initial=size, settings=self.settings)
            )
            for size in (room_bytes, full_bytes)
        ]
        clients = [
            await stack.enter_async_context(featcache.connect(self.cache.endpoint))
            for _ in range(self.sessions)
        ]
        self.client = clients[0]
        for n in range(self.features):
            for cache in (self.cache, self.full):
                await cache.put(self.feature, key=f"kept {n}")
        assert self.full.statistics().keys == self.features
        return self

    @property
    def settings(self) -> featcache.Settings:
        return attrs.evolve(SETTINGS, slots=max(SETTINGS.slots, 2 * self.features))

    def keys(self) -> list[str]:
        """Each once: two reads of a key between two collections are collected together."""
        return [f"kept {n}" for n in self.random.sample(range(self.features), BATCH)]

    def collect(self) -> float:
        """Look, and return the microseconds that took."""
        pool = self.cache._opened().main.pool
        began_ns = thread_time_ns()
        pool.collect()
        return (thread_time_ns() - began_ns) / 1e3

    async def measure(self) -> Figures:
        cache, full, client, x = self.cache, self.full, self.client, self.feature
        found: Figures = {}
        self.collect()
        found["look"] = statistics.median(self.collect() for _ in range(16))

        began_ns = thread_time_ns()
        refs = [cache.put_nowait(x) for _ in range(BATCH)]
        found["put"] = since(began_ns)
        for ref in refs:
            client.get_nowait(ref)
        found["recycle_ref"] = self.collect() / BATCH

        keys = self.keys()
        began_ns = thread_time_ns()
        for key in keys:
            await cache.get(key)
        found["lookup_own_first"] = since(began_ns)
        began_ns = thread_time_ns()
        for key in keys:
            await cache.get(key)
        found["lookup_own"] = since(began_ns)
        self.collect()

        keys = self.keys()
        began_ns = thread_time_ns()
        for key in keys:
            await client.get(key)
        found["lookup_first"] = since(began_ns)
        self.collect()
        began_ns = thread_time_ns()
        for key in keys:
            await client.get(key)
        found["lookup"] = since(began_ns)
        found["recycle_grant"] = self.collect() / BATCH

        # The same steps, over memory that a cache still has.
        for key in keys:
            await client.get(key)
        found["recycle_again"] = self.collect() / BATCH

        evicted = full.statistics().evicted
        keys = [f"new {self.new_keys + n}" for n in range(BATCH)]
        self.new_keys += BATCH
        began_ns = thread_time_ns()
        for key in keys:
            full.put_nowait(x, key=key)
        found["put_evicting"] = since(began_ns)
        assert full.statistics().evicted == evicted + BATCH

        now, seen = self.words
        began_ns = thread_time_ns()
        for _ in range(BATCH):
            np.flatnonzero(now != seen)
        found["compare"] = since(began_ns)
        return found


def since(began_ns: int) -> float:
    """Microseconds of each call of a batch."""
    return (thread_time_ns() - began_ns) / 1e3 / BATCH


async def measure(cases: list[Case], rounds: int) -> list[Figures]:
    """The medians of each case."""
    async with AsyncExitStack() as stack:
        for case in cases:
            await case.open(stack)
        seen: list[list[Figures]] = [[] for _ in cases]
        for turn in range(rounds + 1):
            for at in range(len(cases)):
                which = (turn + at) % len(cases)
                figures = await cases[which].measure()
                if turn:  # the first round warms
                    seen[which].append(figures)
    return [
        {name: round(statistics.median(one[name] for one in some), 3) for name in FIGURES}
        for some in seen
    ]


def goals(by_features: dict[int, Figures], by_sessions: dict[int, Figures]) -> list[dict[str, Any]]:
    few, many = min(by_features), max(by_features)
    found: list[dict[str, Any]] = [
        {
            "goal": f"{FIGURES[name]}: {many} features over {few}",
            "value": round(by_features[many][name] / by_features[few][name], 2),
            "bound": GROWTH,
        }
        for name in ("put", "put_evicting", "lookup_own", "lookup", "recycle_ref", "recycle_grant")
    ]
    few, many = min(by_sessions), max(by_sessions)
    if many > few:
        more_us = (by_sessions[many]["look"] - by_sessions[few]["look"]) / (many - few)
        compare_us = by_sessions[many]["compare"]
        found.append(
            {
                "goal": "a look, µs for each further session, against two compares of its words",
                "value": round(more_us, 2),
                "bound": round(2 * compare_us, 2),
            }
        )
    return [one | {"reached": one["value"] <= one["bound"]} for one in found]


def report(result: dict[str, Any]) -> str:
    parts = []
    for title in ("features", "sessions"):
        columns = result[title]
        head = [f"µs, by {title}", *columns]
        rows = [
            [name, *(number(figures[key]) for figures in columns.values())]
            for key, name in FIGURES.items()
        ]
        parts.append(table(head, rows))
    rows = [
        [
            one["goal"],
            str(one["value"]),
            str(one["bound"]),
            "reached" if one["reached"] else "MISSED",
        ]
        for one in result["goals"]
    ]
    parts.append(table(["goal", "found", "bound", ""], rows))
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=parse_counts, default=[100, 1000, 4000, 100_000])
    parser.add_argument("--sessions", type=parse_counts, default=[1, 8, 32, 64])
    parser.add_argument("--among", type=int, default=1000, help="features of the pools by sessions")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    options = parser.parse_args(argv)
    crew.quiet()
    torch.set_num_threads(1)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    cases = [Case(features, 1) for features in options.features]
    cases += [Case(options.among, sessions) for sessions in options.sessions]
    found = asyncio.run(measure(cases, options.rounds))
    by_features = dict(zip(options.features, found, strict=False))
    by_sessions = dict(zip(options.sessions, found[len(options.features) :], strict=True))
    result: dict[str, Any] = {
        "date": machine.now(),
        "command": machine.command(argv, "keyed_scale.py"),
        "machine": machine.machine(),
        "versions": commit(machine.versions(None)),
        "rounds": options.rounds,
        "feature_bytes": FEATURE_BYTES,
        "features": {str(count): figures for count, figures in by_features.items()},
        "sessions": {str(count): figures for count, figures in by_sessions.items()},
        "goals": goals(by_features, by_sessions),
    }
    print(report(result))
    resultfile.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
