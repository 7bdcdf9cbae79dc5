"""Messages of many members: one frame where there would be one for each."""

from typing import Annotated, Final

import msgspec

from featcache.control.wire import Key, Lane, Name, Natural, Numbered, Ref, Seconds
from featcache.ref import TensorSpec

MAX_PUBLISHED: Final = 128
"""Slots of one message that are published: so many take a millisecond where each replaces another."""
MAX_SLOTS: Final = 1024
"""Slots of one batch."""
Specs = Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=4096)]

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


class ReserveMany(Numbered, tag="reserve_many", frozen=True):
    """Client: reserve the slots of a batch, all or none. Answered by `ReservedMany` or `Reply`.

    Their keys come with `PublishMany`: they may be longer than one message takes.
    """

    sizes: Annotated[list[Natural], msgspec.Meta(min_length=1, max_length=MAX_SLOTS)]
    counts: Annotated[list[Natural], msgspec.Meta(max_length=MAX_SLOTS)]
    """How many reads each owes, if not by `names`."""
    names: list[Name]
    """Of the readers that owe one of each."""
    ttl_s: Seconds | None
    waits: bool
    timeout_s: Seconds | None = None
    """As of `Reserve`, as the others are."""
    lane = Lane.ROOM


class PublishMany(Numbered, tag="publish_many", frozen=True):
    """Client: as `Publish`, of these reserved slots, each to be kept under its key. Answered by `Reply`."""

    members: Annotated[
        list[tuple[Natural, Natural, Specs, Key | None]],
        msgspec.Meta(min_length=1, max_length=MAX_PUBLISHED),
    ]
    lane = None  # as `Publish`


class ReservedMany(msgspec.Struct, tag="reserved_many", frozen=True):
    """Owner: as `Reserved`, slot, generation and offset of each."""

    request: Natural
    slots: list[tuple[Natural, Natural, Natural]]


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
