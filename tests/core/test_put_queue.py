"""The queue: its order, and the handshake between a grant and who takes it."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.core.put_queue import Request, Waiter, WaiterState, WaitQueue
from featcache.core.slots import Slot


def join(queue: WaitQueue, nbytes: int = 100, now_s: float = 0.0, tag: object = None) -> Waiter:
    return queue.join(Request(nbytes, 1, None), now_s, tag)


def served(queue: WaitQueue) -> list[Waiter]:
    """Grant everybody, in the queue's own order."""
    order = []
    while (waiter := queue.head) is not None:
        queue.grant(waiter, Slot(0))
        order.append(waiter)
    return order


def test_an_empty_queue_has_no_head() -> None:
    queue = WaitQueue()
    assert queue.head is None
    assert len(queue) == 0
    assert not queue
    assert queue.waiting_bytes == 0


def test_a_waiter_keeps_what_it_came_with() -> None:
    request, tag = Request(7, frozenset({"tp0"}), 2.0), object()
    waiter = WaitQueue().join(request, 3.5, tag)
    assert waiter.request is request
    assert waiter.tag is tag
    assert waiter.since_s == 3.5
    assert waiter.state is WaiterState.WAITING
    assert waiter.slot is None


def test_first_come_first_served() -> None:
    queue = WaitQueue()
    waiters = [join(queue, nbytes) for nbytes in (300, 100, 200)]
    assert len(queue) == 3
    assert served(queue) == waiters


@pytest.mark.parametrize("leaver", range(4))
def test_who_leaves_does_not_change_the_order_of_the_others(leaver: int) -> None:
    queue = WaitQueue()
    waiters = [join(queue) for _ in range(4)]
    assert queue.drop(waiters[leaver]) is None
    del waiters[leaver]
    last = join(queue)
    assert served(queue) == [*waiters, last]


def test_who_left_and_comes_again_stands_at_the_end() -> None:
    queue = WaitQueue()
    first, second = join(queue), join(queue)
    queue.drop(first)
    again = join(queue)
    assert again.ticket > second.ticket > first.ticket
    assert served(queue) == [second, again]


def test_a_grant_hands_over_the_slot_once() -> None:
    queue, slot = WaitQueue(), Slot(3)
    waiter = join(queue)
    queue.grant(waiter, slot)
    assert waiter.slot is slot
    assert not queue
    states = [waiter.state]
    assert queue.accept(waiter) is slot
    states.append(waiter.state)
    assert states == [WaiterState.GRANTED, WaiterState.ACCEPTED]
    with pytest.raises(ValueError, match="is accepted, not granted"):
        queue.accept(waiter)


def test_a_waiter_that_was_not_granted_can_not_accept() -> None:
    queue = WaitQueue()
    waiter = join(queue)
    with pytest.raises(ValueError, match="is waiting, not granted"):
        queue.accept(waiter)
    assert queue.head is waiter


def test_a_waiter_that_left_can_not_accept_even_what_had_been_granted() -> None:
    queue = WaitQueue()
    before, after = join(queue), join(queue)
    queue.drop(before)
    queue.grant(after, Slot(0))
    queue.drop(after)
    for waiter in (before, after):
        with pytest.raises(ValueError, match="is gone, not granted"):
            queue.accept(waiter)


def test_a_granted_slot_comes_back_from_a_waiter_that_leaves_once_only() -> None:
    queue, slot = WaitQueue(), Slot(0)
    waiter = join(queue)
    queue.grant(waiter, slot)
    assert queue.drop(waiter) is slot
    assert waiter.state is WaiterState.GONE
    assert queue.drop(waiter) is None


def test_an_accepted_slot_does_not_come_back() -> None:
    queue = WaitQueue()
    waiter = join(queue)
    queue.grant(waiter, Slot(0))
    queue.accept(waiter)
    assert queue.drop(waiter) is None
    assert waiter.state is WaiterState.ACCEPTED


def test_leaving_twice_is_leaving_once() -> None:
    queue = WaitQueue()
    waiter, other = join(queue, 100), join(queue, 50)
    assert queue.drop(waiter) is None
    assert queue.drop(waiter) is None
    assert waiter.state is WaiterState.GONE
    assert queue.head is other
    assert queue.waiting_bytes == 50


Way = Callable[[WaitQueue, Waiter], object]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(lambda queue, waiter: queue.drop(waiter), id="left"),
        pytest.param(lambda queue, waiter: queue.grant(waiter, Slot(0)), id="granted"),
    ],
)
def test_waiting_bytes_are_those_of_who_still_waits(way: Way) -> None:
    queue = WaitQueue()
    waiters = [join(queue, nbytes) for nbytes in (0, 1, 1000)]
    assert queue.waiting_bytes == 1001
    way(queue, waiters[2])
    assert queue.waiting_bytes == 1
    queue.drop(waiters[2])
    assert queue.waiting_bytes == 1
    way(queue, waiters[0])
    way(queue, waiters[1])
    assert queue.waiting_bytes == 0


@given(st.lists(st.tuples(st.sampled_from(["join", "drop", "grant"]), st.integers(0, 1000))))
def test_the_queue_is_a_list(steps: list[tuple[str, int]]) -> None:
    queue, model = WaitQueue(), list[Waiter]()
    for what, number in steps:
        if what == "join":
            model.append(join(queue, number))
        elif model and what == "drop":
            queue.drop(model.pop(number % len(model)))
        elif model:
            queue.grant(model[0], Slot(number))
            model.pop(0)
        assert queue.head is (model[0] if model else None)
        assert len(queue) == len(model)
        assert queue.waiting_bytes == sum(waiter.request.nbytes for waiter in model)
    assert served(queue) == model
