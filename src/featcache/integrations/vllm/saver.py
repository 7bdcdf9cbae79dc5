"""Saves encoder outputs beside the steps: a bounded queue, and one thread that puts."""

import queue
import threading
from typing import Any, Final, NamedTuple

import torch

from featcache import FeatcacheError, blocking
from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.features import bytes_of, packed, tensors_of
from featcache.integrations.vllm.link import ThreadLink
from featcache.integrations.vllm.outages import logger

_CLOSE_S: Final = 5.0


class _Save(NamedTuple):
    identifier: str
    key: str
    output: Any
    ready: torch.cuda.Event | None
    """After the encoder, on the stream of the step; None of an output in host memory."""


class Saver:
    """The queue and the thread. What does not fit the queue or the pool is not saved, and counted."""

    def __init__(self, link: ThreadLink, counts: Counts, most: int) -> None:
        self._link, self._counts = link, counts
        self._queue: queue.Queue[_Save | None] = queue.Queue(most)
        self._ended = queue.SimpleQueue[tuple[str, bool]]()
        self._stream: torch.cuda.Stream | None = None
        self._thread = threading.Thread(target=self._run, name="featcache-saver", daemon=True)
        self._thread.start()

    def offer(self, identifier: str, key: str, output: Any) -> None:
        """Queue an output that is complete in the order of the current stream. Does not wait."""
        if self._link.client is None:
            self._drop(identifier)
            return
        ready = None
        device = tensors_of(output)[0].device
        if device.type == "cuda":
            ready = torch.cuda.current_stream(device).record_event()
        try:
            self._queue.put_nowait(_Save(identifier, key, output, ready))
        except queue.Full:
            self._drop(identifier)

    def take_ended(self) -> tuple[list[str], list[str]]:
        """Return the identifiers that were saved, and those that were not, since the last call."""
        saved: list[str] = []
        dropped: list[str] = []
        while not self._ended.empty():  # this thread alone takes
            identifier, well = self._ended.get_nowait()
            (saved if well else dropped).append(identifier)
        return saved, dropped

    def close(self) -> None:
        """Save what is queued, within a bound, and end the thread."""
        try:
            self._queue.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return  # a daemon
        self._thread.join(_CLOSE_S)

    def _drop(self, identifier: str) -> None:
        self._counts.add("saves_dropped")
        self._ended.put((identifier, False))

    def _run(self) -> None:
        while (save := self._queue.get()) is not None:
            try:
                self._save(save)
            except Exception:  # noqa: BLE001 - the thread goes on, whatever one output has
                logger.exception("featcache: the encoder output %s was not saved", save.identifier)
                self._drop(save.identifier)

    def _save(self, save: _Save) -> None:
        client = self._link.client
        try:
            if client is None:
                self._drop(save.identifier)
            elif client.contains_nowait(save.key):
                self._counts.add("saves_skipped")
                self._ended.put((save.identifier, True))
            else:
                self._put(client, save)
                self._counts.add("saves")
                self._counts.add("save_bytes", bytes_of(save.output))
                self._ended.put((save.identifier, True))
        except FeatcacheError:  # full, too large for it, or the owner is gone
            self._drop(save.identifier)

    def _put(self, client: blocking.FeatureClient, save: _Save) -> None:
        feature = packed(save.output)
        if save.ready is None:
            client.put(feature, key=save.key, on_full="raise")
            return
        tensors = tensors_of(save.output)
        if self._stream is None:
            # First: a new thread's current GPU is the first one, and the way back out of a stream's block
            # would open a context of half a GiB there.
            torch.cuda.set_device(tensors[0].device)
            self._stream = torch.cuda.Stream(tensors[0].device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(save.ready)
            for tensor in tensors:  # the step's allocator may not reuse it before the copy
                tensor.record_stream(self._stream)
            client.put(feature, key=save.key, on_full="raise")
