"""A read granted by key (a lease), in the place of a ref's attachment; and the claim to make a key."""

from collections.abc import Callable, Iterable

from featcache.memory.slab import Mapping, Order
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment


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


class KeyLease:
    """One grant of one session. The last use that ends pays it, whether or not it read anything.

    The owner keeps the bytes until then, so no `held` word is written and only `published` is looked
    at. Its calls are those of an `Attachment` for one ref, which is always the lease's own.
    """

    __slots__ = ("_behind", "_index", "_serial", "_uses", "attachment", "ref")

    def __init__(self, attachment: Attachment, ref: FeatureRef, index: int, serial: int) -> None:
        self.attachment = attachment
        self.ref = ref
        self._index = index
        self._serial = serial
        self._uses = 1
        self._behind: list[Order] = []
        attachment.take_lease(index, serial)

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
                self._behind.append(order)
            return
        self.attachment.pay_lease(self._index, self._serial, order, self._behind)

    def return_lease(self) -> None:
        """End the one use of a lease that reads nothing."""
        self.unpin(self.ref, pays=False)
