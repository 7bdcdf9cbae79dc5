"""A store that tells of each feature that is published and each extent that is recycled.

A plain store tells nobody and has no call for it: `observe` gives a store that lives this class, and
`unobserve` its own again.
"""

from collections.abc import Iterable
from typing import Protocol

from featcache.core.effects import Effect
from featcache.core.keyed_store import KeyedStore
from featcache.core.slots import Slot


class StoreObserver(Protocol):
    """What is called, at each decision: it must return at once."""

    def published(self, nbytes: int) -> None:
        """Note a feature of so many bytes that was published, by whichever process."""

    def released(self, age_s: float) -> None:
        """Note how old a ref was as its room was taken back: nothing owed, kept or read it any more."""


class ObservedStore(KeyedStore):
    """A store with an observer."""

    observer: StoreObserver

    def publish(self, slot: Slot, now_s: float) -> list[Effect]:
        """Make a slot readable; its age counts from now."""
        self.observer.published(slot.nbytes)
        return super().publish(slot, now_s)

    def recycle(self, slots: Iterable[Slot], now_s: float) -> list[Effect]:
        """Free the extents of retired slots that no session holds, and serve the queue."""
        slots = list(slots)
        released = self.observer.released
        for slot in slots:
            released(now_s - slot.born_s)
        return super().recycle(slots, now_s)


def observe(store: KeyedStore, observer: StoreObserver) -> None:
    """Tell `observer` from now on, in the store's loop."""
    store.__class__ = ObservedStore
    assert isinstance(store, ObservedStore), "it was made one"
    store.observer = observer


def unobserve(store: KeyedStore) -> None:
    """Tell nobody any more."""
    if isinstance(store, ObservedStore):
        del store.observer
        store.__class__ = KeyedStore
