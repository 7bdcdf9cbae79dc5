"""A slab and its mappings as far as reads by key go: words that come late, in the order of their streams."""

from collections import deque
from typing import Any, TypeAlias

from support.stepping import Shared, access

Order: TypeAlias = "tuple[Stream, int] | None"


class Stream:
    """Work in its order, done when the test says so."""

    def __init__(self) -> None:
        self.done = self.enqueued = 0
        self.work: deque[Any] = deque()

    def add(self, work: Any, behind: tuple[Order, ...] = ()) -> None:
        self.work.append((work, behind))
        self.enqueued += 1

    @property
    def can_run(self) -> bool:
        return bool(self.work) and all(
            order is None or order[0].done >= order[1] for order in self.work[0][1]
        )

    def run(self) -> None:
        """Do the first of its work, which waits for nothing else."""
        work, _ = self.work.popleft()
        work()
        self.done += 1


class FakeMapping:
    """The slab as a session maps it: only what reads by key want of it."""

    def __init__(self, *, deferred: bool) -> None:
        self.deferred = deferred
        self.closed = False

    def can_copy_to(self, device: object) -> bool:
        return True

    def signal(self, words: Shared, index: int, value: int, order: Order) -> None:
        if not self.deferred or order is None:
            words[index] = value
            return
        access()  # the call of the driver

        def store() -> None:
            words.words[index] = value

        order[0].add(store)

    def follow(self, order: Order, others: list[Order]) -> Order:
        """Put a stream behind others, as an event would."""
        if order is None:
            order = next((other for other in others if other is not None), None)
        if order is None:
            return None
        order[0].add(lambda: None, tuple(others))
        return order[0], order[0].enqueued


class FakeSlab:
    """The owner's side: its words are there as soon as it signals them."""

    deferred, kind, device_name, handle = False, "fake", "cpu", b""

    def adopt(self, block: object, words: memoryview) -> memoryview:
        return words

    def signal(self, words: memoryview, index: int, value: int, order: object) -> None:
        words[index] = value
