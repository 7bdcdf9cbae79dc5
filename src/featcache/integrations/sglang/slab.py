"""The slab as a tokenizer worker has it: owned here, or by another worker, or by ``featcache serve``."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeVar

import attrs
import torch

from featcache import (
    AttachRefused,
    BackendUnavailable,
    CacheClosed,
    FeatcacheError,
    FeatureRef,
    FeatureTooLarge,
    OwnerLost,
    PoolFull,
    PutTimeout,
    Settings,
    SettingsError,
    StaleRef,
    UnknownPool,
    blocking,
)
from featcache.api.endpoints import named_endpoint, sweep
from featcache.integrations.sglang.config import Config
from featcache.integrations.sglang.readers import Readers

T = TypeVar("T")
Cache = blocking.FeatureCache | blocking.FeatureClient

_log = logging.getLogger("featcache")
_PREFIX: Final = "sglang-"
_FULL: Final = (PutTimeout, PoolFull, FeatureTooLarge)
_LOST: Final = (OwnerLost, AttachRefused, CacheClosed)
_ANSWER_S: Final = 0.1
"""How long a put that does not wait for room waits for the slab to grow, or for the owner's answer."""
_RETRY_S: Final = (0.1, 5.0)
"""The first and the longest pause before a lost owner is looked for again."""
_ELECTION_S: Final = 10.0
"""How long a worker that found another owner's lock tries to attach to it."""
_WARN_S: Final = 10.0


@attrs.frozen(kw_only=True)
class Plan:
    """What a slab is to be. Equal plans of one process are one slab."""

    config: Config
    device: torch.device
    capacity_bytes: int
    slots: int

    @property
    def endpoint(self) -> str:
        """The socket at which all workers of the server meet."""
        config = self.config
        if config.endpoint is not None:
            return config.endpoint
        return named_endpoint(
            f"{_PREFIX}{config.server}-{self.device.type}{self.device.index or 0}"
        )


class Slab:
    """One end of the slab, shared by the pools of this process. Safe in any thread.

    The first worker that asks for it owns it; when that dies another takes its place. While there is no
    owner puts find no room, and a thread looks for the next one.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.users = 0
        self._cache: Cache | None = None
        self._spills = plan.config.endpoint is not None or plan.config.spill_bytes > 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._search: threading.Thread | None = None
        self._warned_s, self._unwarned = -_WARN_S, 0

    def open(self) -> None:
        """Own the slab, or attach to its owner.

        Raises:
            FeatcacheError: neither is possible.

        """
        plan = self.plan
        if plan.config.endpoint is None:
            self._cache = self._elect()
            return
        try:
            self._cache = self._attach()
        except _LOST as error:  # a daemon that is yet to start: requests go on without it
            self._lose(None, error)

    def close(self) -> None:
        """Leave it; the owner's end closes the slab."""
        self._closed.set()
        with self._lock:
            cache, self._cache = self._cache, None
        if cache is not None:
            cache.close()

    # --- the calls of a pool ------------------------------------------------------------------------

    def put(self, feature: torch.Tensor, readers: Readers, wait_s: float) -> FeatureRef | None:
        """Put a feature; None if there is no room for it in `wait_s` seconds, or no owner."""
        return self._put(
            lambda cache, timeout_s, on_full: cache.put(
                feature,
                readers=readers.owed(),
                ttl=self.plan.config.ttl_s,
                timeout=timeout_s,
                on_full=on_full,
            ),
            wait_s,
            feature.nbytes,
        )

    def put_many(
        self, features: Sequence[torch.Tensor], readers: Readers, wait_s: float
    ) -> list[FeatureRef] | None:
        """As `put`, of all together or none."""
        return self._put(
            lambda cache, timeout_s, on_full: cache.put_many(
                features,
                readers=readers.owed(),
                ttl=self.plan.config.ttl_s,
                timeout=timeout_s,
                on_full=on_full,
            ),
            wait_s,
            sum(feature.nbytes for feature in features),
        )

    def discard(self, ref: FeatureRef) -> None:
        """Take a feature back that was never sent; one that is gone already is no error."""
        cache = self._cache
        if cache is not None:
            with contextlib.suppress(StaleRef, UnknownPool, *_LOST):
                cache.discard(ref)

    def take_back(self, ref: FeatureRef) -> torch.Tensor | None:
        """Return a feature that was never sent, in host memory, and discard it; None if it is not here."""
        cache = self._cache
        if cache is None:
            return None
        try:
            feature = cache.get(ref)
        except (StaleRef, UnknownPool, *_LOST):
            return None
        self.discard(ref)
        assert isinstance(feature, torch.Tensor), "a pool puts bare tensors"
        return feature.cpu()

    @property
    def in_use(self) -> int:
        """The features that the slab holds now, of all workers."""
        cache = self._cache
        if cache is None:
            return 0
        with contextlib.suppress(CacheClosed):
            return cache.statistics().slots_used
        return 0

    # --- inside -------------------------------------------------------------------------------------

    def _put(
        self,
        put: Callable[[Cache, float, Literal["wait", "raise", "spill"]], T],
        wait_s: float,
        nbytes: int,
    ) -> T | None:
        """Grow, then wait, then spill: the slab grows in each of these before it is full."""
        cache = self._cache
        if cache is None:
            return None
        try:
            if wait_s > 0:
                with contextlib.suppress(*_FULL):
                    return put(cache, wait_s, "wait")
            if self._spills:
                try:
                    return put(cache, _ANSWER_S, "spill")
                except SettingsError:
                    if self.plan.config.endpoint is None:
                        raise
                    self._spills = False  # the daemon has no host slab
            if wait_s <= 0:
                return put(cache, _ANSWER_S, "raise")
        except _FULL as full:
            self._warn(nbytes, full)
        except _LOST as error:
            self._lose(cache, error)
        return None

    def _warn(self, nbytes: int, why: Exception) -> None:
        """Say that the slab is full, at a bounded rate."""
        now_s = time.monotonic()
        self._unwarned += 1
        if now_s - self._warned_s >= _WARN_S:
            _log.warning(
                "no room for a feature of %d bytes, SGLang sends it through the host instead (%d such "
                "since the last warning): raise SGLANG_MM_FEATURE_CACHE_MB or FEATCACHE_SGLANG_SPILL. %s",
                *(nbytes, self._unwarned, why),
            )
            self._warned_s, self._unwarned = now_s, 0

    def _lose(self, cache: Cache | None, error: Exception) -> None:
        """Give up an owner that is gone, and have the next one looked for."""
        with self._lock:
            if self._cache is not cache or self._closed.is_set():
                return  # another thread was first
            self._cache = None
            if self._search is not None and self._search.is_alive():
                return
            self._search = threading.Thread(target=self._look_for_owner, daemon=True)
            self._search.start()
        _log.warning(
            "the slab at %s is gone, SGLang sends features through the host until it is back: %s",
            *(self.plan.endpoint, error),
        )
        if cache is not None:
            with contextlib.suppress(FeatcacheError):
                cache.close()

    def _look_for_owner(self) -> None:
        pause_s, longest_s = _RETRY_S
        while not self._closed.wait(pause_s):
            pause_s = min(2 * pause_s, longest_s)
            try:
                found = self._attach() if self.plan.config.endpoint else self._elect()
            except FeatcacheError:
                continue
            with self._lock:
                closed = self._closed.is_set()
                if not closed:
                    self._cache = found
            if closed:
                found.close()
            else:
                _log.info("the slab at %s is back", self.plan.endpoint)
            return

    def _attach(self) -> Cache:
        client = blocking.connect(self.plan.endpoint, device=self.plan.device)
        client.open()
        return client

    def _elect(self) -> Cache:
        """Own the slab if nobody does, else attach to who does."""
        plan = self.plan
        cache = blocking.create(
            device=plan.device,
            capacity=plan.capacity_bytes,
            endpoint=plan.endpoint,
            spill=plan.config.spill_bytes or None,
            settings=Settings(slots=plan.slots),
        )
        try:
            cache.open()
        except SettingsError as taken:
            return self._follow(taken)
        sweep(_PREFIX)  # what servers that were killed left behind
        return cache

    def _follow(self, taken: SettingsError) -> Cache:
        """Attach to the worker that has the endpoint's lock, and may not listen yet."""
        until_s = time.monotonic() + _ELECTION_S
        while True:
            try:
                return self._attach()
            except _LOST:
                if time.monotonic() > until_s or self._closed.wait(_RETRY_S[0]):
                    raise taken from None


_slabs: Final[dict[Plan, Slab]] = {}
_opening: Final = threading.Lock()


def acquire(plan: Plan) -> Slab:
    """Return this process's end of a slab, opened; `release` it as often.

    Raises:
        FeatcacheError: it can't be opened.

    """
    with _opening:
        slab = _slabs.get(plan)
        if slab is None:
            slab = Slab(plan)
            slab.open()
            _slabs[plan] = slab
        slab.users += 1
        return slab


def take_back(ref: FeatureRef) -> torch.Tensor | None:
    """Return a feature that this process put and never sent, in host memory, and discard it."""
    with _opening:
        slabs = list(_slabs.values())
    return next((found for slab in slabs if (found := slab.take_back(ref)) is not None), None)


def release(slab: Slab) -> None:
    """Close a slab with its last user."""
    with _opening:
        slab.users -= 1
        if slab.users:
            return
        _slabs.pop(slab.plan, None)
    slab.close()


UNAVAILABLE: Final = (BackendUnavailable, SettingsError)
"""Why a slab can't be had at all on this machine: SGLang's own pool is made instead."""
