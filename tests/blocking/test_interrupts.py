"""An interrupt (Ctrl-C) ends any wait of the main thread at once, and what it was for is undone."""

import contextvars
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import featcache
from featcache.blocking import FeatureCache, FeatureClient, loopthread
from support.caches import KIB, filled, small
from support.leaks import threads_ended
from support.processes import Pipe, gone, starting, until, warm_up

User = FeatureCache | FeatureClient
CAPACITY = 64 * KIB

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    warm_up()


@pytest.fixture(params=["owner", "client"])
def user(request: pytest.FixtureRequest) -> Iterator[tuple[FeatureCache, User]]:
    """An owner whose slab holds one feature, and who is to be interrupted."""
    settings = small(capacity=CAPACITY, segment=CAPACITY)
    with (
        featcache.blocking.create(settings=settings) as owner,
        featcache.blocking.connect(owner.endpoint, settings=settings) as client,
    ):
        yield owner, owner if request.param == "owner" else client


def interrupted(call: Callable[[], object], once: Callable[[], object]) -> None:
    """Make a call, and interrupt it once something holds of it."""
    patience, done = threading.Event(), threading.Event()

    def interrupt() -> None:
        while not once() and not done.is_set():
            patience.wait(0.001)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        done.set()
        thread.join()


def settles(owner: FeatureCache, **gauges: int) -> None:
    """Wait until the owner's statistics have these."""
    patience = threading.Event()
    for _ in range(10_000):
        now = owner.statistics()
        if all(getattr(now, name) == value for name, value in gauges.items()):
            return
        patience.wait(0.002)
    raise AssertionError(f"not {gauges}: {now}")


def test_a_put_that_waits(user: tuple[FeatureCache, User]) -> None:
    owner, one = user
    ref = owner.put(filled(CAPACITY))
    interrupted(lambda: one.put(filled(CAPACITY)), lambda: owner.statistics().waiters)
    settles(owner, waiters=0)
    owner.release(ref)
    one.release(one.put(filled(CAPACITY, 1)))
    settles(owner, slots_used=0)


def test_a_get_of_a_key_that_is_to_come(user: tuple[FeatureCache, User]) -> None:
    owner, one = user
    interrupted(lambda: one.get("k", timeout=1e6), lambda: owner.statistics().misses)
    owner.put(filled(CAPACITY), key="k")
    assert one.get("k").shape == (CAPACITY,)  # type: ignore[union-attr]  # one tensor
    assert owner.evict("k")
    settles(owner, slots_used=0)


def test_a_borrow_of_a_key_that_is_to_come(user: tuple[FeatureCache, User]) -> None:
    owner, one = user
    interrupted(one.borrow("k", timeout=1e6).__enter__, lambda: owner.statistics().misses)
    owner.put(filled(CAPACITY), key="k")
    assert owner.evict("k")
    settles(owner, slots_used=0)


def test_a_wait_for_what_another_makes(user: tuple[FeatureCache, User]) -> None:
    owner, one = user
    making, go_on = threading.Event(), threading.Event()

    def make() -> Any:
        making.set()
        go_on.wait(20)
        return filled(1)

    maker = threading.Thread(target=lambda: owner.get_or_put("k", make))
    maker.start()
    assert making.wait(20)
    interrupted(
        lambda: one.get_or_put("k", lambda: filled(2)), lambda: owner.statistics().misses == 2
    )
    go_on.set()
    maker.join(20)
    assert owner.evict("k")
    settles(owner, slots_used=0)


def test_ones_own_make(user: tuple[FeatureCache, User]) -> None:
    """Whoever waits for it makes it instead."""
    owner, one = user
    begun, never = threading.Event(), threading.Event()

    def make() -> Any:
        begun.set()
        never.wait(20)

    interrupted(lambda: one.get_or_put("k", make), begun.is_set)
    assert one.get_or_put("k", lambda: filled(3)).shape == (3,)  # type: ignore[union-attr]
    assert owner.evict("k")


def test_a_wait_for_less_pressure() -> None:
    with featcache.blocking.create(settings=small(capacity=CAPACITY)) as owner:
        ref = owner.put(filled(CAPACITY))
        monitor = owner._portal.inner._opened().pool.pressure
        interrupted(lambda: owner.pressure.below("high"), lambda: monitor._awaiting)
        owner.release(ref)
        owner.pressure.below("high")
        assert not monitor._awaiting


# --- as the result comes -------------------------------------------------------------------------


@pytest.fixture
def too_late(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Give a function that interrupts a call when its last result is there, and nobody has it yet."""

    def late(wait: Callable[[float], bool]) -> None:
        assert wait(20)
        raise KeyboardInterrupt

    def call(work: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(loopthread, "_wait", late)
            with pytest.raises(KeyboardInterrupt):
                work()

    return call


TooLate = Callable[[Callable[[], object]], None]


def test_a_ref_that_nobody_has_owes_no_read(
    user: tuple[FeatureCache, User], too_late: TooLate
) -> None:
    owner, one = user
    one.release(one.put(filled(1)))  # so that the next is one call
    too_late(lambda: one.put(filled(CAPACITY), ttl=None))
    settles(owner, slots_used=0, puts=2, discarded=1)
    if isinstance(one, FeatureCache):
        too_late(lambda: owner.put_nowait(filled(CAPACITY), ttl=None))
        settles(owner, slots_used=0, puts=3, discarded=2)


def test_a_pin_that_nobody_knows_of(user: tuple[FeatureCache, User], too_late: TooLate) -> None:
    owner, one = user
    owner.put(filled(CAPACITY), key="k")
    too_late(lambda: one.pin("k"))
    settles(owner, pinned_bytes=0)
    one.put(filled(CAPACITY), key="other")  # evicts it


def many_tensors() -> dict[str, torch.Tensor]:
    """A feature that a session can't look up by itself."""
    return {f"a tensor with a long name, {number}": filled(1) for number in range(16)}


def test_a_borrow_that_nobody_has_entered(
    user: tuple[FeatureCache, User], too_late: TooLate
) -> None:
    owner, one = user
    owner.put(many_tensors(), key="k")  # whose ref has no room in the key table: it is asked for
    too_late(one.borrow("k").__enter__)
    assert owner.evict("k")
    settles(owner, slots_used=0)


def test_a_claim_that_nobody_has(user: tuple[FeatureCache, User], too_late: TooLate) -> None:
    owner, one = user
    too_late(lambda: one.get_or_put("k", lambda: filled(1)))
    assert one.get_or_put("k", lambda: filled(3)).shape == (3,)  # type: ignore[union-attr]
    assert owner.evict("k")


# --- closing, and the moment before a wait --------------------------------------------------------


async def _own(pipe: Pipe) -> None:
    async with featcache.create(settings=small()) as owner:
        pipe.say(owner.endpoint)
        await pipe.hear()
        await until(lambda: owner.statistics().sessions == 0)
        pipe.say(owner.statistics().readers_lost)


def test_a_close_that_a_stopped_owner_holds_up() -> None:
    """The goodbye is said all the same."""
    with starting() as start:
        owner = start(_own)
        (endpoint,) = owner.hear_now()
        client = featcache.blocking.connect(endpoint).open()
        loop = client._portal._thread
        assert loop is not None
        owner.signal(signal.SIGSTOP)
        interrupted(client.close, lambda: loop.ends and not client.is_open)
        assert not client.is_open
        client.close()
        owner.signal(signal.SIGCONT)
        loop.join()
        owner.tell("go on")
        assert owner.hear_now() == (0,)
        gone(owner.pid)


def test_an_open_whose_thread_has_just_started(monkeypatch: pytest.MonkeyPatch) -> None:
    start = loopthread.LoopThread.start

    def started(self: loopthread.LoopThread) -> None:
        start(self)
        raise KeyboardInterrupt

    before = loopthread.running.copy()
    with monkeypatch.context() as patch:
        patch.setattr(loopthread.LoopThread, "start", started)
        with pytest.raises(KeyboardInterrupt):
            featcache.blocking.create(settings=small()).open()
    threads_ended()
    assert loopthread.running == before


def test_an_object_that_is_dropped_while_it_is_open_closes() -> None:
    with featcache.blocking.create(settings=small()) as owner:
        featcache.blocking.connect(owner.endpoint, settings=small()).open()
        settles(owner, sessions=0, readers_lost=0)


def test_the_main_thread_looks_again_for_a_signal_that_came_just_before_it_slept() -> None:
    limits: list[float] = []

    def wait(limit_s: float) -> bool:
        limits.append(limit_s)
        return len(limits) == 3

    loopthread._wait(wait)
    assert all(0 < limit_s < 1 for limit_s in limits)
    other = threading.Thread(target=loopthread._wait, args=(wait,))
    limits.clear()
    other.start()
    other.join()
    assert limits[1:] == [-1, -1]  # to which no signal comes


def test_the_work_has_the_context_of_its_caller() -> None:
    """Such as what it bound for its log."""
    request = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    async def work() -> None:
        seen.append(request.get())

    with featcache.blocking.create(settings=small()) as cache:
        request.set("seven")
        cache._portal.call(work)
    assert seen == ["seven"]


def test_a_loop_that_a_callback_ends_closes_and_says_so() -> None:
    cache = featcache.blocking.create(settings=small()).open()
    loop = cache._portal._thread
    assert loop is not None

    def quit_it() -> None:
        raise SystemExit(1)

    loop._loop.call_soon_threadsafe(quit_it)
    loop.join()
    assert not cache.is_open
    with pytest.raises(featcache.BackendUnavailable, match="event loop"):
        cache.close()


def test_many_that_nobody_has(user: tuple[FeatureCache, User], too_late: TooLate) -> None:
    owner, one = user
    one.release(one.put(filled(1)))  # so that the next is one call
    owner.put(filled(1), key="k")
    too_late(lambda: one.put_many([filled(1), filled(2)], ttl=None))
    settles(owner, slots_used=1, discarded=2)
    too_late(lambda: one.share("k", readers=1, ttl=None))
    settles(owner, slots_used=1, discarded=3)
    refs = one.put_many([filled(1), filled(2)])
    too_late(lambda: one.get_many([*refs, "k"]))
    assert len(one.get_many([*refs, "k"])) == 3, "no read was paid"
    assert owner.evict("k")
    settles(owner, slots_used=0)


def test_a_batch_that_waits(user: tuple[FeatureCache, User]) -> None:
    owner, one = user
    ref = owner.put(filled(CAPACITY))
    interrupted(lambda: one.put_many([filled(1), filled(2)]), lambda: owner.statistics().waiters)
    settles(owner, waiters=0)
    owner.release(ref)
    settles(owner, slots_used=0)
