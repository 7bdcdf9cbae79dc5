"""Messages of a client about refs of other hosts, which its owner reaches for it."""

from typing import Literal

from featcache.control.wire import Lane, Numbered
from featcache.control.wire import Ref as _Ref


class Bring(Numbered, tag="bring", frozen=True):
    """Client: fetch another host's feature. Answered by `Reply` with a ref of this pool."""

    ref: _Ref
    lane = Lane.FAR


class EndFar(Numbered, tag="end_far", frozen=True, rename={"command": "what"}):
    """Client: pay this session's read of another host's ref, or discard it.

    Answered by `Reply`; of a release, with the ref that stands for it here, if there is one to be paid.
    """

    ref: _Ref
    command: Literal["release", "discard"]
