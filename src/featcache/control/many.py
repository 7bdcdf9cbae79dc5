"""Messages of many members: one frame where there would be one for each."""

from typing import Annotated, Final

import msgspec

from featcache.control.wire import Key, Natural, Numbered, Ref

MAX_KEYS: Final = 256
"""Keys of one message: so many are looked up in a millisecond."""
Keys = Annotated[list[Key], msgspec.Meta(min_length=1, max_length=MAX_KEYS)]


class FindMany(Numbered, tag="find_many", frozen=True):
    """Client: grant a read of each of these keys that is there. Answered by `GrantedMany` or `Reply`."""

    keys: Keys
    answer_bytes: Natural
    """How long the answer may be: if all do not fit, it is of the first so many."""


class ContainsMany(Numbered, tag="contains_many", frozen=True):
    """Client: which of these keys are there. Answered by `Contained`."""

    keys: Keys


class GrantedMany(msgspec.Struct, tag="granted_many", frozen=True):
    """Owner: for each of the first keys of a `FindMany` a read as in `Granted`; None if it is not there."""

    request: Natural
    found: Annotated[
        list[tuple[Natural, Natural, Ref] | None],
        msgspec.Meta(min_length=1, max_length=MAX_KEYS),
    ]


class Contained(msgspec.Struct, tag="contained", frozen=True):
    """Owner: whether each of these keys is there."""

    request: Natural
    flags: list[bool]
