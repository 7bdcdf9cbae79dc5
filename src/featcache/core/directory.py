"""The directory: which slot is kept under which key, its pins, and whether it is evictable.

In which order evictable slots go is not decided here but in `core.recency`.
"""

from collections.abc import Iterator, Mapping

from featcache.core.recency import Recency
from featcache.core.slots import Slot, SlotState

# Members of an enum are slow to look up, and this one is looked up at every hit.
_PUBLISHED = SlotState.PUBLISHED


def _extent_bytes(slot: Slot) -> int:
    assert slot.extent is not None, "only FREE slots have no extent"
    return slot.extent.size_bytes


class Directory:
    """Slots by key, and their pins. The byte counts are kept as they change."""

    def __init__(self, recency: Recency) -> None:
        self._recency = recency
        self._slots: dict[bytes, Slot] = {}
        self._pins: dict[bytes, dict[int, int]] = {}
        """By key: how often each session pinned it."""
        self.resident_bytes = 0
        """Extents that are kept under a key."""
        self.pinned_bytes = 0
        self.idle_bytes = 0
        """Extents of evictable slots."""

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def find(self, key: bytes) -> Slot | None:
        """Return the slot that is kept under a key. Not a use of it."""
        return self._slots.get(key)

    def keep(self, key: bytes, slot: Slot, now_s: float) -> Slot | None:
        """Keep a slot under a key; return the slot that it replaces, if any. The key's pins stay."""
        old = self._slots.get(key)
        if old is not None:
            self._leave(old)
        self._slots[key] = slot
        slot.key, slot.hits = key, 0
        size_bytes = _extent_bytes(slot)
        self.resident_bytes += size_bytes
        if key in self._pins:
            self.pinned_bytes += size_bytes
        # Ranked before it is listed: `refresh` may add it, and an entry holds the rank of that moment.
        self._recency.enter(slot, now_s)
        self.refresh(slot)
        return old

    def drop(self, slot: Slot) -> None:
        """Drop a slot's key, and the pins with it."""
        assert slot.key is not None, "it is kept under a key"
        key = slot.key
        self._leave(slot)
        del self._slots[key]
        self._pins.pop(key, None)

    def _leave(self, slot: Slot) -> None:
        size_bytes = _extent_bytes(slot)
        self.resident_bytes -= size_bytes
        if slot.key in self._pins:
            self.pinned_bytes -= size_bytes
        slot.key = None
        self.refresh(slot)

    def refresh(self, slot: Slot) -> None:
        """Update `slot.idle`: due after each change of what it depends on."""
        idle = (
            slot.key is not None
            and not slot.grants
            and not slot.reads_left
            and slot.state is _PUBLISHED
            and slot.key not in self._pins
        )
        if idle is slot.idle:
            return
        slot.idle, extent = idle, slot.extent
        assert extent is not None, "only FREE slots have no extent"
        if not idle:
            self.idle_bytes -= extent.size_bytes
            return
        self.idle_bytes += extent.size_bytes
        if not slot.listed:
            self._recency.add(slot)

    # --- pins -------------------------------------------------------------------------------------

    def pin(self, key: bytes, session: int) -> None:
        """Make the slot under a key not evictable until each pin was taken back."""
        slot = self._slots[key]
        if key not in self._pins:
            self.pinned_bytes += _extent_bytes(slot)
        pins = self._pins.setdefault(key, {})
        pins[session] = pins.get(session, 0) + 1
        self.refresh(slot)

    def unpin(self, key: bytes, session: int) -> None:
        """Take back one pin: of this session, else of the session that pinned first. None is no error."""
        pins = self._pins.get(key)
        if pins is None:
            return
        pinner = session if session in pins else next(iter(pins))
        pins[pinner] -= 1
        if not pins[pinner]:
            self.unpin_session(key, pinner)

    def pinned_by(self, session: int) -> list[bytes]:
        """Return the keys that a session has pinned. For its end, not for hot paths."""
        return [key for key, pins in self._pins.items() if session in pins]

    def unpin_all(self, session: int) -> None:
        for key in self.pinned_by(session):
            self.unpin_session(key, session)

    def unpin_session(self, key: bytes, session: int) -> None:
        """Take back all pins of a key that a session has. None is no error."""
        pins = self._pins.get(key, {})
        if pins.pop(session, None) is None:
            return
        if not pins:
            del self._pins[key]
            slot = self._slots[key]
            self.pinned_bytes -= _extent_bytes(slot)
            self.refresh(slot)

    @property
    def pins(self) -> Mapping[bytes, Mapping[int, int]]:
        """How often each session pinned a key, by key."""
        return self._pins

    def is_pinned(self, key: bytes) -> bool:
        return key in self._pins

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._slots)
