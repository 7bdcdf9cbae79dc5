"""A pool's tier: off unless one is given, and then in no call's way but those that evict or miss."""

from featcache.owner.demotions import Demotions
from featcache.owner.promotions import Promotions
from featcache.owner.served_pool import ServedPool, take_each
from featcache.owner.tier_calls import TierCalls
from featcache.tier import Tier


class LowerTier:
    """The tier below one pool: what goes there, what comes from there, and its calls."""

    def __init__(self, served: ServedPool, tier: Tier) -> None:
        self._served = served
        self._calls = TierCalls(tier, served.pool)
        self._demotions = Demotions(served.pool, self._calls)
        self._promotions = Promotions(served, self._demotions, self._calls)
        self._closed = False

    async def open(self) -> None:
        """Offer it what is evicted, and ask it for what is missed, from now on."""
        await self._served.pool.offload.run(self._demotions.staging.warm)
        self._served.pool.store.demotes = self._demotions.take
        self._served.lookups.forget_below = self._demotions.forget
        self._served.sources.add(self._promotions)

    def counts(self) -> dict[str, int]:
        """Return its counters, by their names in `Statistics`."""
        return {
            "demoted": self._demotions.demoted,
            "demotions_dropped": self._demotions.dropped,
            "promoted": self._promotions.promoted,
            "tier_failures": self._calls.failures,
        }

    async def close(self) -> None:
        """End it before the pool: what is on its way there has `Settings.tier_timeout` to arrive."""
        if self._closed:
            return
        self._closed = True
        await take_each(self._served.sources.close, self._demotions.close, self._calls.close)

    def forget(self) -> None:
        """Take it out of a forked child's pool."""
        self._served.pool.store.demotes = None
