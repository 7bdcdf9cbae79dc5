"""The eviction order: which evictable slot goes first. The seam, and the policies behind it.

`Recency` in `core.recency.policy` is the seam, with the calls that a policy serves; `LazyHeap` in
`core.recency.lazy_heap` is what both policies here share, `Lru` and `Sieve` their order.
"""

from typing import Final

from featcache.core.recency.lazy_heap import LazyHeap
from featcache.core.recency.lru import Lru
from featcache.core.recency.policy import Held, LatestUse, LatestUses, Recency, never_used
from featcache.core.recency.sieve import Sieve

__all__ = ["POLICIES", "Held", "LatestUse", "LatestUses", "Lru", "Recency", "Sieve", "never_used"]

POLICIES: Final[dict[str, type[LazyHeap]]] = {"lru": Lru, "sieve": Sieve}
"""By the name that `Settings.eviction` has for it. Called as ``policy(latest_use, latest_uses)``."""
