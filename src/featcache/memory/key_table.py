"""The key table in the owner's block: which slot is kept under which key, for sessions to look up.

A set of the table is 32 words: a count of changes, a count of keys that did not fit, and ten entries of
three words each, a digest (two words) and a *place*, which is 0 in a free entry. A key belongs to the set
that its digest names, and nothing ever moves. The owner alone writes; a reader is never made to wait,
however the owner stopped:

| the owner | in this order |
| --- | --- |
| keeps a key that has an entry | place |
| keeps a key in a free entry | digest, changes + 1, place |
| drops a key | place = 0 |
| keeps, drops one that does not fit | left out + 1, left out - 1 |
| drops a key, if the table is left open | digest = 0, changes + 1, place = 0 |

A reader takes the count of changes, finds the digest, takes its place, and takes the count again. If the
count is the same, no entry of the set got another digest and a place with it meanwhile, so the place was
the key's. (Counted before the digest is written, a reader that begins between the two could take the
old digest with the new place. A processor weaker than x86 may also load the place before the digest that
leads to it, and so take the place of the entry's last key with the digest of its next: there the changes
are counted before the digest is written as well.) A key that is neither in its set nor counted as left
out is kept nowhere. A table that is left open, as keys may come from elsewhere, counts one more in each set.

Behind the table each slot has a record: the wire form of its ref, written before the slot is made live.
A place names a generation of a slot, and while `live` is that generation its record is as it was
written.
"""

import secrets
import struct
from hashlib import blake2b
from typing import Final

from featcache.memory.words import (
    KEY_SET_BYTES,
    RECORD_BYTES,
    TSO,
    Header,
    OwnerWords,
    fence_loads,
    fence_stores,
    key_sets,
    key_table_start_bytes,
)

SLOT_BITS: Final = 20
SLOT_MASK: Final = (1 << SLOT_BITS) - 1
"""The bits of a place that are the slot's index; the others are its generation."""
ABSENT: Final = 0
"""In the place of a place: the key is kept nowhere."""
UNKNOWN: Final = -1
"""The table can't tell: ask the owner."""
_WORD_BYTES: Final = 8
_HEAD_BYTES: Final = 2 * _WORD_BYTES
_ENTRY_BYTES: Final = 3 * _WORD_BYTES
_PLACES: Final = tuple(4 + 3 * way for way in range((KEY_SET_BYTES - _HEAD_BYTES) // _ENTRY_BYTES))
"""Where in a set, in words, the places of its entries are."""
_SET_WORDS: Final = KEY_SET_BYTES // _WORD_BYTES
_TRIES: Final = 8
_DIGEST_BYTES: Final = 16
_SECRET_WORDS: Final = 4
_words_of: Final = struct.Struct("=QQ").unpack


def place_of(index: int, generation: int) -> int:
    """Return a slot's generation as one word: 44 bits of it last for 10^13 puts into one slot."""
    return index | generation << SLOT_BITS


class KeyTable:
    """The table and the records as any process reads them. Safe in any thread."""

    def __init__(self, words: OwnerWords) -> None:
        self._words = self.words = words.whole
        self._mapping = words.mapping
        self._find = words.mapping.find
        sets = key_sets(words.slots)
        self._start_bytes = key_table_start_bytes(words.slots)
        self._mask = sets - 1
        self._records_bytes = self._start_bytes + sets * KEY_SET_BYTES
        secret = words.header[Header.SECRET : Header.SECRET + _SECRET_WORDS].tobytes()
        # Keys come from outside: with a digest under a secret of the pool nobody can make two that are
        # alike, nor many that belong to one set.
        self._keyed = blake2b(digest_size=_DIGEST_BYTES, key=secret).copy

    def digest(self, key: bytes) -> bytes:
        """Return a key's digest, 16 bytes."""
        state = self._keyed()
        state.update(key)
        return state.digest()

    def find(self, key: bytes) -> int:
        """Return the place of a key, ABSENT, or UNKNOWN."""
        return self.entry(key)[0]

    def entry(self, key: bytes) -> tuple[int, int]:
        """Return the place of a key, ABSENT, or UNKNOWN; and the index of the word that has a place.

        While that word is still that place, it is still the key's: a generation of a slot is kept under
        one key, once, so no other entry's word ever has it. Whoever remembers the two need look no further.
        """
        state = self._keyed()
        state.update(key)
        digest = state.digest()
        words, start = (
            self._words,
            self._start_bytes + KEY_SET_BYTES * (_words_of(digest)[0] & self._mask),
        )
        at = start >> 3
        for _ in range(_TRIES):
            changes = words[at]
            if not TSO:
                fence_loads()
            found = self._find(digest, start + _HEAD_BYTES, start + KEY_SET_BYTES)
            if found < 0:
                place, word = UNKNOWN if words[at + 1] else ABSENT, 0
            elif (found - start - _HEAD_BYTES) % _ENTRY_BYTES:
                return UNKNOWN, 0  # across words: no digest of ours is there
            else:
                word = (found >> 3) + 2
                place = words[word]
            if not TSO:
                fence_loads()
            if words[at] == changes:
                return place, word
        return UNKNOWN, 0

    def record(self, index: int) -> bytes:
        """Return a slot's record; nothing if it did not fit. To be called while the slot is leased."""
        at = self._records_bytes + index * RECORD_BYTES
        size_bytes = self._words[at >> 3]
        if size_bytes > RECORD_BYTES - _WORD_BYTES:
            return b""
        return self._mapping[at + _WORD_BYTES : at + _WORD_BYTES + size_bytes]


class OwnKeyTable(KeyTable):
    """The table as its owner writes it, in the loop."""

    def __init__(self, words: OwnerWords) -> None:
        """Begin with an empty table, under a new secret."""
        at = Header.SECRET * _WORD_BYTES
        words.mapping[at : at + _SECRET_WORDS * _WORD_BYTES] = secrets.token_bytes(
            _SECRET_WORDS * _WORD_BYTES
        )
        super().__init__(words)
        self._is_open = False
        self._kept: dict[bytes, int] = {}
        """By key, the word of its place; of one that did not fit, minus its set's first word."""

    def keep(self, key: bytes, index: int, generation: int) -> None:
        """Keep a slot, which is live, under a key, in the place of the one that was there."""
        words, place = self._words, index | generation << SLOT_BITS  # as `place_of`, inline
        if not TSO:
            fence_stores()  # the slot's words before the place that leads to them
        word = self._kept.get(key)
        if word is not None:
            if word > 0:
                words[word] = place
            return
        state = self._keyed()
        state.update(key)
        low, high = _words_of(state.digest())
        at = self._start_bytes + KEY_SET_BYTES * (low & self._mask) >> 3
        for way in _PLACES:
            word = at + way
            if not words[word]:
                break
        else:
            self._kept[key] = -at
            words[at + 1] = words[at + 1] + 1
            return
        # The order on which readers rely: see the module's text.
        if not TSO:
            words[at] = words[at] + 1
            fence_stores()
        words[word - 2], words[word - 1] = low, high
        if not TSO:
            fence_stores()
        words[at] = words[at] + 1
        if not TSO:
            fence_stores()
        words[word] = place
        self._kept[key] = word

    def leave_open(self) -> None:
        """Say of no key any more that it is not there, as of a set without room: the owner is to say."""
        words, first, last = self._words, self._start_bytes >> 3, self._records_bytes >> 3
        self._is_open = True
        for left_out in range(first + 1, last, _SET_WORDS):
            words[left_out] += 1

    def drop(self, key: bytes) -> None:
        """Drop a key. One that is not there is no error."""
        word = self._kept.pop(key, 0)
        if word > 0:
            if self._is_open:
                self._clear_digest(word)
            self._words[word] = 0
        elif word:
            left_out = 1 - word
            self._words[left_out] = self._words[left_out] - 1

    def _clear_digest(self, word: int) -> None:
        """Have no reader find a key any more that is dropped: one that does takes it for absent."""
        words, first = self._words, self._start_bytes >> 3
        at = word - (word - first) % _SET_WORDS
        if not TSO:
            words[at] = words[at] + 1
            fence_stores()
        words[word - 2] = words[word - 1] = 0
        if not TSO:
            fence_stores()
        words[at] = words[at] + 1
        if not TSO:
            fence_stores()

    def write_record(self, index: int, data: bytes) -> None:
        """Write the record of a slot that is not live; one that does not fit is left empty."""
        at = self._records_bytes + index * RECORD_BYTES
        size_bytes = len(data)
        if size_bytes > RECORD_BYTES - _WORD_BYTES:
            self._words[at >> 3] = 0
            return
        self._words[at >> 3] = size_bytes
        self._mapping[at + _WORD_BYTES : at + _WORD_BYTES + size_bytes] = data
