"""Lookups in the key table by a session itself: a hit sends nothing and wakes nobody."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

import torch

from featcache.control.turns import BYTES_SHIFT
from featcache.errors import GetTimeout, KeyNotFound, MalformedRef
from featcache.memory.key_table import ABSENT, SLOT_BITS, SLOT_MASK, UNKNOWN, KeyTable
from featcache.ref import FeatureRef
from featcache.session.arguments import key_bytes, not_found
from featcache.session.attachment import Attachment
from featcache.session.lease import KeyLease
from featcache.session.leased_reads import NO_ENTRY

if TYPE_CHECKING:
    from featcache.session.reader import Reader

_TRIES: Final = 8
_MAX_KNOWN: Final = 1 << 16
_MAX_FOUND: Final = 1 << 14
_MAX_FOUND_KEY: Final = 128
"""Longer keys, in characters or bytes, are digested anew each time."""
_Found: TypeAlias = tuple[int, int, FeatureRef | None]
"""Of a key: the word of the table that had its place, the place, and the ref, once it was read."""
_NOWHERE: _Found = (0, UNKNOWN, None)  # no word is that


class KeyHits:
    """The key table of one attached pool. Safe in any thread."""

    def __init__(self, attachment: Attachment, table: KeyTable) -> None:
        self._attachment = attachment
        self._entry: Callable[[bytes], tuple[int, int]] = table.entry
        self._words = table.words
        self._record: Callable[[int], bytes] = table.record
        self._known: dict[int, FeatureRef] = {}
        """Refs by slot, decoded from its record and found sound."""
        self._found: dict[str | bytes, _Found] = {}
        """Where keys were found: a key whose place is there still needs neither digest nor search."""

    def fetch(
        self, key: str | bytes, device: torch.device | None, reader: "Reader", *, in_loop: bool
    ) -> torch.Tensor | KeyLease | int:
        """Copy the feature under a key, here and now; ABSENT, UNKNOWN as `find`.

        A lease instead if its bytes are yet to come, a copy would hold up the loop that this is called
        in, or there are several tensors: the caller reads it. Raises as `find`, and what a copy raises.
        """
        word, place, ref = self._found.get(key, _NOWHERE)
        attachment = self._attachment
        mapping = attachment.mapping
        if self._words[word] != place or ref is None or not mapping.can_copy_to(device):
            lease = self.find(key, device)
            if type(lease) is not KeyLease:
                return lease
            ref, index, serial = lease.ref, lease.index, lease.serial
        else:
            index, serial = attachment.begin_lease(place)
            if index < 0:
                return self.find(key, device)
        blocking_bytes, spec, order = 0, ref.specs[0], None
        if in_loop:
            blocking_bytes = mapping.blocking_read_bytes(ref.nbytes, device)
        if (
            blocking_bytes > reader.inline_bytes
            or spec.name is not None
            or not attachment.is_ready(ref)
        ):
            return KeyLease(attachment, ref, index, serial, attachment.end_lease)
        try:
            order = mapping.order(device)
            feature = mapping.fetch(ref.offset_bytes, spec, device, order)
        finally:
            attachment.end_lease(index, serial, order, None)
        if in_loop:
            reader.turn.left -= blocking_bytes >> BYTES_SHIFT
        reader.gets += 1
        return feature

    def find(
        self, key: str | bytes, device: torch.device | None, *, copies: bool = True
    ) -> KeyLease | int:
        """Return a read of the feature under a key; ABSENT if there is none, UNKNOWN if the owner is to say.

        The owner is to say what the table, the records or the session's entries have no room for, and
        what this device can't reach.

        Raises:
            OwnerLost, CacheClosed, BackendUnavailable: nothing may begin any more.

        """
        attachment = self._attachment
        attachment.check()
        if copies and not attachment.mapping.can_copy_to(device):
            return UNKNOWN
        word, place, ref = self._found.get(key, _NOWHERE)
        if ref is not None and self._words[word] == place:
            index, serial = attachment.begin_lease(place)
            if index >= 0:
                return KeyLease(attachment, ref, index, serial, attachment.end_lease)
        tries, digested = _TRIES, key_bytes(key)
        while True:
            place, word = self._entry(digested)
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
        self._remember(key, (word, place, ref))
        return KeyLease(attachment, ref, index, serial, attachment.end_lease)

    def _remember(self, key: str | bytes, found: _Found) -> None:
        if len(key) <= _MAX_FOUND_KEY:
            if len(self._found) >= _MAX_FOUND:
                self._found.clear()
            self._found[key] = found

    def find_now(self, key: str | bytes, device: torch.device | None) -> KeyLease:
        """As `find`, for a caller that does not ask the owner.

        Raises:
            KeyNotFound: there is none; GetTimeout: the owner is to say.

        """
        found = self.find(key, device)
        if type(found) is KeyLease:
            return found
        if found == ABSENT:
            raise self.missed(key)
        raise GetTimeout("the owner must be asked for what is under this key: await get instead")

    def missed(self, key: str | bytes) -> KeyNotFound:
        """Count a miss; return its error."""
        self._attachment.count_miss()
        return not_found(key_bytes(key))

    def contains(self, key: str | bytes) -> bool | None:
        """Whether a feature is kept under a key; None if the owner is to say."""
        self._attachment.check()
        word, place, _ = self._found.get(key, _NOWHERE)
        if self._words[word] == place:
            return True
        place, word = self._entry(key_bytes(key))
        if place <= ABSENT:
            return None if place == UNKNOWN else False
        self._remember(key, (word, place, None))
        return True

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
        self._entry, self._record = _unknown, _no_record
        self._words = memoryview(bytes(8)).cast("Q")
        self._known.clear()
        self._found.clear()


def _unknown(_: bytes) -> tuple[int, int]:
    return UNKNOWN, 0


def _no_record(_: int) -> bytes:
    return b""
