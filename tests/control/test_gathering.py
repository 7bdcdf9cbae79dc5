"""Frames that are sent while one read is handled go together, and nothing else about them changes."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.peers import Peer, frame
from featcache.control.channel import Channel, ChannelState
from featcache.control.messages import ProtocolError
from support.caches import until

LIMIT_BYTES = 64 << 10


class Counted(socket.socket):
    """A socket that counts its system calls for sending."""

    calls = 0

    def send(self, *arguments: Any) -> int:
        self.calls += 1
        return super().send(*arguments)

    def sendmsg(self, *arguments: Any) -> int:
        self.calls += 1
        return super().sendmsg(*arguments)


class End:
    """A channel whose handler each test chooses, and its peer."""

    def __init__(self, *, requester: bool = False) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        self.sock = Counted(fileno=ours.detach())
        self.peer = Peer(theirs)
        self.took: list[Any] = []
        self.lost: list[Exception | None] = []
        self.answer: Callable[[Any], object] = self.say
        self.last_word: Any = None
        self.channel = Channel(
            self.sock, LIMIT_BYTES, self._on_message, self._on_lost, requester=requester
        )

    def say(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        """Send a message."""
        self.channel.send(msgspec.msgpack.encode({"n": message}), descriptors)

    def fail_at(self, at: Any, error: Exception) -> None:
        """Answer each message with itself, and that one with an error."""

        def answer(message: Any) -> None:
            if message == at:
                raise error
            self.say(message)

        self.answer = answer

    def _on_message(self, payload: bytes, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        message = msgspec.msgpack.decode(payload)["n"]
        self.took.append(message)
        self.answer(message)

    def _on_lost(self, error: Exception | None) -> None:
        self.lost.append(error)
        if self.last_word is not None:
            self.say(self.last_word)

    async def heard(self, count: int) -> list[Any]:
        """What the peer hears next."""
        return [(await self.peer.message())["n"] for _ in range(count)]

    def close(self) -> None:
        """Close both ends."""
        self.channel.close()
        self.peer.close()


class Make(Protocol):
    """Makes an end, inside the loop."""

    def __call__(self, *, requester: bool = False) -> End:
        """Return a new one."""


def frames_of(*messages: Any) -> bytes:
    """The frames of messages, one after the other."""
    return b"".join(frame(msgspec.msgpack.encode({"n": message})) for message in messages)


@pytest.fixture
def end(no_leaks: None) -> Iterator[Make]:
    """Make an end, inside the loop; it is closed after the test."""
    made: list[End] = []

    def make(*, requester: bool = False) -> End:
        made.append(End(requester=requester))
        return made[-1]

    yield make
    for one in made:
        one.close()


async def test_answers_to_one_read_go_with_one_call(end: Make) -> None:
    one = end()
    one.peer.send(frames_of(*range(50)))
    assert await one.heard(50) == list(range(50))
    assert one.sock.calls == 1


async def test_an_answer_alone_goes_at_once(end: Make) -> None:
    one = end()
    calls: list[int] = []

    def answer(message: Any) -> None:
        one.say(message)
        calls.append(one.sock.calls)

    one.answer = answer
    one.peer.send(frames_of("only"))
    assert await one.heard(1) == ["only"]
    assert calls == [1]  # it was out before the handler returned


async def test_frames_sent_outside_a_read_go_at_once(end: Make) -> None:
    one = end()
    one.peer.send(frames_of(1, 2))
    assert await one.heard(2) == [1, 2]
    one.say("a")
    one.say("b")
    assert one.sock.calls == 3
    assert await one.heard(2) == ["a", "b"]


async def test_descriptors_come_with_their_frame_and_in_order(end: Make) -> None:
    one = end()
    reading, writing = os.pipe()
    one.answer = lambda message: one.say(message, [writing] if message == 2 else [])
    one.peer.send(frames_of(0, 1, 2, 3, 4))
    assert await one.heard(3) == [0, 1, 2]
    assert len(one.peer.received) == 1
    os.write(one.peer.received[0], b"x")
    assert os.read(reading, 1) == b"x"
    assert await one.heard(2) == [3, 4]
    assert len(one.peer.received) == 1
    assert one.sock.calls == 3  # those before it, itself, those after
    os.close(reading)
    os.close(writing)


async def test_much_goes_in_several_calls(end: Make) -> None:
    one = end()
    one.answer = lambda message: one.say([message, "x" * 1000])
    one.peer.send(frames_of(*range(100)))
    assert [n for n, _ in await one.heard(100)] == list(range(100))
    assert 5 <= one.sock.calls <= 10


async def test_frames_left_unread_come_later_whole_and_in_order(
    end: Make,
) -> None:
    one = end()
    one.answer = lambda message: one.say([message, "x" * 3000])
    sent, more = 0, 2
    while more:
        one.peer.send(frames_of(*range(sent, sent + 10)))
        sent += 10
        await until(lambda: one.took[-1:] == [sent - 1])  # noqa: B023 - awaited here
        more -= bool(one.channel._outgoing)  # and once more behind what waits
    assert [n for n, _ in await one.heard(sent)] == list(range(sent))
    await until(lambda: not one.channel._outgoing)
    one.peer.send(frames_of("after"))
    assert await one.heard(1) == [["after", "x" * 3000]]
    assert not one.lost


async def test_descriptors_behind_unread_frames_come_with_their_frame(
    end: Make,
) -> None:
    one = end()
    reading, writing = os.pipe()
    while not one.channel._outgoing:
        one.say("x" * 3000)
    waiting = one.sock.calls

    def answer(message: Any) -> None:
        one.say(message, [writing] if message == "it" else [])

    one.answer = answer
    one.peer.send(frames_of("before", "it", "behind"))
    await until(lambda: len(one.took) == 3)
    assert one.sock.calls == waiting  # nothing overtakes
    os.close(writing)  # the frame has its own
    heard = await one.heard(1)
    while heard[-1] != "behind":
        heard += await one.heard(1)
    assert heard[-3:] == ["before", "it", "behind"]
    os.write(one.peer.received[0], b"x")
    assert os.read(reading, 1) == b"x"
    os.close(reading)


async def test_a_peer_that_never_reads_is_given_up(end: Make) -> None:
    one = end()

    def answer(message: Any) -> None:
        for n in range(200):
            one.say(["x" * 1000, n])

    one.answer = answer
    while not one.lost:
        one.peer.send(frames_of("more", "more"))
        await asyncio.sleep(0)
    [error] = one.lost
    assert isinstance(error, ProtocolError)
    assert "unread" in str(error)
    assert one.channel.state is ChannelState.CLOSED


async def test_answers_before_an_error_in_the_same_read_still_go(end: Make) -> None:
    one = end()
    one.last_word = "that was wrong"
    one.peer.send(frames_of(1, 2) + b"nonsense")
    assert await one.heard(3) == [1, 2, "that was wrong"]
    await one.peer.hung_up()
    assert [type(error) for error in one.lost] == [ProtocolError]
    assert one.took == [1, 2]


async def test_answers_before_a_handlers_protocol_error_still_go(end: Make) -> None:
    one = end()
    one.last_word = "that was wrong"
    one.fail_at(3, ProtocolError("not that"))
    one.peer.send(frames_of(1, 2, 3, 4))
    assert await one.heard(3) == [1, 2, "that was wrong"]
    await one.peer.hung_up()
    assert one.took == [1, 2, 3]  # nothing after it is looked at


async def test_frames_sent_before_a_close_still_go(end: Make) -> None:
    one = end()

    def answer(message: Any) -> None:
        one.say(message)
        if message == "bye":
            one.channel.close()

    one.answer = answer
    one.peer.send(frames_of(1, 2, "bye", 4))
    assert await one.heard(3) == [1, 2, "bye"]
    await one.peer.hung_up()
    assert one.took == [1, 2, "bye"]
    assert one.lost == []


async def test_a_close_with_a_full_socket_does_not_block(end: Make) -> None:
    one = end()
    one.answer = lambda message: one.channel.close() if message == "bye" else one.say("x" * 9000)
    one.peer.send(frames_of(*range(100), "bye"))
    await until(lambda: one.channel.state is ChannelState.CLOSED)
    assert [set(text) for text in await one.heard(5)] == [{"x"}] * 5


async def test_a_handlers_fault_keeps_no_answer_back(end: Make) -> None:
    one = end()
    faults: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: faults.append(context["exception"]))
    one.fail_at(2, RuntimeError("a bug"))
    one.peer.send(frames_of(0, 1, 2, 3))
    assert await one.heard(2) == [0, 1]
    await until(lambda: faults)
    one.peer.send(frames_of(4))  # what was behind it waits for the next read, and is not lost
    assert await one.heard(2) == [3, 4]


async def test_a_forked_child_says_nothing(end: Make) -> None:
    one = end()

    def answer(message: Any) -> None:
        one.say(message)
        if message == 2:
            asyncio.get_running_loop().remove_reader(one.sock.fileno())
            one.channel.forget()

    one.answer = answer
    one.peer.send(frames_of(1, 2, 3))
    await one.peer.hung_up()
    assert one.sock.calls == 0
    assert one.took == [1, 2]


# --- an end that sends requests -----------------------------------------------------------------


class Requesters:
    """Tasks that each send their next request when they are answered, as lookups do."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.waiting: dict[int, asyncio.Future[None]] = {}
        end.answer = lambda message: self.waiting.pop(message).set_result(None)

    async def request(self, message: int) -> None:
        self.waiting[message] = asyncio.get_running_loop().create_future()
        self.end.channel.send_next(msgspec.msgpack.encode({"n": message}))
        await self.waiting[message]

    async def run(self, first: int, rounds: int) -> None:
        for turn in range(rounds):
            await self.request(first + 100 * turn)


async def test_the_next_requests_of_many_tasks_go_with_two_calls(end: Make) -> None:
    one = end(requester=True)
    requesters = Requesters(one)
    tasks = [asyncio.create_task(requesters.run(n, 3)) for n in range(10)]
    assert await one.heard(10) == list(range(10))
    assert one.sock.calls == 10  # nothing was read before: each went at once
    for turn in (1, 2):
        one.peer.send(frames_of(*range(100 * turn - 100, 100 * turn - 90)))
        assert await one.heard(10) == list(range(100 * turn, 100 * turn + 10))
        assert one.sock.calls == 10 + 2 * turn  # the first at once, the others together
    one.peer.send(frames_of(*range(200, 210)))
    await asyncio.gather(*tasks)


async def test_a_request_alone_does_not_wait_for_the_turns_end(end: Make) -> None:
    one = end(requester=True)
    requesters = Requesters(one)
    calls: list[int] = []

    async def run() -> None:
        await requesters.request(1)
        requesting = asyncio.ensure_future(requesters.request(2))
        await asyncio.sleep(0)
        calls.append(one.sock.calls)
        await requesting

    task = asyncio.create_task(run())
    for n in (1, 2):
        assert await one.heard(1) == [n]
        one.peer.send(frames_of(n))
    await task
    assert calls == [2]


async def test_a_frame_that_others_wait_for_goes_at_once_and_overtakes_no_request(
    end: Make,
) -> None:
    one = end(requester=True)
    requesters = Requesters(one)
    calls: list[int] = []

    async def run_and_tell() -> None:
        await requesters.request(3)
        one.channel.send_next(msgspec.msgpack.encode({"n": 103}))
        before = one.sock.calls
        one.say("told")
        calls.append(one.sock.calls - before)

    tasks = [asyncio.create_task(requesters.run(n, 2)) for n in range(3)]
    tasks.append(asyncio.create_task(run_and_tell()))
    assert await one.heard(4) == [0, 1, 2, 3]
    one.peer.send(frames_of(0, 1, 2, 3))
    assert await one.heard(5) == [100, 101, 102, 103, "told"]
    assert calls == [2]  # those before it, and itself
    one.peer.send(frames_of(100, 101, 102))
    await asyncio.gather(*tasks)


async def test_requests_of_a_turn_go_before_a_close_in_it(end: Make) -> None:
    one = end(requester=True)
    requesters = Requesters(one)

    async def run_and_close() -> None:
        await requesters.request(3)
        one.say("bye")
        one.channel.close()

    tasks = [asyncio.create_task(requesters.run(n, 2)) for n in range(3)]
    closing = asyncio.create_task(run_and_close())
    assert await one.heard(4) == [0, 1, 2, 3]
    one.peer.send(frames_of(0, 1, 2, 3))
    assert await one.heard(4) == [100, 101, 102, "bye"]
    await one.peer.hung_up()
    await closing
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_request_that_is_too_long_holds_nothing_up(end: Make) -> None:
    one = end(requester=True)
    requesters = Requesters(one)

    async def run_too_long() -> None:
        await requesters.request(2)
        with pytest.raises(ValueError, match="over the limit"):
            one.channel.send_next(bytes(LIMIT_BYTES + 1))

    tasks = [asyncio.create_task(requesters.run(n, 2)) for n in range(2)]
    tasks.append(asyncio.create_task(run_too_long()))
    assert await one.heard(3) == [0, 1, 2]
    one.peer.send(frames_of(2, 0, 1))
    assert await one.heard(2) == [100, 101]
    one.peer.send(frames_of(100, 101))
    await asyncio.gather(*tasks)


# --- frames in pieces ---------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 12))
def test_frames_are_the_same_however_they_are_cut(cuts: list[int], count: int) -> None:
    """Pieces of any length, cut anywhere, make the same messages and the same answers."""

    async def go() -> None:
        one = End()
        try:
            left, at = frames_of(*range(count)), 0
            while left:
                piece, left = left[: cuts[at % len(cuts)]], left[cuts[at % len(cuts)] :]
                at += 1
                one.peer.send(piece)
                await asyncio.sleep(0)
            assert await one.heard(count) == list(range(count))
            assert one.took == list(range(count))
            assert not one.channel._incoming
        finally:
            one.close()

    asyncio.run(go())
