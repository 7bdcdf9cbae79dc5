"""A loop's turn: what has no units left goes on in later turns, callers in the order of their calls."""

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from featcache.control.dispatch import Begun
from featcache.control.messages import Reply
from featcache.control.turns import CALL_UNITS, QUANTUM_UNITS, TURN_UNITS, Turn, turn_of


def new() -> Turn:
    return Turn(asyncio.get_running_loop())


async def test_all_that_run_in_a_loop_share_its_turn() -> None:
    loop = asyncio.get_running_loop()
    assert turn_of(loop) is turn_of(loop)


async def test_a_turn_lets_in_so_many_callers_and_no_more() -> None:
    turn, let_in = new(), list[int]()

    async def call(number: int) -> None:
        turn.left -= CALL_UNITS
        if turn.left < 0:
            await turn.wait()
        let_in.append(number)

    tasks = [asyncio.create_task(call(number)) for number in range(TURN_UNITS * 3)]
    counts = [0]
    while len(let_in) < len(tasks):
        await asyncio.sleep(0)
        counts.append(len(let_in))
    most = max(after - before for before, after in itertools.pairwise(counts))
    assert 0 < most <= TURN_UNITS / CALL_UNITS
    assert let_in == list(range(len(tasks))), "a later caller was let in before an earlier one"


async def test_what_a_caller_wants_is_done_in_the_line_before_any_later_call() -> None:
    turn, order = new(), list[str]()
    turn.left = -1
    first = turn.place(lambda: order.append("first"))
    second = turn.place(lambda: order.append("second"))
    first.cancel()
    await second
    assert (order, turn.has_callers) == (["second"], False)
    assert turn.left > 0


async def test_what_fails_in_the_line_fails_its_caller_alone() -> None:
    turn = new()
    turn.left = -1
    failing = turn.place(lambda: 1 // 0)
    fine = turn.place(lambda: 7)
    with pytest.raises(ZeroDivisionError):
        await failing
    assert await fine == 7


async def test_activities_have_their_turns_one_after_the_other() -> None:
    turn, order = new(), list[str]()

    def pieces(name: str) -> Iterator[None]:
        for _ in range(3 * QUANTUM_UNITS):
            turn.left -= 1
            order.append(name)
            yield

    turn.left = 0
    turn.do_all(pieces("a"))
    turn.do_all(pieces("b"))
    seen = [0]
    while len(order) < 6 * QUANTUM_UNITS:
        await asyncio.sleep(0)
        seen.append(len(order))
    most = max(after - before for before, after in itertools.pairwise(seen))
    assert most <= TURN_UNITS
    assert order[: 2 * QUANTUM_UNITS] == ["a"] * QUANTUM_UNITS + ["b"] * QUANTUM_UNITS


async def test_an_activity_that_fails_stops_no_other(no_loop_errors: list[object]) -> None:
    turn, done = new(), asyncio.Event()

    def fails() -> bool:
        raise ZeroDivisionError

    def succeeds() -> bool:
        done.set()
        return False

    turn.later(fails)
    turn.later(succeeds)
    await done.wait()
    assert len(no_loop_errors) == 1


@pytest.fixture
async def no_loop_errors() -> list[object]:
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    return errors


@pytest.mark.parametrize("runs", [False, True])
async def test_what_a_request_took_is_given_back_if_its_task_never_runs(runs: bool) -> None:
    undone, never = list[bool](), asyncio.get_running_loop().create_future()

    async def work() -> Reply:
        await never
        raise AssertionError

    task = asyncio.get_running_loop().create_task(Begun(work(), lambda: undone.append(True)))
    if runs:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == [] if runs else [True]  # once it runs, giving it back is its own to do
