"""A worker's half: loads on the step's stream, saves beside it, and a way back where a load fails."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from featcache import FeatcacheError, KeyNotFound, StaleRef
from featcache.integrations.vllm.ahead import Copies
from featcache.integrations.vllm.counts import Counts
from featcache.integrations.vllm.features import bytes_of, fits, unpacked
from featcache.integrations.vllm.keys import Keys
from featcache.integrations.vllm.link import ThreadLink
from featcache.integrations.vllm.metadata import Load, StepMetadata, WorkerMetadata
from featcache.integrations.vllm.outages import logger
from featcache.integrations.vllm.saver import Saver

_AT_ONCE: Final = 64
"""Loads of one call."""
_LOAD_S: Final = 1.0
"""How long a step waits at most for bytes that another engine's stream has yet to bring, or the owner."""

Agree = Callable[[list[bool]], list[bool]]
"""Returns which loads went well on every rank. All ranks call it, with the same number of loads."""


class WorkerSide:
    """What a `FeatcacheECConnector` of the role WORKER does."""

    def __init__(
        self,
        link: ThreadLink,
        keys: Keys,
        counts: Counts,
        *,
        saver: Saver | None,
        agree: Agree | None,
        copies: Copies | None = None,
    ) -> None:
        self._link, self._keys, self._counts = link, keys, counts
        self._saver = saver
        """None of a rank that does not save."""
        self._agree = agree
        """None where there is one rank."""
        self._copies = copies
        """What was copied before its step was planned; None where every input can be encoded here."""
        self._ended: Counter[str] = Counter()

    def load(self, encoder_cache: dict[str, Any], step: StepMetadata) -> None:
        """Load a step's features into vLLM's encoder cache; have the step encode what can't be."""
        if not step.loads:
            return
        began_s = time.perf_counter()
        loads = step.loads
        missing = [load for load in loads if load.identifier not in encoder_cache]
        try:
            loaded = self._loaded(missing, checks=step.encodes is not None)
        except Exception:  # noqa: BLE001 - whatever it is, the other ranks wait for this one
            logger.exception("featcache: %d loads failed: encoded instead", len(missing))
            loaded = {}
        well = [load.identifier in encoder_cache or load.identifier in loaded for load in loads]
        # The encoder runs on all ranks together: what one has not, all encode.
        if self._agree is not None:
            well = self._agree(well)
        for load, there in zip(loads, well, strict=True):
            self._ended[load.identifier] += 1
            if there:
                if load.identifier in loaded:
                    encoder_cache[load.identifier] = loaded[load.identifier]
            else:
                encoder_cache.pop(load.identifier, None)
                self._encode(step, load)
        if loaded:
            self._counts.add("loads", len(loaded))
            self._counts.add("load_bytes", sum(map(bytes_of, loaded.values())))
            self._counts.add("load_seconds", time.perf_counter() - began_s)

    def _loaded(self, loads: list[Load], *, checks: bool) -> dict[str, Any]:
        """Return what could be loaded, by identifier; if it `checks`, only what fits its request."""
        found: dict[str, Any] = {}
        if self._copies is not None:
            for load in loads:
                output = self._copies.take(load.identifier)
                if output is not None and (not checks or fits(output, load.rows)):
                    found[load.identifier] = output
            loads = [load for load in loads if load.identifier not in found]
        for first in range(0, len(loads), _AT_ONCE):
            some = loads[first : first + _AT_ONCE]
            while some and (client := self._link.client) is not None:
                try:
                    # A look first: a timeout waits for keys that are gone, too.
                    some = [load for load in some if client.contains_nowait(load.key) is not False]
                    features = client.get_many([load.key for load in some], timeout=_LOAD_S)
                except FeatcacheError as error:
                    some = _without(some, error)
                    continue
                for load, feature in zip(some, features, strict=True):
                    output = unpacked(feature)
                    if not checks or fits(output, load.rows):
                        found[load.identifier] = output
                break
        return found

    def _encode(self, step: StepMetadata, load: Load) -> None:
        """Have the step that is about to run encode an input that was planned to be loaded."""
        self._counts.add("reencoded")
        if step.encodes is None:
            logger.error(
                "featcache: the encoder output %s is gone, and the step can't be told",
                load.identifier,
            )
            return
        inputs = step.encodes.setdefault(load.request, [])
        if load.index not in inputs:
            inputs.append(load.index)

    def save(self, encoder_cache: dict[str, Any], identifier: str) -> None:
        """Have what was encoded just now saved, beside the steps."""
        output, key = encoder_cache.get(identifier), self._keys.key(identifier)
        if self._saver is not None and key is not None and output is not None:
            self._saver.offer(identifier, key, output)

    def save_again(self, encoder_cache: dict[str, Any], step: StepMetadata) -> None:
        """Save what is in the encoder cache since earlier steps, and in the pool no more."""
        for identifier in step.saves:
            if identifier in encoder_cache:
                self.save(encoder_cache, identifier)

    def tells(self) -> WorkerMetadata | None:
        """Return what the scheduler is told since the last step."""
        ended, counts = self._ended, self._counts.take()
        saved, dropped = ([], []) if self._saver is None else self._saver.take_ended()
        if not (ended or saved or dropped or counts):  # at most steps
            return None
        self._ended = Counter()
        return WorkerMetadata(ended, saved, dropped, counts)

    def close(self) -> None:
        """Save what is queued, and end the threads and the connection."""
        if self._saver is not None:
            self._saver.close()
        if self._copies is not None:
            self._copies.close()
        self._link.close()
        if self._copies is not None:
            self._copies.join()


def _without(loads: list[Load], error: FeatcacheError) -> list[Load]:
    """Return the loads without the one that an error is of; none if it is of all."""
    member = error.member
    if member is None or not isinstance(error, KeyNotFound | StaleRef):
        return []
    return [load for at, load in enumerate(loads) if at != member]
