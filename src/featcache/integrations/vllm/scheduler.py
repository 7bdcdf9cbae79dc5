"""The scheduler's half: looks in shared memory, leases, and who encodes what is missing. Never waits."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import attrs

from featcache import FeatcacheError, FeatureClient
from featcache.api.claiming import Lease, lease_now
from featcache.integrations.vllm.ahead import Orders
from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.flights import Flights
from featcache.integrations.vllm.keys import Keys
from featcache.integrations.vllm.link import LoopLink
from featcache.integrations.vllm.metadata import Load, StepMetadata, WorkerMetadata, rows_of

_LEASE_S: Final = 60.0
"""How long a lease is kept for ranks that do not tell the end of their loads."""


class _Request(Protocol):
    """What is used of vLLM's request."""

    request_id: str
    mm_features: list[Any]


@attrs.define(eq=False)
class _Leased:
    """A feature that the ranks load now."""

    lease: Lease | None
    began_s: float
    left: int
    """Ranks that have not told the end of their load."""


class SchedulerSide:
    """What a `FeatcacheECConnector` of the role SCHEDULER does."""

    def __init__(
        self,
        link: LoopLink,
        keys: Keys,
        flights: Flights,
        counts: Counts,
        *,
        loads: bool,
        saves: bool,
        ranks: int,
        orders: Orders | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link, self._keys, self._flights, self._counts = link, keys, flights, counts
        self._loads, self._saves, self._ranks = loads, saves, ranks
        self._orders = orders
        """Of inputs that can't be encoded here; None where all can."""
        self._clock = clock
        # Of the step that is planned now:
        self._seen: dict[str, bool] = {}
        """What `has_cache_item` said, which stays so until the step's metadata is built."""
        self._held: dict[str, Lease | None] = {}
        """Leases by identifier of what it said is there."""
        self._planned: dict[str, Load] = {}
        # Of steps under way:
        self._loading: dict[str, list[_Leased]] = {}
        self._asked: dict[str, set[str]] = {}
        """Requests by identifier that wait for it, or are to encode it."""
        self._unavailable: set[str] = set()
        self._had: dict[str, tuple[int, set[str]]] = {}
        """By request, how often it was preempted, and what vLLM's encoder cache keeps for it since."""

    # --- planning a step ------------------------------------------------------------------------------

    def has(self, identifier: str) -> bool:
        """Whether an input need not be encoded: its output is in the pool."""
        told = self._seen.get(identifier)
        if told is not None:
            return told
        there = self._look(identifier)
        self._seen[identifier] = there
        self._counts.add("hits" if there else "misses")
        return there

    def _look(self, identifier: str) -> bool:
        key, client = self._keys.key(identifier), self._link.client
        if key is None or client is None:
            return False
        try:
            if not self._loads:
                return self._there(client.contains_nowait(key), key)
            lease = lease_now(client, key)
            if lease is None and not self._there(client.contains_nowait(key), key):
                return False
        except FeatcacheError:  # the owner is gone: the link is on its way back
            return False
        self._held[identifier] = lease
        return True

    def _there(self, told: bool | None, key: str) -> bool:
        """Whether a key is there, as the table tells, or else the owner did."""
        return self._flights.found(key) if told is None else told

    def is_ready(self, request: _Request, computed: int) -> bool:
        """Whether a request can be planned now: each input that it needs is there, or to be encoded here."""
        needed = self._needed(request, computed)
        if not needed:  # of each request that decodes, at each step
            return True
        client = self._link.client
        missing = dict[str, bool]()  # by key, whether it can be encoded here
        lost, ordered = False, False
        for feature in needed:
            identifier, orders = feature.identifier, self._orders
            encodable = orders is None or orders.encodable(feature)
            # What can't be encoded here is with the ranks before the plan, and leased until it is.
            if orders is not None and not encodable and self._is_leased(identifier):
                ordered = self._is_ordered(orders, identifier) or ordered
                continue
            if self._seen.get(identifier):
                continue
            key = self._keys.key(identifier)
            there = None if key is None or client is None else self._told(client, key)
            if key is None or there is None:
                lost = lost or not encodable
            elif there:
                self._flights.arrived(key)
            else:
                missing[key] = missing.get(key, True) and encodable
                self._asked.setdefault(identifier, set()).add(request.request_id)
        awaited = self._flights.missing(missing, client) if client is not None else set[str]()
        if lost or not all(missing[key] for key in missing.keys() - awaited):
            self._unavailable.add(request.request_id)
            return False
        return not (awaited or ordered)

    def _needed(self, request: _Request, computed: int) -> list[Any]:
        """Return the features that a request needs from here on, and vLLM's encoder cache has not for it."""
        needed = []
        for feature in request.mm_features:
            position = feature.mm_position
            if position.offset + position.length > computed:
                needed.append(feature)
        if not needed:
            return needed
        preemptions, had = self._had.get(request.request_id, (0, ()))
        if preemptions != _preemptions(request):  # what it had can be gone
            had = ()
        return [feature for feature in needed if feature.identifier not in had]

    def _is_ordered(self, orders: Orders, identifier: str) -> bool:
        """Whether the ranks are yet to copy what is leased."""
        key, client = self._keys.key(identifier), self._link.client
        if key is None or client is None or orders.has(identifier):
            return False
        try:
            return orders.awaits(identifier, key, client)
        except FeatcacheError:  # the owner is gone: at the next pass it is told
            return True

    def _is_leased(self, identifier: str) -> bool:
        """Take a lease of what is there, or know the ranks to have it; `has` then answers so in this pass."""
        if self._seen.get(identifier):
            return True
        if self._orders is not None and self._orders.has(identifier):
            self._held[identifier] = None
        elif not self._look(identifier):
            return False
        self._seen[identifier] = True
        self._counts.add("hits")
        return True

    def _told(self, client: FeatureClient, key: str) -> bool | None:
        """Whether a key is there; None without an owner."""
        try:
            return self._there(client.contains_nowait(key), key)
        except FeatcacheError:
            return None

    def allocated(self, request: _Request, index: int) -> None:
        """Take note that a step has room for an input: it is loaded, or encoded."""
        identifier = request.mm_features[index].identifier
        preemptions = _preemptions(request)
        had = self._had.get(request.request_id)
        if had is None or had[0] != preemptions:
            had = self._had[request.request_id] = (preemptions, set())
        had[1].add(identifier)
        key = self._keys.key(identifier)
        if key is None:
            return
        if not self.has(identifier):
            self._flights.encoding(key)
        elif self._loads:
            if self._orders is not None:
                self._orders.taken(identifier)
            self._planned[identifier] = Load(
                identifier, key, request.request_id, index, rows_of(request, index)
            )

    def freed(self, request: _Request, index: int) -> None:
        """Take note that vLLM keeps an input's output no longer for a request."""
        had = self._had.get(request.request_id)
        if had is not None:
            had[1].discard(request.mm_features[index].identifier)

    def built(self, output: Any) -> StepMetadata:
        """Return what the workers are told of this step; the next one is planned from here."""
        encodes = getattr(output, "scheduled_encoder_inputs", None)
        planned, held = self._planned, self._held
        if planned:
            self._planned = {}
        if held:
            self._held = {}
        self._seen.clear()
        now_s = self._clock()
        for identifier, lease in held.items():
            if identifier in planned:
                leased = _Leased(lease, now_s, self._ranks)
                self._loading.setdefault(identifier, []).append(leased)
            elif lease is not None:  # looked at, with no room in this step
                lease.end()
        self._expire(now_s)
        return StepMetadata(
            list(planned.values()),
            self._unsaved(output) if self._saves else [],
            encodes if isinstance(encodes, dict) else None,
        )

    def _unsaved(self, output: Any) -> list[str]:
        """Return what this engine has the claim of, and workers may have from earlier steps."""
        tokens = getattr(output, "num_scheduled_tokens", None)
        if not self._asked or not isinstance(tokens, dict):
            return []
        return [
            identifier
            for identifier, requests in self._asked.items()
            if any(request in tokens for request in requests)
            and (key := self._keys.key(identifier)) is not None
            and self._flights.claimed_unused(key)
        ]

    def _expire(self, now_s: float) -> None:
        self._flights.expire()
        if self._orders is not None:
            self._orders.expire()
        for identifier, leased in list(self._loading.items()) if self._loading else ():
            while leased and now_s - leased[0].began_s > _LEASE_S:
                self._end(identifier)

    # --- what came of steps -----------------------------------------------------------------------------

    def told(self, output: Any) -> None:
        """Take what the workers tell of a step, all ranks together."""
        meta = getattr(output, "ec_connector_worker_meta", None)
        if not isinstance(meta, WorkerMetadata):
            return
        self._counts.merge(meta.counts)
        for identifier, ranks in meta.loaded.items():
            self._loaded(identifier, ranks)
        for identifier in (*meta.saved, *meta.dropped):
            self._forget(identifier, ends=True)

    def _loaded(self, identifier: str, ranks: int) -> None:
        leased = self._loading.get(identifier)
        if not leased:
            return
        leased[0].left -= ranks
        if leased[0].left <= 0:
            self._end(identifier)

    def _end(self, identifier: str) -> None:
        leased = self._loading[identifier]
        first = leased.pop(0)
        if not leased:
            del self._loading[identifier]
        if first.lease is not None:
            first.lease.end()

    def finished(self, request: _Request) -> None:
        """Take note that a request has ended, however: what it alone waited for is waited for no more."""
        self._unavailable.discard(request.request_id)
        self._had.pop(request.request_id, None)
        for identifier in {feature.identifier for feature in request.mm_features}:
            waiting = self._asked.get(identifier)
            if waiting is not None:
                waiting.discard(request.request_id)
                if not waiting:
                    self._forget(identifier, ends=False)

    def _forget(self, identifier: str, *, ends: bool) -> None:
        self._asked.pop(identifier, None)
        key = self._keys.key(identifier)
        if key is not None:
            (self._flights.end if ends else self._flights.abandon)(key)

    def take_unavailable(self) -> set[str]:
        """Return the requests that can't be answered: an input is neither in the pool nor here."""
        taken, self._unavailable = self._unavailable, set()
        return taken

    @property
    def leased(self) -> Counter[str]:
        """Leases that are out, by identifier."""
        return Counter({name: len(leased) for name, leased in self._loading.items()})

    def close(self) -> None:
        """End every lease and the connection."""
        _end_all(self._held.values())
        self._held.clear()
        for identifier in list(self._loading):
            while identifier in self._loading:
                self._end(identifier)
        self._link.close()


def _preemptions(request: _Request) -> int:
    """Return how often a request was preempted, and lost what it had."""
    return int(getattr(request, "num_preemptions", 0))


def _end_all(leases: Iterable[Lease | None]) -> None:
    for lease in leases:
        if lease is not None:
            lease.end()
