"""A read that was given out by key, as a `Reader` uses it: in the place of a ref's attachment."""

from collections.abc import Callable

from featcache.memory.slab import Mapping, Order
from featcache.ref import FeatureRef
from featcache.session.attachment import Attachment


class MakeClaim:
    """The right, and the duty, to make what a key stands for; `end` gives it back, and must be called."""

    __slots__ = ("end",)

    def __init__(self, end: Callable[[], None]) -> None:
        self.end = end


class KeyLease:
    """One grant of one session. The last use that ends pays it, whether or not it read anything.

    The owner keeps the bytes until then, so no word is written first and none is looked at but
    `published`.
    """

    __slots__ = ("_behind", "_index", "_serial", "_uses", "attachment", "ref")

    def __init__(self, attachment: Attachment, ref: FeatureRef, index: int, serial: int) -> None:
        self.attachment = attachment
        self.ref = ref
        self._index = index
        self._serial = serial
        self._uses = 1
        self._behind: list[Order] = []
        attachment.take_grant(index, serial)

    @property
    def mapping(self) -> Mapping:
        """The pool's mapping."""
        return self.attachment.mapping

    def is_there(self) -> bool:
        """Whether the bytes are complete and mapped here."""
        return self.attachment.is_there(self.ref)

    async def wait_ready(self) -> None:
        """Wait on the host until they are."""
        await self.attachment.wait_ready(self.ref)

    def wait_ready_blocking(self, give_up_s: float) -> bool:
        """As `wait_ready`, in a thread that may block; False if they were not there by `give_up_s`."""
        return self.attachment.wait_ready_blocking(self.ref, give_up_s)

    def use(self) -> None:
        """Begin another use; it is made with one."""
        self._uses += 1

    def end(self, ref: FeatureRef, *, pays: bool, order: Order = None) -> None:  # noqa: ARG002 - as the attachment's
        """End one use, which is done behind `order` if it `pays`. As `Attachment.end`."""
        self._uses -= 1
        if self._uses:
            if pays:
                self._behind.append(order)
            return
        self.attachment.pay_grant(self._index, self._serial, order, self._behind)
