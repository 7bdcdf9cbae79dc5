"""Lookups in the key table by a session itself: a hit sends nothing and wakes nobody."""

from collections.abc import Callable
from typing import Final

import torch

from featcache.errors import GetTimeout, MalformedRef
from featcache.memory.key_table import ABSENT, SLOT_BITS, SLOT_MASK, UNKNOWN, KeyTable
from featcache.ref import FeatureRef
from featcache.session.arguments import not_found
from featcache.session.attachment import Attachment
from featcache.session.lease import KeyLease
from featcache.session.leased_reads import NO_ENTRY

_TRIES: Final = 8
_MAX_KNOWN: Final = 1 << 16


class KeyHits:
    """The key table of one attached pool. Safe in any thread."""

    def __init__(self, attachment: Attachment, table: KeyTable) -> None:
        self._attachment = attachment
        self._place_of: Callable[[bytes], int] = table.find
        self._record: Callable[[int], bytes] = table.record
        self._known: dict[int, FeatureRef] = {}
        """Refs by slot, decoded from its record and found sound."""

    def find(self, key: bytes, device: torch.device | None) -> KeyLease | int:
        """Return a read of the feature under a key; ABSENT if there is none, UNKNOWN if the owner is to say.

        The owner is to say what the table, the records or the session's entries have no room for, and
        what this device can't reach.

        Raises:
            OwnerLost, CacheClosed, BackendUnavailable: nothing may begin any more.

        """
        attachment = self._attachment
        attachment.check()
        if not attachment.mapping.can_copy_to(device):
            return UNKNOWN
        tries = _TRIES
        while True:
            place = self._place_of(key)
            if place <= ABSENT:
                return place
            index, serial = attachment.begin_lease(place)
            if index >= 0:
                break
            tries -= 1
            if index == NO_ENTRY or not tries:
                return UNKNOWN
            # Revoked: the owner changed the table before it cleared `live`, so look again.
        ref = self._known.get(place & SLOT_MASK)
        if ref is None or ref.generation != place >> SLOT_BITS:
            ref = self._read(place, index, serial)
            if ref is None:
                return UNKNOWN
        return KeyLease(attachment, ref, index, serial, attachment.end_lease)

    def find_now(self, key: bytes, device: torch.device | None) -> KeyLease:
        """As `find`, for a caller that does not ask the owner.

        Raises:
            KeyNotFound: there is none; GetTimeout: the owner is to say.

        """
        found = self.find(key, device)
        if type(found) is KeyLease:
            return found
        if found == ABSENT:
            self._attachment.count_miss()
            raise not_found(key)
        raise GetTimeout("the owner must be asked for what is under this key: await get instead")

    def contains(self, key: bytes) -> bool | None:
        """Whether a feature is kept under a key; None if the owner is to say."""
        self._attachment.check()
        place = self._place_of(key)
        return None if place == UNKNOWN else place != ABSENT

    def _read(self, place: int, index: int, serial: int) -> FeatureRef | None:
        """Read the ref of a leased slot from its record; None, with the lease ended, if it has none."""
        attachment, slot = self._attachment, place & SLOT_MASK
        ref = None
        try:
            data = self._record(slot)
            if data:
                found = FeatureRef.from_bytes(data)
                attachment.check_leased_ref(found)
                if (found.slot, found.generation) != (slot, place >> SLOT_BITS):
                    raise MalformedRef("a slot's record is of another: the owner is at fault")
                ref = found
        finally:
            if ref is None:
                attachment.take_back_lease(index, serial)
        if ref is None:
            return None
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[slot] = ref
        return ref

    def forget(self) -> None:
        """Drop the owner's block in a forked child."""
        self._place_of, self._record = _unknown, _no_record
        self._known.clear()


def _unknown(_: bytes) -> int:
    return UNKNOWN


def _no_record(_: int) -> bytes:
    return b""
