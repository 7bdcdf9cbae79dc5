"""How long a client's put may take: for its room, for the slab to be mapped, for its publish."""

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, TypeVar

import anyio

from featcache.errors import FeatcacheError, PoolFull, PutTimeout
from featcache.session.arguments import rpc_timeout

T = TypeVar("T")

ANSWER_S: Final = 0.25
"""How much longer than its `timeout` a put waits for the owner to say who holds the room."""
UNTOLD: Final = (
    "the owner did not say in time that the feature is kept, and it was taken back: it is busy, or "
    "stopped"
)
UNATTACHED: Final = (
    "the pools that it may go to were not attached in time: their owner is busy, or stopped"
)
UNENTERED: Final = "its turn did not come in time, behind the puts before it: nothing was put"
UNMAPPED: Final = "the slab's new memory was not mapped here in time: nothing was put"


async def within(
    timeout_s: float,
    wait: bool,
    nbytes: int,
    work: Callable[[bool, float | None], Awaitable[T]],
) -> T:
    """Await ``work(waits, deadline_s)`` for `timeout_s`, which 0 makes a call that does not wait.

    The owner is asked to give up at the deadline (of `time.monotonic`), and its error says why; only
    an owner that does not is given up here.

    Raises:
        PutTimeout: not in time; PoolFull if it is not to `wait` at all.

    """
    at_once = timeout_s == 0
    limit_s, deadline_s = rpc_timeout(timeout_s), None
    if limit_s is not None and not at_once:
        deadline_s = time.monotonic() + timeout_s
        limit_s += ANSWER_S
    try:
        with anyio.fail_after(limit_s):
            return await work(wait and not at_once, deadline_s)
    except PutTimeout as late:  # the owner's, which was told what was left of the time
        why = str(late).partition(" s: ")[2] or str(late)
        raise PutTimeout(f"no room for {nbytes} bytes within {timeout_s} s: {why}") from None
    except PoolFull as full:
        if not (at_once and wait):
            raise
        raise PutTimeout(f"within {timeout_s} s: {full}") from None
    except TimeoutError:
        raise PutTimeout(
            f"no room for {nbytes} bytes within {timeout_s} s, and the owner did not say who holds "
            "it: it is busy, or stopped"
        ) from None


def left(deadline_s: float) -> float:
    """Return the time until a deadline as a message has it, more than 0."""
    return max(0.001, deadline_s - time.monotonic())


def give_up_at(timeout_s: float) -> float:
    """Return when (by `time.monotonic`) a put that is given so long is given up."""
    return time.monotonic() + (rpc_timeout(timeout_s) or 0.0)


@contextlib.contextmanager
def at_most(until_s: float | None, late: str) -> Iterator[None]:
    """End a block at a time with a PutTimeout that says `late`; it has time for one answer in any case."""
    try:
        with anyio.fail_after(
            None if until_s is None else max(ANSWER_S, until_s - time.monotonic())
        ):
            yield
    except TimeoutError as error:
        if isinstance(error, FeatcacheError):
            raise
        raise PutTimeout(late) from None
