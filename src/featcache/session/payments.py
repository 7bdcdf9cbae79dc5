"""Reads paid together: the words of many, in one batch."""

from collections.abc import Sequence

from featcache.memory.slab import Order, Words
from featcache.memory.words import Header
from featcache.ref import FeatureRef
from featcache.session.leased_reads import LeasedReads

_WAITING = Header.WAITING
_WRITTEN = 2  # the index into PageWords


class Payments(LeasedReads):
    """The part of an `Attachment` that ends the uses of many refs at once."""

    _paid: Words
    _early: dict[tuple[int, int], bool]

    def pay_many(self, reads: Sequence[tuple[FeatureRef, Order]]) -> None:
        """End one use of each of these pinned refs, behind its order, and pay their reads.

        As `Attachment.unpin` of each of them that pays. A ref may be among them as often as it is pinned.
        """
        words: dict[int, tuple[Order, list[tuple[int, int]]]] = {}
        with self._lock:
            for ref, read_behind in reads:
                key, order = (ref.slot, ref.generation), read_behind
                uses = self._pins[key]
                if uses.count > 1:
                    uses.count -= 1
                    uses.pays = True
                    uses.behind.append(order)
                    continue
                del self._pins[key]
                if self._early:
                    self._early.pop(key, None)
                # `held` stays until `released` lands, as in `unpin`.
                if uses.behind:
                    order = self.mapping.follow(order, uses.behind)
                words.setdefault(id(order), (order, []))[1].append(key)
            for order, values in words.values():
                self.mapping.signal_many(self._paid, values, order)
            idle = None if self._on_idle is None else self._idle()
        # After the words: an owner that is woken must find them.
        if self.header[_WAITING]:
            self._unrung += len(reads) - 1
            self._ring_if_due()
        if idle is not None:
            idle()

    def tell_written_many(self, values: Sequence[tuple[int, int]], order: Order) -> None:
        """As `Attachment.tell_written`, of many slots by index and generation."""
        deferred = self.mapping.deferred and order is not None
        for index, generation in values:
            if deferred:
                self._in_flight[_WRITTEN, index] = generation
            else:
                self._in_flight.pop((_WRITTEN, index), None)  # the CPU writes it now
        self.mapping.signal_many(self._adopted.written, values, order)
