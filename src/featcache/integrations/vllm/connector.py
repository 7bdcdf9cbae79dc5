"""`FeatcacheECConnector`: vLLM's encoder-cache interface over one featcache pool of the host."""

from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)

from featcache.integrations.vllm import config as configs
from featcache.integrations.vllm.ahead import Copies, Orders, name_of
from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.flights import Flights
from featcache.integrations.vllm.keys import Keys, facts, hashes_contents
from featcache.integrations.vllm.link import LoopLink, ThreadLink
from featcache.integrations.vllm.metadata import StepMetadata, WorkerMetadata
from featcache.integrations.vllm.outages import logger
from featcache.integrations.vllm.places import (
    Place,
    agree_on_loads,
    encodable_here,
    passes_by,
    place_of,
)
from featcache.integrations.vllm.saver import Saver
from featcache.integrations.vllm.scheduler import SchedulerSide
from featcache.integrations.vllm.stats import FeatcachePromMetrics, FeatcacheStats
from featcache.integrations.vllm.worker import WorkerSide

__all__ = ["FeatcacheECConnector"]


class FeatcacheECConnector(ECConnectorBase):
    """Shares encoder outputs between all vLLM engines of a host that name the same endpoint.

    vLLM's factory makes one for the scheduler and one for each worker. A producer saves what it encodes;
    a consumer loads what is there; ``ec_both`` does both. Whatever is not there, or is gone, or whose
    owner is away, is encoded as without a connector.

    Raises:
        SettingsError: `ec_connector_extra_config` has a mistake.

    """

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        transfer = vllm_config.ec_transfer_config
        config = configs.parse(transfer.ec_connector_extra_config)
        keys = Keys(facts(vllm_config, config.namespace), contents=hashes_contents(vllm_config))
        self._counts = Counts()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._passive = passes_by(vllm_config)
        """Whether nothing is looked up, loaded or saved."""
        place = place_of(vllm_config, scheduler=role is ECConnectorRole.SCHEDULER)
        link: LoopLink | ThreadLink
        if role is ECConnectorRole.SCHEDULER:
            link = self._open_scheduler(config, keys, place)
        else:
            link = self._open_worker(config, keys, place)
        there = link.wait_attached(config.connect_wait)
        logger.info(
            "featcache: %s of %s, %s, owner at %s %s, keys vllm:%s:…",
            place.name,
            getattr(vllm_config.model_config, "model", "a model"),
            transfer.ec_role,
            config.endpoint,
            "attached" if there else "not there yet",
            keys.digest,
        )

    def _open_scheduler(
        self, config: configs.ConnectorConfig, keys: Keys, place: Place
    ) -> LoopLink:
        link = LoopLink(config.endpoint, self._counts, name=place.name)
        flights = Flights(link, config.peer_wait, self._counts, keeps_claims=self.is_producer)
        encodable = encodable_here(self._vllm_config)
        orders = None
        if encodable is not None:
            orders = Orders(link, name_of(self._vllm_config), place.ranks, encodable)
        self._scheduler = SchedulerSide(
            link,
            keys,
            flights,
            self._counts,
            loads=self.is_consumer,
            saves=self.is_producer,
            ranks=place.ranks,
            orders=orders,
        )
        return link

    def _open_worker(self, config: configs.ConnectorConfig, keys: Keys, place: Place) -> ThreadLink:
        link = ThreadLink(config.endpoint, self._counts, device=place.device, name=place.name)
        saves = self.is_producer and place.saves and not self._passive
        copies = None
        if place.rank < place.ranks and encodable_here(self._vllm_config) is not None:
            copies = Copies(link, name_of(self._vllm_config), place.rank)
        self._worker = WorkerSide(
            link,
            keys,
            self._counts,
            saver=Saver(link, self._counts, config.save_queue) if saves else None,
            agree=agree_on_loads if place.ranks > 1 else None,
            copies=copies,
        )
        return link

    def shutdown(self) -> None:
        """Save what is queued, end leases and claims, and close the connection. Idempotent."""
        scheduler, self._scheduler = self._scheduler, None
        worker, self._worker = self._worker, None
        for side in (scheduler, worker):
            if side is not None:
                side.close()

    # --- the worker's -------------------------------------------------------------------------------

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **_: Any) -> None:
        """Load what the step needs and the pool has, in the order of the current stream."""
        step = self._connector_metadata
        if self._worker is not None and isinstance(step, StepMetadata):
            self._worker.load(encoder_cache, step)

    def start_save_caches(self, **kwargs: Any) -> None:
        """Save again what the encoder cache has and the pool has lost."""
        step, encoder_cache = self._connector_metadata, kwargs.get("encoder_cache")
        if self._worker is not None and isinstance(step, StepMetadata) and encoder_cache:
            self._worker.save_again(encoder_cache, step)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **_: Any) -> None:
        """Queue one encoder output to be saved; waits for nothing."""
        if self._worker is not None:
            self._worker.save(encoder_cache, mm_hash)

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        """Return what the scheduler is told: loads that ended, saves that were made or dropped."""
        return None if self._worker is None else self._worker.tells()

    # --- the scheduler's ----------------------------------------------------------------------------

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an encoder output is in the pool: a look in shared memory. False without an owner."""
        return self._scheduler is not None and not self._passive and self._scheduler.has(identifier)

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """Whether a request can be planned: False while another engine encodes one of its inputs."""
        if self._scheduler is None or self._passive:
            return True
        return self._scheduler.is_ready(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """Take note that an input is loaded or encoded by the step that is planned now."""
        if self._scheduler is not None and not self._passive:
            self._scheduler.allocated(request, index)

    def update_state_after_free(self, request: Any, index: int) -> None:
        """Take note that an input is no longer kept for a request in vLLM's encoder cache."""
        if self._scheduler is not None:
            self._scheduler.freed(request, index)

    def build_connector_meta(self, scheduler_output: Any) -> ECConnectorMetadata:
        """Return what the workers are to load in this step."""
        return (
            StepMetadata() if self._scheduler is None else self._scheduler.built(scheduler_output)
        )

    def update_connector_output(self, connector_output: Any) -> None:
        """Take what the workers tell: leases and claims end."""
        if self._scheduler is not None:
            self._scheduler.told(connector_output)

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """Forget what a request waited for. Nothing of it is kept for a transfer."""
        if self._scheduler is not None:
            self._scheduler.finished(request)
        return False, None

    def take_unavailable_requests(self) -> set[str]:
        """Return requests with an input that is not in the pool, and not here to be encoded."""
        return set() if self._scheduler is None else self._scheduler.take_unavailable()

    # --- statistics -----------------------------------------------------------------------------------

    def get_ec_connector_stats(self) -> FeatcacheStats | None:
        """Return the counts since the last call, or None if there are none."""
        counts = self._counts.take()
        return FeatcacheStats(counts) if counts else None

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> FeatcacheStats:
        """Return statistics from their bare counts."""
        return FeatcacheStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> FeatcachePromMetrics:
        """Return the counters that vLLM exposes with its own."""
        return FeatcachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
