"""Print in which order a processor weaker than x86 is made to carry out the words of a hit.

A program of its own: whether fences are needed is known as the modules are imported.
"""

import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any


def be_weak() -> None:
    """Import the library as on another processor, and try its barrier."""
    is_x86 = platform.machine() in {"x86_64", "AMD64"}
    platform.machine = lambda: "aarch64"
    from featcache.memory import words  # after the line above

    if is_x86:
        words._SYS_MEMBARRIER = 324  # type: ignore[misc]
    words._membarrier()  # this kernel has it


def tell_fences(order: list[str]) -> None:
    """Note each fence instead, wherever it is called."""
    barrier = sys.modules["featcache.memory.words"]._membarrier
    for module in [each for name, each in sys.modules.items() if name.startswith("featcache.")]:
        assert not getattr(module, "TSO", False)
        for name in ("fence_stores", "fence_loads", "fence_full", "fence_after_lock"):
            if hasattr(module, name):
                assert getattr(module, name) is barrier
                setattr(module, name, partial(order.append, name))


def main() -> None:
    """Have a reader hit, and an owner overwrite and evict; print what was stored, loaded and fenced."""
    order = list[str]()
    be_weak()
    from session.hit_world import Reader, World
    from support.stepping import Shared

    tell_fences(order)

    class Told(Shared):
        def __init__(self, words: Any, name: str) -> None:
            super().__init__(words)
            self._name = name

        def __getitem__(self, index: Any) -> Any:
            order.append(f"load {self._name}")
            return self.words[index]

        def __setitem__(self, index: Any, value: Any) -> None:
            order.append(f"store {self._name}")
            self.words[index] = value

    def tell(of: Any, **names: str) -> None:
        for attribute, name in names.items():
            setattr(of, attribute, Told(getattr(of, attribute), name))

    told: dict[str, list[str]] = {}
    world = World()
    try:
        reader = Reader(world, 1, deferred=False)
        world.owner.do(lambda: world.put(b"k0", 1))
        page, table = reader.page, reader.hits._entry.__self__  # type: ignore[attr-defined]
        tell(reader.attachment, _lease="lease", _serial="serial", _live="live")
        tell(table, _words="table")
        tell(world.pool.words, live="live", offset="extent")
        tell(world.pool.key_table, _words="table", _mapping="record")
        places, serials, ended = page._lease_words
        looked: Any = (places, Told(serials.words, "leases"), ended)  # type: ignore[attr-defined]
        page._lease_words = looked
        works: dict[str, Callable[[], None]] = {
            "hit": lambda: reader.get(b"k0", 0),
            "put": lambda: world.put(b"k1", 1),
            "overwrite": lambda: world.put(b"k0", 1),
            "evict": lambda: world.evict(b"k0"),
        }
        for what, work in works.items():
            order.clear()
            work()
            told[what] = list(order)
    finally:
        world.close()
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
