"""What the pages of sessions say of uses, together."""

import random
from types import SimpleNamespace
from typing import Any

from featcache.pool.uses import SessionUses

HIGHEST = (1 << 64) - 1


def page_of(*used: int) -> Any:
    """A page as far as this goes: its `used` words."""
    words = memoryview(bytearray(8 * len(used))).cast("Q")
    for index, tick in enumerate(used):
        words[index] = tick
    return SimpleNamespace(words=SimpleNamespace(used=words))


def test_the_latest_of_all_sessions_counts() -> None:
    pages = {1: page_of(0, 7, 3, 0), 2: page_of(0, 5, 9, HIGHEST)}
    uses = SessionUses(4, pages)
    assert [uses.latest(index) for index in range(4)] == [0, 7, 9, HIGHEST]
    assert list(uses.latest_up_to(4)) == [0, 7, 9, HIGHEST]
    assert list(uses.latest_up_to(2)) == [0, 7]
    assert list(uses.latest_up_to(0)) == []
    assert type(uses.latest_up_to(4)[3]) is int


def test_with_no_session_nothing_was_used() -> None:
    uses = SessionUses(3, {})
    assert uses.latest(2) == 0
    assert list(uses.latest_up_to(3)) == [0, 0, 0]


def test_what_a_session_used_is_remembered_when_it_ends_and_its_lies_are_not() -> None:
    pages = {1: page_of(4, HIGHEST, 0), 2: page_of(2, 2, 2)}
    uses = SessionUses(3, pages)
    uses.fold(pages.pop(1), 6)
    assert [uses.latest(index) for index in range(3)] == [4, 6, 2]
    uses.fold(pages.pop(2), 8)
    assert list(uses.latest_up_to(3)) == [4, 6, 2]


def test_one_look_at_all_is_as_a_look_at_each() -> None:
    random_ = random.Random(1)
    pages = {
        n: page_of(*(random_.choice([0, random_.getrandbits(64)]) for _ in range(50)))
        for n in range(5)
    }
    uses = SessionUses(50, pages)
    uses.fold(pages.pop(0), 1 << 40)
    assert list(uses.latest_up_to(50)) == [uses.latest(index) for index in range(50)]
