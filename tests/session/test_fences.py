"""On a processor weaker than x86: the fences between the words of a hit, a put and an eviction.

Argued where the words are: `memory/key_table.py`, `session/leased_reads.py`, `pool/collector.py`. A program
that takes this processor for such a one says what it does, with the kernel's own barrier tried first.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FENCES = {"fence_stores", "fence_loads", "fence_full", "fence_after_lock"}


@pytest.fixture(scope="module")
def told() -> dict[str, list[str]]:
    """What was done, in its order, by what was asked for."""
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "session.weak_order"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        timeout=50,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def between(order: list[str], first: str, then: str) -> set[str]:
    """The fences between the last `first` and the `then` that follows it."""
    at = len(order) - 1 - order[::-1].index(first)
    return FENCES.intersection(order[at : at + order[at:].index(then)])


def test_a_hit_is_fenced(told: dict[str, list[str]]) -> None:
    hit = told["hit"]
    end = hit.index("store lease")
    # Changes, what is found, changes again.
    assert hit[:end] == [
        *("load table", "fence_loads", "load table", "fence_loads", "load table"),
    ]
    assert between(hit, "store lease", "store serial") == {"fence_stores"}
    assert between(hit, "store serial", "load live") == {"fence_after_lock"}


def test_a_put_under_a_key_is_fenced(told: dict[str, list[str]]) -> None:
    put = told["put"]
    assert between(put, "store record", "store live") == {"fence_stores"}
    assert between(put, "store extent", "store live") == {"fence_stores"}
    entry = put[put.index("store live") + 1 :]
    # Changes, the digest's two words, changes again, the place.
    assert [each for each in entry if each != "load table"] == [
        *("fence_stores", "store table", "fence_stores", "store table", "store table"),
        *("fence_stores", "store table", "fence_stores", "store table"),
    ]


@pytest.mark.parametrize("by", ["overwrite", "evict"])
def test_leases_are_looked_at_behind_a_full_fence(by: str, told: dict[str, list[str]]) -> None:
    order = told[by]
    assert between(order, "store live", "load leases") == {"fence_full"}
    last_of_table = len(order) - 1 - order[::-1].index("store table")
    assert "store live" in order[last_of_table:], "what is revoked is out of the table before"
