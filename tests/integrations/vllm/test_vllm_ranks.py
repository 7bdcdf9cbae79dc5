"""A tensor-parallel engine whose scheduler and ranks are processes of their own, as `vllm serve` has them."""

import os
import signal
from pathlib import Path

import pytest

from featcache import blocking
from integrations.vllm.fleet import Engines, fresh, kept, right, until
from integrations.vllm.owners import Owner

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.timeout(400)


def sessions(endpoint: Path, engine: str) -> int:
    """Count the sessions of an engine's processes: its scheduler's, and one of each rank."""
    with blocking.observe(str(endpoint)) as observer:
        return sum(
            (one.name or "").startswith(f"vllm-{engine}-") for one in observer.snapshot().sessions
        )


def test_both_ranks_load_what_another_engine_encoded(
    engines: Engines, owner: Owner, endpoint: Path
) -> None:
    ranks = engines["ranks"]
    until(lambda: sessions(endpoint, "ranks") == 3)
    seeds = fresh(4)
    engines["producer"].ask(*seeds)
    until(kept(endpoint, 4))
    before = ranks.call("metrics")
    assert right(engines, seeds, ranks.ask(*seeds))
    found = ranks.call("metrics")
    grown = {name: found[name] - before[name] for name in found}
    assert (grown["hits"], grown["loads"], grown["reencoded"]) == (4, 8, 0)
    with blocking.connect(str(endpoint)) as client:
        until(lambda: client.statistics().oldest_unpaid_s == 0)


def test_ranks_encode_together_what_is_nowhere(engines: Engines, owner: Owner) -> None:
    ranks, seeds = engines["ranks"], fresh(2)
    assert right(engines, seeds, ranks.ask(*seeds))


def test_an_owner_that_dies_under_load_costs_the_ranks_hits_alone(
    engines: Engines, owner: Owner, endpoint: Path
) -> None:
    ranks, seeds = engines["ranks"], fresh(8)
    engines["producer"].ask(*seeds)
    until(kept(endpoint, 8))
    ranks.begin("ask", seeds, 8)
    owner.kill()
    assert right(engines, seeds, ranks.result())


def test_a_killed_rank_ends_its_engine_alone(
    engines: Engines, owner: Owner, endpoint: Path
) -> None:
    """The last of these tests: vLLM ends an engine of which a rank died."""
    ranks = engines["ranks"]
    until(lambda: sessions(endpoint, "ranks") == 3)
    os.kill(ranks.call("ranks")[-1], signal.SIGKILL)
    with pytest.raises(AssertionError, match="Engine"):
        ranks.ask(*fresh(1))
    until(lambda: sessions(endpoint, "ranks") == 0)
    seeds = fresh(2)
    engines["producer"].ask(*seeds)
    until(kept(endpoint, 2))
    assert right(engines, seeds, engines["second"].ask(*seeds))
