"""What the scheduler's connector tells the workers' with each step, and they tell it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorMetadata,
    ECConnectorWorkerMetadata,
)


@dataclass(frozen=True)
class Load:
    """One encoder output that a step needs, and that was in the pool when the step was planned."""

    identifier: str
    key: str
    request: str
    """The id of the request that it was allocated for, and which of its inputs it is."""
    index: int
    rows: int | None
    """Embeddings that the request expects, if it says."""


@dataclass
class StepMetadata(ECConnectorMetadata):
    """Scheduler to workers, of one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[str] = field(default_factory=list)
    """Identifiers that a worker may have from earlier steps, and the pool has not."""
    encodes: dict[str, list[int]] | None = None
    """The step's own ``scheduled_encoder_inputs``, the same object on both sides of a pickle: what can't
    be loaded is added to it before the encoder runs, so the step encodes it."""


@dataclass
class WorkerMetadata(ECConnectorWorkerMetadata):
    """Workers to scheduler, of one step."""

    loaded: Counter[str] = field(default_factory=Counter)
    """By identifier, the ranks whose load has ended, well or not: the scheduler's lease can end."""
    saved: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Identifiers that were to be saved, and are not."""
    counts: dict[str, float] = field(default_factory=dict)
    """Statistics that vLLM's runner did not ask the worker for itself."""

    def aggregate(self, other: ECConnectorWorkerMetadata) -> "WorkerMetadata":
        """Return what both ranks tell together."""
        assert isinstance(other, WorkerMetadata)
        counts = dict(self.counts)
        for name, value in other.counts.items():
            counts[name] = counts.get(name, 0) + value
        return WorkerMetadata(
            self.loaded + other.loaded,
            self.saved + other.saved,
            self.dropped + other.dropped,
            counts,
        )


def rows_of(request: Any, index: int) -> int | None:
    """Return how many embeddings a request expects of one of its inputs, if it says."""
    rows = getattr(request, "get_num_encoder_embeds", lambda _: None)(index)
    return rows if isinstance(rows, int) else None
