"""An observer for code that has no event loop."""

from featcache.api.observer import Observer as AsyncObserver
from featcache.api.observer import observe as _observe
from featcache.blocking.life import BlockingLife
from featcache.control.observing import Order
from featcache.observation import KeysPage, SlabMap, Snapshot
from featcache.settings import Settings


class Observer(BlockingLife[AsyncObserver]):
    """`featcache.Observer` with plain calls. Safe in any thread."""

    @property
    def endpoint(self) -> str:
        """The owner's endpoint."""
        return self._portal.inner.endpoint

    def snapshot(self) -> Snapshot:
        """Return the pool as it is now, as `featcache.Observer.snapshot`."""
        return self._portal.call(self._portal.inner.snapshot)

    def keys(
        self, order: Order = "size", *, after: str | None = None, limit: int = 100
    ) -> KeysPage:
        """Return a page of the keys, as `featcache.Observer.keys`."""
        return self._portal.call(lambda: self._portal.inner.keys(order, after=after, limit=limit))

    def map(self, cells: int = 1024) -> SlabMap:
        """Return the slab by offset, as `featcache.Observer.map`."""
        return self._portal.call(lambda: self._portal.inner.map(cells))

    def evict(self, key: str | bytes) -> bool:
        """Drop a key, as `featcache.Observer.evict`."""
        return self._portal.call(lambda: self._portal.inner.evict(key))


def observe(
    endpoint: str,
    *,
    name: str | None = None,
    timeout: float | None = None,
    settings: Settings | None = None,
) -> Observer:
    """Return an observer to be opened with ``with``; the arguments of `featcache.observe`."""
    return Observer(_observe(endpoint, name=name, timeout=timeout, settings=settings))
