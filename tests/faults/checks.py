"""What must be so after a fault."""

import gc
from collections import Counter
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from faults.agents import feature, is_right
from featcache import FeatureCache

Log = list[MutableMapping[str, Any]]


def exists(path: str) -> bool:
    return Path(path).exists()


def events(log: Log, name: str) -> Log:
    return [entry for entry in log if entry["event"] == f"featcache.{name}"]


def assert_empty(cache: FeatureCache, sessions: int = 0) -> None:
    now = cache.statistics()
    assert (now.used_bytes, now.slots_used, now.sessions) == (0, 0, sessions)
    assert now.free_bytes == now.largest_free_bytes == now.capacity_bytes
    pool = cache._opened().pool
    assert not pool.store.owing
    assert not pool.store._retiring
    assert not pool.store._aging
    assert sum(number > 0 for number in pool.pages) == sessions  # the others are the owner's own


async def assert_whole(cache: FeatureCache) -> None:
    """The pool can do what a new one can."""
    assert_empty(cache)
    capacity = cache.statistics().capacity_bytes
    ref = cache.put_nowait(feature(99, capacity))
    assert is_right(await cache.get(ref), 99)
    cache._opened().pool.collect()
    assert cache.statistics().used_bytes == 0


def ours() -> Counter[str]:
    """The descriptors of this process that are the library's: the driver has others, and keeps them."""
    gc.collect()
    found: Counter[str] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # that of this listing
            continue
        if "memfd:featcache" in target or "pidfd" in target:
            found[target.split("[", maxsplit=1)[0]] += 1
    return found
