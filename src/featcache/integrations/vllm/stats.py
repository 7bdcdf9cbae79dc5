"""The connector's statistics in vLLM's own form: its log line, and its Prometheus counters."""

from typing import Any

from prometheus_client import Counter
from vllm.distributed.ec_transfer.ec_connector.metrics import (
    ECConnectorPromMetrics,
    ECConnectorStats,
)

from featcache.integrations.vllm.counts import COUNTERS


class FeatcacheStats(ECConnectorStats):
    """Counts of one interval, by the names of `COUNTERS`."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Begin a new interval."""
        self.data = {}

    def aggregate(self, other: ECConnectorStats) -> "FeatcacheStats":
        """Add another's counts to these."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what the log line tells: counts, and the rate of loads."""
        told: dict[str, int | float] = {
            name: round(value, 4) for name, value in self.data.items() if value
        }
        seconds = self.data.get("load_seconds", 0)
        if seconds:
            told["load_mb_per_s"] = round(self.data.get("load_bytes", 0) / 1e6 / seconds, 1)
        return told

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class FeatcachePromMetrics(ECConnectorPromMetrics):
    """One counter ``vllm:ec_featcache_…_total`` for each of `COUNTERS`, by engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[Counter]
        self._counters: dict[int, dict[str, Any]] = {
            engine: {} for engine in per_engine_labelvalues
        }
        for name, meaning in COUNTERS.items():
            counter = make(
                name=f"vllm:ec_featcache_{name}", documentation=meaning, labelnames=labelnames
            )
            for engine, values in per_engine_labelvalues.items():
                self._counters[engine][name] = counter.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count an interval's counts."""
        counters = self._counters.get(engine_idx, {})
        for name, value in transfer_stats_data.items():
            if value and name in counters:
                counters[name].inc(value)
