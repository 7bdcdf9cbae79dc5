"""Payments that another host has not said it has: told until it has. No I/O, no clock of its own."""

from collections.abc import Iterable, Iterator

from featcache.reach.messages import MAX_PAYMENTS, Payment, Place


class Ledger:
    """Payments to one home, each told again until it is acknowledged.

    ::

        add ──→ OWED ──`due`, after an interval──→ OWED ──`settle`──→ gone

    At the home a payment counts once however often it comes: it is of one reader and one generation.
    """

    def __init__(self) -> None:
        self._owed: dict[int, tuple[Payment, float]] = {}
        self._numbers = 0

    def __len__(self) -> int:
        """Return how many are not acknowledged."""
        return len(self._owed)

    def add(self, place: Place, reader: int, name: str | None, now_s: float) -> Payment:
        """Note a payment that is told now."""
        self._numbers += 1
        payment = Payment(self._numbers, place, reader, name)
        self._owed[payment.number] = payment, now_s
        return payment

    def settle(self, numbers: Iterable[int]) -> None:
        """Take an acknowledgement; a number that is not owed is ignored."""
        for number in numbers:
            self._owed.pop(number, None)

    def due(self, now_s: float, after_s: float) -> list[Payment]:
        """Return what was told last so long ago that it is to be told again; as much as one message has."""
        found = [one for one, told_s in self._owed.values() if now_s - told_s >= after_s]
        for payment in found[:MAX_PAYMENTS]:
            self._owed[payment.number] = payment, now_s
        return found[:MAX_PAYMENTS]

    def all(self) -> Iterator[list[Payment]]:
        """Return all that is owed, as much at a time as one message has."""
        payments = [payment for payment, _ in self._owed.values()]
        for first in range(0, len(payments), MAX_PAYMENTS):
            yield payments[first : first + MAX_PAYMENTS]

    def clear(self) -> None:
        """Forget all: the home is gone, and its refs with it."""
        self._owed.clear()
