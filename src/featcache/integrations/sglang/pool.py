"""The slab end that the replacements of both of SGLang's pools share."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from featcache import FeatureRef
from featcache.integrations.sglang.clients import device_of
from featcache.integrations.sglang.config import MIB, Config, capacity_bytes, published
from featcache.integrations.sglang.proxy import FeatureProxy
from featcache.integrations.sglang.readers import Readers, readers_of
from featcache.integrations.sglang.slab import UNAVAILABLE, Plan, Slab, acquire, release

_log = logging.getLogger("featcache")


class PoolEnd:
    """A pool's end of the slab: the puts of one consumer group. Safe in any thread."""

    def __init__(self, slab: Slab, readers: Readers) -> None:
        self.slab = slab
        self.readers = readers
        self._deadlines = threading.local()
        self._released = threading.Lock()

    @contextlib.contextmanager
    def one_wait(self) -> Iterator[None]:
        """Bound the waits of all puts in the block together, in this thread."""
        self._deadlines.until_s = time.monotonic() + self.slab.plan.config.wait_s
        try:
            yield
        finally:
            del self._deadlines.until_s

    def wait_s(self) -> float:
        """Return how long a put may wait here: not at all where an event loop would stand still."""
        if asyncio._get_running_loop() is not None:  # noqa: SLF001 - the form that does not raise
            return 0.0
        until_s = getattr(self._deadlines, "until_s", None)
        if until_s is None:
            return self.slab.plan.config.wait_s
        return max(0.0, float(until_s) - time.monotonic())

    def put(self, tensor: torch.Tensor) -> FeatureRef | None:
        """Put one tensor; None if there is no room."""
        return self.slab.put(tensor.detach(), self.readers, self.wait_s())

    def cancel(self, proxy: Any) -> None:
        """Take back a feature that was never dispatched; again, or after it was paid, does nothing.

        Raises:
            RuntimeError: the proxy is none of this slab's.

        """
        if not isinstance(proxy, FeatureProxy):
            # RuntimeError: what SGLang's own pool raises
            name = type(proxy).__name__
            raise RuntimeError(f"a {name} does not belong to featcache's pool")  # noqa: TRY004 - as above
        self.slab.discard(proxy.ref)

    def shutdown(self) -> None:
        """Leave the slab; idempotent."""
        if self._released.acquire(blocking=False):
            release(self.slab)


def open_end(
    share_bytes: int, gpu: int, consumers: int, slots: int, context: "SglangContext"
) -> PoolEnd | None:
    """Return an end of the server's slab, or None, with a warning, where there can be none.

    Raises:
        ValueError: a size or a count is not positive.

    """
    for name, value in (("memory_size", share_bytes), ("consumer_count", consumers)):
        if value <= 0:
            raise ValueError(f"{name} must be positive")
    try:
        config = Config.from_environment()
        capacity = capacity_bytes(
            share_bytes, context.workers(), context.budget_bytes(), context.known_bytes
        )
        plan = Plan(config=config, device=device_of(gpu), capacity_bytes=capacity, slots=slots)
        slab = acquire(plan)
    except UNAVAILABLE as error:
        _log.warning("featcache can't be SGLang's pool here, its own is used instead: %s", error)
        return None
    readers = readers_of(config.server, consumers, context.parallel())
    _log.info(
        "multimodal features go through featcache's slab at %s (%d MiB in all, %d reader(s) each)",
        *(plan.endpoint, capacity // MIB, consumers),
    )
    return PoolEnd(slab, readers)


class SglangContext:
    """SGLang's settings of this process, read at each use."""

    def __init__(
        self,
        known_bytes: int,
        budget_mib: Callable[[], int],
        workers: Callable[[], int],
        parallel: Callable[[], Any],
    ) -> None:
        self.known_bytes = known_bytes
        self._budget_mib, self._workers, self._parallel = budget_mib, workers, parallel

    def budget_bytes(self) -> int:
        """Return SGLANG_MM_FEATURE_CACHE_MB as it is now, in bytes."""
        return self._budget_mib() * MIB

    def workers(self) -> int:
        """Return the number of tokenizer workers."""
        return published(self._workers, 1)

    def parallel(self) -> "_Sizes":
        """Return the sizes that say whether a request has one group of ranks."""
        parallel = self._parallel()
        return _Sizes(
            published(lambda: int(parallel.dp_size), 1), published(lambda: int(parallel.pp_size), 1)
        )


class _Sizes:
    def __init__(self, dp_size: int, pp_size: int) -> None:
        self.dp_size, self.pp_size = dp_size, pp_size
