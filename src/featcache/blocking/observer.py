"""An observer for code that has no event loop."""

from types import TracebackType
from typing import NoReturn, Self

from featcache.api.arguments import no_pickle
from featcache.api.observer import Observer as AsyncObserver
from featcache.api.observer import observe as _observe
from featcache.blocking.portal import Portal
from featcache.control.observing import Order
from featcache.observation import KeysPage, SlabMap, Snapshot
from featcache.settings import Settings


class Observer:
    """`featcache.Observer` with plain calls. Safe in any thread."""

    def __init__(self, inner: AsyncObserver) -> None:
        self._portal: Portal[AsyncObserver] = Portal(inner)

    def open(self) -> Self:
        """Attach; ``with`` does. Raises as the async form."""
        self._portal.open()
        return self

    def close(self) -> None:
        """Detach; ``with`` does. Idempotent."""
        self._portal.close()

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and not closed, in this process."""
        return self._portal.inner.is_open

    @property
    def endpoint(self) -> str:
        """The owner's endpoint."""
        return self._portal.inner.endpoint

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        no_pickle(self)

    def __repr__(self) -> str:
        return repr(self._portal)

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
