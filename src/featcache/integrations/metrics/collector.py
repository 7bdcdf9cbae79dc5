"""The collector: the figures of a registry's sources in the words of prometheus_client."""

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from featcache.integrations.metrics.peers import PEER_LABELS, PEERS, PeerMetric
from featcache.integrations.metrics.sources import Sources
from featcache.integrations.metrics.table import COUNTERS, GAUGES, HISTOGRAMS, LABELS


class CacheCollector(Collector):
    """Reads the sources at each scrape, in the thread that scrapes."""

    def __init__(self) -> None:
        self.sources = Sources()

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples: a registry looks for names that are taken."""
        yield from (GaugeMetricFamily(row.name, row.help, labels=LABELS) for row in GAUGES)
        yield from (CounterMetricFamily(row.name, row.help, labels=LABELS) for row in COUNTERS)
        yield from (HistogramMetricFamily(row.name, row.help, labels=LABELS) for row in HISTOGRAMS)
        yield from map(_family, PEERS)

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now."""
        series = self.sources.read()
        for gauge in GAUGES:
            gauges = GaugeMetricFamily(gauge.name, gauge.help, labels=LABELS)
            for labels, value in series.gauges[gauge.name].items():
                gauges.add_metric(labels, value)
            yield gauges
        for counter in COUNTERS:
            counts = CounterMetricFamily(counter.name, counter.help, labels=LABELS)
            for labels, value in series.counters[counter.name].items():
                counts.add_metric(labels, value)
            yield counts
        for row in HISTOGRAMS:
            histograms = HistogramMetricFamily(row.name, row.help, labels=LABELS)
            bounds = [*map(floatToGoString, row.bounds_s), "+Inf"]
            for labels, histogram in series.histograms[row.name].items():
                buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
                histograms.add_metric(labels, buckets, histogram.total)
            yield histograms
        for peer in PEERS:
            figures = series.peers[peer.name]
            if figures:  # without other hosts there is nothing to tell
                family = _family(peer)
                for labels_of_peer, value in figures.items():
                    family.add_metric(labels_of_peer, value)
                yield family


def _family(row: PeerMetric) -> GaugeMetricFamily | CounterMetricFamily:
    kind = GaugeMetricFamily if row.kind == "gauge" else CounterMetricFamily
    return kind(row.name, row.help, labels=PEER_LABELS)
