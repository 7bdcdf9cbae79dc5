"""prometheus_client's multi-process mode: each process writes its figures to a file of its own.

A scrape reaches one of a server's processes and is answered for all, from the files in
``PROMETHEUS_MULTIPROC_DIR``. So each process writes its figures there once a second, when it is
scraped itself, and as it ends: nothing is written on the path of a put or a get.
"""

import atexit
import contextlib
import math
import os
import threading
import time
from typing import Any, Final

from prometheus_client import values
from prometheus_client.utils import floatToGoString

from featcache.integrations.metrics import table
from featcache.integrations.metrics.peers import PEER_LABELS, PEERS, PeerLabels, PeerMetric
from featcache.integrations.metrics.sources import Histogram, Labels, Series, Sources
from featcache.integrations.metrics.table import COUNTERS, GAUGES, HISTOGRAMS

INTERVAL_S: Final = 1.0
_GAUGE_MODE: Final = "livemostrecent"
"""All processes tell the same gauges of a pool: the latest counts, of those that live."""


def is_on() -> bool:
    """Whether prometheus_client was imported in multi-process mode."""
    return bool(getattr(values.ValueClass, "_multiprocess", False))


class Files:
    """This process's figures in its files, and the thread that writes them while there are any."""

    def __init__(self) -> None:
        self.sources = Sources()
        self._values: dict[tuple[str, str, Labels | PeerLabels, str], Any] = {}
        self._peers: dict[str, set[PeerLabels]] = {}
        """The series of other hosts that were written."""
        self.forget()
        os.register_at_fork(after_in_child=self.forget)
        atexit.register(self.write)

    def forget(self) -> None:
        """Begin anew in a forked child, which has files of its own and no thread yet."""
        self._values.clear()
        self._peers.clear()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ends = threading.Event()

    def start(self) -> None:
        """Write from now on, once a second."""
        with self._lock:
            if self._thread is None:
                self._ends = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._ends,), name="featcache-metrics", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """Write no more by itself, once nothing is registered."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._ends.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self, ends: threading.Event) -> None:
        while not ends.wait(INTERVAL_S):
            self.write()
            if not len(self.sources):
                with self._lock:
                    if not len(self.sources) and self._ends is ends:
                        self._thread = None
                        return

    def write(self) -> None:
        """Write all figures now. A disk that is full, or a folder that is gone, costs the figures only."""
        with contextlib.suppress(OSError), self._lock:
            self._write(self.sources.read(keeps=True))

    def _write(self, series: Series) -> None:
        now_s = time.time()
        for gauge in GAUGES:
            name = gauge.name
            for labels, value in series.gauges[name].items():
                self._value("gauge", name, name, labels, gauge.help).set(value, now_s)
        for counter in COUNTERS:
            name = counter.name
            for labels, value in series.counters[name].items():
                self._value("counter", name, f"{name}_total", labels, counter.help).set(value)
        for row in HISTOGRAMS:
            for labels, histogram in series.histograms[row.name].items():
                self._write_histogram(row, labels, histogram)
        for peer in PEERS:
            self._write_peers(peer, series.peers[peer.name], now_s)

    def _write_peers(self, row: PeerMetric, figures: dict[PeerLabels, float], now_s: float) -> None:
        """Write the figures of other hosts; gauges of those without a record any more are no number."""
        sample = row.name if row.kind == "gauge" else f"{row.name}_total"
        written = self._peers.setdefault(row.name, set())
        for labels, value in figures.items():
            when = (now_s,) if row.kind == "gauge" else ()
            self._value(row.kind, row.name, sample, labels, row.help).set(value, *when)
            written.add(labels)
        for labels in written - set(figures) if row.kind == "gauge" else ():
            self._value(row.kind, row.name, sample, labels, row.help).set(math.nan, now_s)
            written.discard(labels)

    def _write_histogram(self, row: table.Histogram, labels: Labels, histogram: Histogram) -> None:
        name, bounds = row.name, [*map(floatToGoString, row.bounds_s), "+Inf"]
        self._value("histogram", name, f"{name}_sum", labels, row.help).set(histogram.total)
        for bound, count in zip(bounds, histogram.counts, strict=True):
            bucket = self._value("histogram", name, f"{name}_bucket", labels, row.help, bound)
            bucket.set(count)  # not cumulated: whoever merges the files does that

    def _value(
        self,
        kind: str,
        metric: str,
        sample: str,
        labels: Labels | PeerLabels,
        text: str,
        bound: str = "",
    ) -> Any:
        found = self._values.get((kind, sample, labels, bound))
        if found is None:
            names: tuple[str, ...] = PEER_LABELS[: len(labels)]
            names = (*names, "le") if bound else names
            told = (*labels, bound) if bound else labels
            found = self._values[kind, sample, labels, bound] = values.ValueClass(
                kind, metric, sample, names, told, text, multiprocess_mode=_GAUGE_MODE
            )
        return found
