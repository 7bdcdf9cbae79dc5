"""Poison in every extent as it is freed, so that a late read sees it and not the right bytes.

The library takes no part: the store's `_free` and the slab's `write` and `decommit` are wrapped. If
they are not as this file expects them, or the poison does not show, that is an error.
"""

from __future__ import annotations

from typing import Any

import torch

import featcache
from bench.crew import ProofError, until
from bench.patterns import POISON
from featcache.ref import TensorSpec

_cuda: Any = torch.cuda


def pool_of(cache: featcache.FeatureCache) -> Any:
    """The pool inside an open cache; ProofError if it is not where it was."""
    state: Any = cache._life.engine
    pool = getattr(getattr(state, "main", state), "pool", None)
    if pool is None:
        raise ProofError("the cache is not open, or keeps its pool elsewhere: mend poison.py")
    return pool


class Poison:
    """Fills what the pool frees, on a stream of its own, before anything is written there again."""

    def __init__(self, cache: featcache.FeatureCache) -> None:
        pool = pool_of(cache)
        self._slab: Any = pool.slab
        self._store: Any = pool.store
        self.extents = self.poisoned_bytes = self.writes = 0
        is_cuda = self._slab.device.type == "cuda"
        self._stream: Any = _cuda.Stream(self._slab.device) if is_cuda else None
        self._done: Any = None  # an event behind the last poison
        for target, name in (
            (self._store, "_free"),
            (self._slab, "write"),
            (self._slab, "decommit"),
        ):
            if not callable(getattr(target, name, None)):
                raise ProofError(f"{type(target).__name__}.{name} is gone: mend poison.py")
        self._wrap_free()
        self._wrap_slab("write")
        self._wrap_slab("decommit")

    def _wrap_free(self) -> None:
        original = self._store._free

        def free(slot: Any, *arguments: Any, **names: Any) -> Any:
            self._poison(slot.extent.offset_bytes, slot.extent.size_bytes)
            return original(slot, *arguments, **names)

        self._store._free = free

    def _wrap_slab(self, name: str) -> None:
        # On the class: an instance with slots takes no attribute.
        kind = type(self._slab)
        original = getattr(kind, name)

        def wrapped(slab: Any, *arguments: Any, **names: Any) -> Any:
            if slab is self._slab:
                self.writes += name == "write"
                self._wait()
            return original(slab, *arguments, **names)

        setattr(kind, name, wrapped)

    def view(self, offset_bytes: int, nbytes: int) -> torch.Tensor:
        view: torch.Tensor = self._slab.view(offset_bytes, TensorSpec(None, "uint8", (nbytes,), 0))
        return view

    def _poison(self, offset_bytes: int, nbytes: int) -> None:
        self.extents += 1
        self.poisoned_bytes += nbytes
        if self._stream is None:
            self.view(offset_bytes, nbytes).fill_(POISON)
            return
        with _cuda.stream(self._stream):
            self.view(offset_bytes, nbytes).fill_(POISON)
            done = _cuda.Event()
            done.record()
        self._done = done

    def _wait(self) -> None:
        """Wait here, not on a stream: writes may come on any stream, and from any thread."""
        done = self._done
        if done is not None and not done.query():
            done.synchronize()

    async def prove(self, cache: featcache.FeatureCache) -> None:
        """Free one extent and find the poison in it; ProofError if it is not there."""
        nbytes = 1 << 20
        feature = torch.zeros(nbytes, dtype=torch.uint8, device=self._slab.device)
        ref = await cache.put(feature)
        await cache.release(ref)
        await until("the first feature is recycled", lambda: not cache.statistics().used_bytes)
        self._wait()
        found = self.view(ref.offset_bytes, nbytes)
        if not self.writes or not self.extents or bool((found != POISON).any()):
            raise ProofError("no poison in a freed extent: the wrapped calls are not on its way")
