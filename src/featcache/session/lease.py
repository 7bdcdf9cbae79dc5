"""A read by key (a lease), in the place of a ref's attachment; and the claim to make a key."""

from collections.abc import Callable, Iterable
from typing import TypeAlias, final

import torch

from featcache.errors import GetTimeout
from featcache.memory.slab import Mapping, Order
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment

End: TypeAlias = Callable[[int, int, Order, list[Order] | None], None]
"""Ends a read by its index and serial, behind the order of its last use and those of others."""


class MakeClaim:
    """The right and duty to make a key's feature; `end` releases it, and must be called."""

    __slots__ = ("end",)

    def __init__(self, end: Callable[[], None]) -> None:
        self.end = end


def return_all(leases: "Iterable[KeyLease | None]") -> None:
    """End the leases that read nothing."""
    for lease in leases:
        if lease is not None:
            lease.return_lease()


@final
class KeyLease:
    """One read by key of one session: a lease entry that it took, or a grant of the owner's.

    The last use that ends it calls `end`, whether or not it read anything.

    The owner keeps the bytes until then, so no `held` word is written and only `published` is looked
    at. Its calls are those of an `Attachment` for one ref, which is always the lease's own.
    """

    __slots__ = ("_behind", "_end", "_uses", "attachment", "index", "ref", "serial")

    def __init__(
        self, attachment: Attachment, ref: FeatureRef, index: int, serial: int, end: End
    ) -> None:
        self.attachment = attachment
        self.ref = ref
        self.index = index
        self.serial = serial
        self._uses = 1
        self._behind: list[Order] | None = None
        self._end = end

    @classmethod
    def granted(
        cls, attachment: Attachment, ref: FeatureRef, index: int, serial: int
    ) -> "KeyLease":
        """Take a read that the owner granted."""
        attachment.take_grant(index, serial)
        return cls(attachment, ref, index, serial, attachment.pay_grant)

    @property
    def mapping(self) -> Mapping:
        """The pool's mapping."""
        return self.attachment.mapping

    def pin(self, ref: FeatureRef) -> bool:
        """Begin another use (it is made with one); return whether the bytes are there."""
        self._uses += 1
        return self.attachment.is_ready(ref)

    def unpin(self, ref: FeatureRef, *, pays: bool, order: Order = None) -> None:  # noqa: ARG002 - as the attachment's
        """End one use, which is done behind `order` if it `pays`. As `Attachment.unpin`."""
        self._uses -= 1
        if self._uses:
            if pays:
                self._behind = [*(self._behind or ()), order]
            return
        self._end(self.index, self.serial, order, self._behind)

    def check_at_hand(self, device: torch.device | None) -> None:
        """End it, and raise GetTimeout, unless its bytes are there now for this device."""
        attachment, there = self.attachment, False
        try:
            there = attachment.is_ready(self.ref) or attachment.follow_write(self.ref, device)
        finally:
            if not there:
                self.return_lease()
        if not there:
            raise GetTimeout("the bytes are still on their way: await them instead")

    def return_lease(self) -> None:
        """End the one use of a lease that reads nothing."""
        self.unpin(self.ref, pays=False)
