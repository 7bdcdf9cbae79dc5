"""What the messages are made of: the types of their fields, and what all requests have in common."""

import enum
from typing import Annotated, ClassVar

import msgspec

from featcache.ref import TensorSpec
from featcache.settings import MAX_KEY_BYTES

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
PoolId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Handle = Annotated[bytes, msgspec.Meta(max_length=64)]
Ref = Annotated[bytes, msgspec.Meta(max_length=64 << 10)]
Key = Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_KEY_BYTES)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
MessageBytes = Annotated[int, msgspec.Meta(ge=1024)]
Specs = Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=4096)]


class Lane(enum.Enum):
    """The lanes in which requests wait while too many of their kind are unanswered.

    They are apart so that no request queues behind those that wait for its effect: a `Publish` ends the
    wait of a `Find`, reads through the host end that of a `Reserve` or an `Upload`.
    """

    FIND = "find"
    ROOM = "room"
    COPY = "copy"
    FAR = "far"
    OTHER = "other"


class Numbered(msgspec.Struct, frozen=True):
    """A request: answered exactly once, under its number."""

    request: Natural
    lane: ClassVar[Lane | None] = Lane.OTHER
    """None for a request that never waits: others wait for its effect."""
    copies: ClassVar[bool] = False
    """Whether the owner serves it through its pool in host memory; those have a bound of their own."""
