"""The ring of posts: whole messages, in order, whatever either side does between two of its steps."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.memory import post_ring
from featcache.memory.post_ring import MESSAGE_BYTES, PostRing, PostsTaken
from featcache.memory.words import POST_BYTES, POSTS, Posts, SessionWords

SLOTS = 8


@pytest.fixture
def page() -> Iterator[tuple[SessionWords, SessionWords]]:
    """A page as its session has it, and as the owner."""
    owners, fd = SessionWords.create(SLOTS)
    yield SessionWords.attach(fd, SLOTS), owners
    os.close(fd)


@pytest.fixture
def ring(page: tuple[SessionWords, SessionWords]) -> tuple[PostRing, PostsTaken]:
    return PostRing(page[0]), PostsTaken(page[1])


def test_what_was_posted_is_taken_once(ring: tuple[PostRing, PostsTaken]) -> None:
    posts, taken = ring
    assert (bool(taken), list(taken.take()), posts.is_heard) == (False, [], True)
    assert posts.post(b"one")
    assert posts.post(b"")
    assert (bool(taken), posts.is_heard) == (True, False)
    assert list(taken.take()) == [b"one", b""]
    assert (bool(taken), list(taken.take()), posts.is_heard) == (False, [], True)


def test_it_is_bounded(ring: tuple[PostRing, PostsTaken]) -> None:
    posts, taken = ring
    longest = bytes(MESSAGE_BYTES)
    assert not posts.post(longest + b"x")
    assert all(posts.post(longest) for _ in range(POSTS))
    assert not posts.post(b"one more")
    assert list(taken.take()) == [longest] * POSTS
    assert posts.post(b"one more")
    assert list(taken.take()) == [b"one more"]


def test_its_entries_touch_no_other_words(page: tuple[SessionWords, SessionWords]) -> None:
    mine, _ = page
    posts = PostRing(mine)
    for _ in range(POSTS):
        assert posts.post(b"\xff" * MESSAGE_BYTES)
    for words in (mine.held, mine.released, mine.written, mine.used):
        assert not any(words)
    for words in (mine.granted, mine.lease, mine.serial, mine.ended):
        assert not any(words)
    assert mine.header[Posts.POSTED] == POSTS
    assert mine.whole.nbytes >= len(mine.posts)


@given(st.lists(st.one_of(st.binary(max_size=MESSAGE_BYTES + 2), st.none()), max_size=300))
def test_messages_come_in_order_and_whole(steps: list[bytes | None]) -> None:
    """None is the owner's look."""
    owners, fd = SessionWords.create(SLOTS)
    posts, taken = PostRing(SessionWords.attach(fd, SLOTS)), PostsTaken(owners)
    os.close(fd)
    waiting: list[bytes] = []
    for step in steps:
        if step is None:
            assert list(taken.take()) == waiting
            waiting = []
        else:
            fits = len(step) <= MESSAGE_BYTES and len(waiting) < POSTS
            assert posts.post(step) is fits
            if fits:
                waiting.append(step)
    assert bool(taken) is bool(waiting)


class Steps:
    """A page's words or bytes whose session stops halfway through a store, or right before or after it."""

    def __init__(self, words: memoryview, look: Any) -> None:
        self._words = words
        self._look = look

    def __getitem__(self, at: Any) -> Any:
        return self._words[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self._look("before", at)
        if isinstance(at, slice):
            half = len(value) // 2
            self._words[at.start : at.start + half] = value[:half]
            self._look("halfway", at)
        self._words[at] = value
        self._look("after", at)

    def __len__(self) -> int:
        return len(self._words)


def test_at_no_step_is_there_more_than_was_posted(
    ring: tuple[PostRing, PostsTaken], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner looks between any two steps, also those of an entry that is written again."""
    posts, taken = ring
    found: list[bytes] = []
    at_steps: set[tuple[str, bool]] = set()

    def look(when: str, at: Any) -> None:
        at_steps.add((when, isinstance(at, slice)))
        found.extend(taken.take())
        expected = posting + (when == "after" and at == Posts.POSTED)
        assert found == messages[:expected]

    monkeypatch.setattr(posts, "_header", Steps(posts._header, look))
    monkeypatch.setattr(posts, "_entries", Steps(posts._entries, look))
    messages = [bytes([number % 251]) * (1 + number % MESSAGE_BYTES) for number in range(3 * POSTS)]
    for posting in range(len(messages)):
        assert posts.post(messages[posting])
    assert found == messages
    assert len(at_steps) == 5


def test_an_entry_is_written_again_only_when_it_was_copied(
    ring: tuple[PostRing, PostsTaken], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session posts as much as it can between any two steps of the owner."""
    posts, taken = ring
    sent: list[bytes] = []

    def fill() -> None:
        while posts.post(message := len(sent).to_bytes(2, "big") * 50):
            sent.append(message)

    class Copied:
        def __init__(self, entries: memoryview) -> None:
            self._entries = entries

        def __getitem__(self, at: slice) -> memoryview:
            fill()
            return self._entries[at]

    monkeypatch.setattr(taken, "_entries", Copied(taken._entries))
    found: list[bytes] = []
    for _ in range(4):
        fill()
        found += taken.take()
    assert found == sent[: len(found)]
    assert len(found) == 4 * POSTS


def test_fences_stand_where_stores_and_loads_are_not_ordered(
    ring: tuple[PostRing, PostsTaken], monkeypatch: pytest.MonkeyPatch
) -> None:
    posts, taken = ring
    order: list[str] = []
    monkeypatch.setattr(post_ring, "TSO", False)
    for name in ("fence_stores", "fence_loads", "fence_full"):
        monkeypatch.setattr(post_ring, name, lambda name=name: order.append(name))
    header = Steps(posts._header, lambda when, at: order.append(f"{when} {at}"))
    entries = Steps(posts._entries, lambda when, _: order.append(f"{when} entry"))
    posts._free_until = POSTS
    monkeypatch.setattr(posts, "_header", header)
    monkeypatch.setattr(posts, "_entries", entries)
    assert posts.post(b"x")
    counted = f"before {Posts.POSTED}"
    assert order.index("after entry") < order.index("fence_stores") < order.index(counted)
    order.clear()
    told = Steps(taken._header, lambda when, at: order.append(f"{when} {at}"))
    monkeypatch.setattr(taken, "_header", told)
    taken.take()
    assert order == ["fence_loads", "fence_full", f"before {Posts.TAKEN}", f"after {Posts.TAKEN}"]


@pytest.mark.parametrize("posted", [POSTS + 1, (1 << 64) - 1, 1 << 63])
def test_a_count_that_no_session_writes(
    page: tuple[SessionWords, SessionWords], posted: int
) -> None:
    mine, owners = page
    taken = PostsTaken(owners)
    mine.header[Posts.POSTED] = posted
    with pytest.raises(ValueError, match="posts after 0"):
        taken.take()
    assert not taken.take()
    mine.header[Posts.POSTED] = posted - 1
    with pytest.raises(ValueError, match="posts after"):
        taken.take()


@pytest.mark.parametrize("length", [MESSAGE_BYTES + 1, POST_BYTES, 1 << 63, (1 << 64) - 1])
def test_a_length_that_no_session_writes(
    page: tuple[SessionWords, SessionWords], length: int
) -> None:
    mine, owners = page
    taken = PostsTaken(owners)
    mine.posts[:8] = length.to_bytes(8, "little")
    mine.header[Posts.POSTED] = 1
    with pytest.raises(ValueError, match="a post of"):
        taken.take()


def test_the_owner_believes_its_own_count_only(page: tuple[SessionWords, SessionWords]) -> None:
    """A session that writes over the word hurts nobody but itself."""
    mine, owners = page
    posts, taken = PostRing(mine), PostsTaken(owners)
    assert posts.post(b"a")
    assert list(taken.take()) == [b"a"]
    mine.header[Posts.TAKEN] = 0
    assert not taken.take()
    assert posts.post(b"b")
    assert list(taken.take()) == [b"b"]


def test_a_fork_posts_nothing(ring: tuple[PostRing, PostsTaken]) -> None:
    posts, taken = ring
    posts.forget()
    assert posts.post(b"a child's")
    assert not taken
