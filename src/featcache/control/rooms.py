"""The messages of room that is given ahead: see `control.messages`."""

from typing import Annotated, Final

import msgspec

from featcache.control.wire import Key, Name, Natural, Seconds, Specs

MAX_ROOMS: Final = 64
"""Rooms ahead that one message can carry."""


class PutTerms(msgspec.Struct, frozen=True, array_like=True):
    """How a feature is to be kept that fills room given ahead: what a `Reserve` says otherwise."""

    nbytes: Natural
    readers: Natural | Annotated[list[Name], msgspec.Meta(min_length=1)]
    ttl_s: Seconds | None
    key: Key | None = None


class PublishUnkeyed(msgspec.Struct, tag="publish_unkeyed", frozen=True):
    """Client: as `Publish`, of what is kept under no key. It has no answer: the ref is good already."""

    slot: Natural
    generation: Natural
    specs: Specs
    terms: PutTerms | None = None


class Room(msgspec.Struct, frozen=True, array_like=True):
    """A slot that the client may claim for one of its next puts; the owner may take it back until then."""

    slot: Natural
    generation: Natural
    offset_bytes: Natural
    nbytes: Natural


RoomList = Annotated[tuple[Room, ...], msgspec.Meta(max_length=MAX_ROOMS)]


class Rooms(msgspec.Struct, tag="rooms", frozen=True):
    """Owner: slots for the next puts, unasked."""

    rooms: RoomList
