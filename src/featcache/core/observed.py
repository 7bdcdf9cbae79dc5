"""A store that tells of each feature that is published and each extent that is recycled.

A plain store tells nobody and has no call for it: `observe` gives a store that lives this class, and
`unobserve` its own again.
"""

from collections.abc import Iterable
from typing import Final, Protocol

from featcache.core.effects import Effect
from featcache.core.keyed_store import KeyedStore
from featcache.core.slots import Slot

_publish: Final = KeyedStore.publish


class StoreObserver(Protocol):
    """What counts, at each decision."""

    published_bytes: int
    """Grows by each feature that is published, by whichever process."""

    def released(self, ages_s: list[float]) -> None:
        """Note how old refs were as their room was taken back: nothing owed, kept or read them any more."""


class ObservedStore(KeyedStore):
    """A store with an observer."""

    observer: StoreObserver

    def publish(self, slot: Slot, now_s: float) -> list[Effect]:
        """Make a slot readable; its age counts from now."""
        self.observer.published_bytes += slot.nbytes
        return _publish(self, slot, now_s)

    def recycle(self, slots: Iterable[Slot], now_s: float) -> list[Effect]:
        """Free the extents of retired slots that no session holds, and serve the queue."""
        slots = list(slots)
        self.observer.released([now_s - slot.born_s for slot in slots])
        return super().recycle(slots, now_s)


def observe(store: KeyedStore, observer: StoreObserver) -> None:
    """Tell `observer` from now on, in the store's loop. Any thread."""
    vars(store)["observer"] = observer  # first: the loop may be at it
    store.__class__ = ObservedStore


def unobserve(store: KeyedStore) -> None:
    """Tell nobody any more. Any thread: a call in progress has its observer to its end."""
    store.__class__ = KeyedStore
