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
    OwnerUnreachable,
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

Cache = blocking.FeatureCache | blocking.FeatureClient
T = TypeVar("T")
OnFull = Literal["wait", "raise", "spill"]

_log = logging.getLogger("featcache")
_PREFIX: Final = "sglang-"
_FULL: Final = (PutTimeout, PoolFull, FeatureTooLarge)
_LOST: Final = (OwnerLost, CacheClosed)
_ANSWER_S: Final = 0.1
"""How long a put that does not wait for room waits for the slab to grow, or for the owner's answer."""
_RETRY_S: Final = (0.1, 5.0)
"""The first and the longest pause before a worker tries again to take a lost owner's place."""
_ELECTION_S: Final = 10.0
"""How long a worker that found another owner's lock waits until that listens."""
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

    The first worker that asks for it owns it; when that dies another takes its place. The others have a
    client each, which attaches anew to its next owner, and puts in its caller's thread once it has room
    ahead. The owner has none: its loop and a client's beside it would stand in each other's way at the
    interpreter's lock. While there is no owner puts find no room.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.users = 0
        self._client = blocking.connect(plan.endpoint, device=plan.device, reconnect=True)
        self._owner: blocking.FeatureCache | None = None
        self._spills = plan.config.endpoint is not None or plan.config.spill_bytes > 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._lost = False
        self._election: threading.Thread | None = None
        self._warned_s, self._unwarned = -_WARN_S, 0

    def open(self) -> None:
        """Own the slab, or attach to its owner.

        Raises:
            FeatcacheError: neither is possible.

        """
        elects = self.plan.config.endpoint is None
        taken = self._stand() if elects else None
        if self._owner is not None:
            return
        try:
            self._client.open()
            if elects:
                self._client.wait_attached(timeout=_ELECTION_S)
            elif not self._client.is_attached:  # a daemon that is yet to start
                self._lose("no owner listens there")
        except BaseException as error:
            self.close()
            if isinstance(error, OwnerUnreachable) and taken is not None:
                raise taken from None
            raise

    def close(self) -> None:
        """Leave it; the owner's end closes the slab."""
        self._closed.set()
        with self._lock:
            owner, self._owner = self._owner, None
        self._client.close()
        if owner is not None:
            owner.close()

    # --- the calls of a pool ------------------------------------------------------------------------

    def put(self, feature: torch.Tensor, readers: Readers, wait_s: float) -> FeatureRef | None:
        """Put a feature; None if there is no room for it in `wait_s` seconds, or no owner."""
        return self._put(
            lambda on_full, timeout_s: self._nearest.put(
                feature,
                readers=readers.owed(),
                ttl=self.plan.config.ttl_s,
                timeout=timeout_s,
                on_full=on_full,
            ),
            *(wait_s, feature.nbytes),
        )

    def put_many(
        self, features: Sequence[torch.Tensor], readers: Readers, wait_s: float
    ) -> list[FeatureRef] | None:
        """As `put`, of all together or none."""
        return self._put(
            lambda on_full, timeout_s: self._nearest.put_many(
                features,
                readers=readers.owed(),
                ttl=self.plan.config.ttl_s,
                timeout=timeout_s,
                on_full=on_full,
            ),
            *(wait_s, sum(feature.nbytes for feature in features)),
        )

    def discard(self, ref: FeatureRef) -> None:
        """Take a feature back that was never sent; one that is gone already is no error."""
        with contextlib.suppress(StaleRef, UnknownPool, *_LOST):
            self._nearest.discard(ref)

    def take_back(self, ref: FeatureRef) -> torch.Tensor | None:
        """Return a feature that was never sent, in host memory, and discard it; None if it is not here."""
        try:
            feature = self._nearest.get(ref)
        except (StaleRef, UnknownPool, *_LOST):
            return None
        self.discard(ref)
        assert isinstance(feature, torch.Tensor), "a pool puts bare tensors"
        return feature.cpu()

    @property
    def in_use(self) -> int:
        """The features that the slab holds now, of all workers."""
        with contextlib.suppress(CacheClosed):
            return self._nearest.statistics().slots_used
        return 0

    # --- inside -------------------------------------------------------------------------------------

    @property
    def _nearest(self) -> Cache:
        """The owner, if it is here, else this worker's client of it."""
        return self._owner or self._client

    def _put(self, put: Callable[[OnFull, float], T], wait_s: float, nbytes: int) -> T | None:
        """Grow, then wait, then spill: the slab grows in each of these before it is full."""
        if self._owner is None and not self._client.is_attached:
            self._lose("no owner listens there")
            return None
        self._lost = False
        tries: list[tuple[OnFull, float]]
        tries = [("wait", wait_s) if wait_s > 0 else ("raise", _ANSWER_S), ("spill", _ANSWER_S)]
        why: Exception | None = None
        for on_full, timeout_s in tries if self._spills else tries[:1]:
            try:
                return put(on_full, timeout_s)
            except _FULL as full:
                why = full
            except _LOST as error:
                self._lose(error)
                return None
            except SettingsError:
                if on_full != "spill" or self.plan.config.endpoint is None:
                    raise
                self._spills = False  # the daemon has no host slab
        self._warn(nbytes, why)
        return None

    def _warn(self, nbytes: int, why: Exception | None) -> None:
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

    def _lose(self, why: object) -> None:
        """Say that the owner is gone, once, and have its place taken if it was a worker."""
        with self._lock:
            if self._lost or self._closed.is_set():
                return  # another thread was first
            self._lost = True
            if self.plan.config.endpoint is None and self._election is None:
                self._election = threading.Thread(target=self._elect, daemon=True)
                self._election.start()
        _log.warning(
            "the slab at %s is gone, SGLang sends features through the host until it is back: %s",
            *(self.plan.endpoint, why),
        )

    def _elect(self) -> None:
        """Own the slab, unless this worker is attached to another's before."""
        pause_s, longest_s = _RETRY_S
        while not (self._owner or self._client.is_attached or self._closed.wait(pause_s)):
            pause_s = min(2 * pause_s, longest_s)
            with contextlib.suppress(FeatcacheError):
                self._stand()
        self._election = None

    def _stand(self) -> SettingsError | None:
        """Own the slab if nobody does, else return why not."""
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
            return taken
        with self._lock:
            closed = self._closed.is_set()
            self._owner = None if closed else cache
        if closed:
            cache.close()
        sweep(_PREFIX)  # what servers that were killed left behind
        return None


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


UNAVAILABLE: Final = (AttachRefused, BackendUnavailable, SettingsError)
"""Why a slab can't be had at all on this machine: SGLang's own pool is made instead."""
