"""Image features by key under a Zipf trace: as many hits as a cache by hand that knows no fragments.

The sizes are those of Qwen2-VL's image features: a photo is scaled to at most 1280 tokens, one for each
28 x 28 pixels, of a bf16 row each. Rows are of 64 numbers here instead of 1536, so that a trace is quick;
the capacity and every size are as much smaller, so the hits are those of the real sizes.

The cache by hand drops the longest unused until what comes fits, and counts bytes only. The slab rounds
sizes up to 256 bytes, and what comes needs one piece of it. So where all sizes are one the two are equal
to the last hit. Where they are not, the slab evicts what frees one piece rather than all that is colder:
of 48 traces like these it came out from 0.3 points under the cache by hand to 1.6 points over, 0.5 over in
the mean. Half a point under is the bound, since one trace has only so many hits to tell by.
"""

import bisect
import itertools
import math
import random
from collections import OrderedDict
from typing import Final

import pytest
import torch

from featcache import FeatureCache
from support.caches import KIB, MIB, tensor
from support.keyed import User, nothing_lost, party, pool_of

ROW: Final = 64
PHOTOS: Final = [
    *((224, 224), (336, 336), (448, 448), (512, 512), (1024, 1024)),
    *((640, 480), (480, 640), (800, 600), (1024, 768), (768, 1024), (1280, 960), (1600, 1200)),
    *((1280, 720), (1920, 1080), (1080, 1920), (1080, 1350)),
]
"""Widths and heights of thumbnails, screens, cameras and phones."""
MOST_TOKENS: Final = 1280
POINT: Final = 0.01


def tokens(width: int, height: int) -> int:
    """Tokens of a photo, as Qwen2-VL's processor resizes it."""
    columns, rows = max(1, round(width / 28)), max(1, round(height / 28))
    if columns * rows > MOST_TOKENS:
        scale = math.sqrt(width * height / (MOST_TOKENS * 28 * 28))
        columns, rows = math.floor(width / scale / 28), math.floor(height / scale / 28)
    return columns * rows


def zipf(rng: random.Random, keys: int, count: int, exponent: float) -> list[int]:
    """Which keys are asked for, one after the other."""
    weights = list(itertools.accumulate(1 / rank**exponent for rank in range(1, keys + 1)))
    return [bisect.bisect_left(weights, rng.random() * weights[-1]) for _ in range(count)]


class ByHand:
    """A byte LRU with no fragments."""

    def __init__(self, capacity_bytes: int) -> None:
        self._free_bytes = capacity_bytes
        self.kept: OrderedDict[int, int] = OrderedDict()
        self.hits = 0

    def ask(self, key: int, nbytes: int) -> None:
        if key in self.kept:
            self.kept.move_to_end(key)
            self.hits += 1
            return
        while self._free_bytes < nbytes:
            self._free_bytes += self.kept.popitem(last=False)[1]
        self.kept[key] = nbytes
        self._free_bytes -= nbytes


async def run(users: list[User], trace: list[int], rows: list[int]) -> None:
    """Ask for everything in turn, each from another process of those that share the slab."""
    made = torch.empty(max(rows), ROW, dtype=torch.bfloat16)
    for user, key in zip(itertools.cycle(users), trace, strict=False):
        count = rows[key]
        found = tensor(await user.get_or_put(f"{key}", lambda: made[:count]))  # noqa: B023 - called here
        assert found.shape == (count, ROW)


def hit_rate(owner: FeatureCache, count: int) -> float:
    now = owner.statistics()
    assert now.hits + now.misses == count
    assert now.waited == 0, "a put evicts before it waits"
    return now.hits / count


TRACES: Final = {
    # keys, times that one is asked for, exponent, capacity
    "steep": (600, 4000, 1.1, 4 * MIB),
    "middling": (400, 3000, 1.0, 4 * MIB),
    "flat": (600, 4000, 0.8, 8 * MIB),
    "small slab": (400, 3000, 0.9, 2 * MIB),
}


@pytest.mark.parametrize("name", TRACES)
async def test_hits_beside_an_ideal_lru(name: str) -> None:
    keys, count, exponent, capacity = TRACES[name]
    rng = random.Random(0)
    rows = [tokens(*rng.choice(PHOTOS)) for _ in range(keys)]
    trace = zipf(rng, keys, count, exponent)
    by_hand = ByHand(capacity)
    for key in trace:
        by_hand.ask(key, rows[key] * ROW * 2)
    assert sum(rows) * ROW * 2 > 4 * capacity, "by far not everything fits"
    async with party(2, capacity=capacity, initial=capacity, slots=2048) as (
        owner,
        clients,
    ):
        await run([owner, *clients], trace, rows)
        found, ideal = hit_rate(owner, count), by_hand.hits / count
        resident = owner.statistics().resident_bytes / capacity
        said = f"{found:.2%} hits, ideally {ideal:.2%}; {resident:.1%} resident"
        assert -POINT / 2 < found - ideal < 2 * POINT, said
        assert resident > 0.9, said
        await nothing_lost(owner)


async def test_features_of_one_size_are_hit_as_by_the_ideal_lru_itself() -> None:
    """As where every image is scaled to the same size: equal to the last hit."""
    rng = random.Random(1)
    rows, capacity = [256] * 300, 64 * 256 * ROW * 2
    trace = zipf(rng, 300, 3000, 0.9)
    by_hand = ByHand(capacity)
    for key in trace:
        by_hand.ask(key, 256 * ROW * 2)
    async with party(2, capacity=capacity, segment=32 * KIB, slots=512) as (owner, clients):
        await run([owner, *clients], trace, rows)
        assert owner.statistics().hits == by_hand.hits
        kept = {int(key) for key in pool_of(owner).store.directory}
        assert kept == set(by_hand.kept)
        assert owner.statistics().resident_bytes == owner.statistics().used_bytes == capacity
        await nothing_lost(owner)


async def test_hits_of_a_slab_that_evicts_before_it_grows() -> None:
    """It stays as small as the features allow; the hits are those of a slab of that size."""
    rng = random.Random(2)
    rows, size = [256] * 100, 256 * ROW * 2
    trace = zipf(rng, 100, 1000, 1.0)
    by_hand = ByHand(16 * size)
    for key in trace:
        by_hand.ask(key, size)
    sizes = {"capacity": 64 * size, "segment": 16 * size, "when_full": "evict"}
    async with party(2, **sizes) as (owner, clients):
        await run([owner, *clients], trace, rows)
        assert owner.statistics().committed_bytes == 16 * size
        assert owner.statistics().hits == by_hand.hits
        await nothing_lost(owner)
