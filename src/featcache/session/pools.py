"""What a `Reader` reads from."""

from collections.abc import Awaitable
from typing import Literal, Protocol

from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment
from featcache.session.copier import Device


class Pools(Protocol):
    """The attachments that a `Reader` reads from, by the pool of a ref."""

    def peek(self, ref: FeatureRef) -> Attachment | None:
        """Return it if it is open. Raise UnknownPool if it can never be."""

    def has(self, ref: FeatureRef) -> bool:
        """Return whether it is open, changing nothing: called in any thread."""

    def check(self, ref: FeatureRef) -> None:
        """Raise OwnerLost if it was open and its owner is gone."""

    def open(self, ref: FeatureRef) -> Awaitable[Attachment]:
        """Return it, attaching first."""

    def reach(self, attachment: Attachment, device: Device) -> Awaitable[bool]:
        """Enable a device of this process for the pool; False where only host memory leads there."""

    def relay(self, ref: FeatureRef) -> Awaitable[FeatureRef]:
        """Have the owner copy a pinned ref's bytes into host memory; return the copy's ref."""

    def is_far(self, ref: FeatureRef) -> bool:
        """Whether it is of another host, and `bring` can fetch it."""

    def bring(self, ref: FeatureRef) -> Awaitable[FeatureRef]:
        """Fetch another host's feature; return a ref here that owes this session's read."""

    def end_far(self, ref: FeatureRef, command: Literal["release"]) -> Awaitable[FeatureRef | None]:
        """Pay another host's read; or return the ref here that stands for it."""

    def pay_copy(self, copied: FeatureRef) -> None:
        """Pay the one read that a copy of `relay` owes, since nobody is going to get it."""
