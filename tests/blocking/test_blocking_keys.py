"""Keys and clients' puts for code with no loop: the same calls, in the thread that makes them."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import featcache
from featcache import (
    BackendUnavailable,
    CacheClosed,
    FeatureTooLarge,
    GetTimeout,
    KeyNotFound,
    KeyTimeout,
    OwnerLost,
    PoolFull,
    PutTimeout,
    SettingsError,
    StaleRef,
)
from featcache.blocking import FeatureCache, FeatureClient
from featcache.core.put_queue import Request
from support.caches import KIB, MIB, filled, small, tensor
from support.hosted import through_host
from support.keyed import CAPACITY, ONE, ref_of
from support.slabs import Slab, same, same_dict

BASE = torch.arange(720, dtype=torch.float32)
User = FeatureCache | FeatureClient


@contextmanager
def blocking(
    slab: Slab | None = None, **changes: Any
) -> Iterator[tuple[FeatureCache, FeatureClient]]:
    settings = small(**changes) if slab is None else slab.settings(**changes)
    device = "cpu" if slab is None else slab.device
    with (
        featcache.blocking.create(device=device, settings=settings) as owner,
        featcache.blocking.connect(owner.endpoint, settings=settings) as client,
    ):
        yield owner, client


@contextmanager
def threads() -> Iterator[Callable[..., "Future[Any]"]]:
    """Give a function that runs a call in a thread of its own."""
    with ThreadPoolExecutor(16) as pool:
        yield pool.submit


def holds(cache: FeatureCache, condition: Callable[[Any], object]) -> None:
    """Wait until something holds of an owner's statistics."""
    patience = threading.Event()
    for _ in range(10_000):
        if condition(cache.statistics()):
            return
        patience.wait(0.002)
    raise AssertionError("this never came to hold")


def nothing_left(owner: FeatureCache, *keys: str) -> None:
    for key in keys:
        assert owner.evict(key)
    holds(owner, lambda now: now.used_bytes == now.keys == now.waiters == 0)


def fails_at_once() -> torch.Tensor:
    raise ZeroDivisionError


# --- keys ----------------------------------------------------------------------------------------


def test_a_feature_is_found_by_its_key(slab: Slab) -> None:
    feature = {"pixels": BASE.view(24, 30).T, "grid": torch.tensor([[1, 4, 6]])}
    with blocking(slab) as (owner, client):
        owner.put(BASE.to(slab.device), key="bare")
        client.put(feature, key="dict")
        for user in (owner, client):
            for key in ("bare", b"bare"):
                assert user.contains(key)
                copy = tensor(user.get(key))
                assert copy.device == slab.device
                assert same(copy, BASE)
                with user.borrow(key) as view:
                    assert same(view, BASE)
                assert tensor(view).numel() == 0
            assert same_dict(user.get("dict"), feature)
            out = torch.empty(720, device=slab.device)
            assert user.get("bare", out=out) is out
            assert same(out, BASE)
            assert tensor(user.get("bare", device="cpu")).is_cpu
            with pytest.raises(SettingsError):
                user.get("bare", out=torch.empty(719))
            with pytest.raises(SettingsError):
                user.get("bare", out=out, device="cpu")
        assert client.evict("bare")
        assert not owner.evict("bare")
        assert not owner.contains("bare")
        nothing_left(owner, "dict")


def test_keys_that_are_not_there_and_are_none() -> None:
    with blocking() as (owner, client):
        for user in (owner, client):
            calls: list[Callable[[], Any]] = [
                lambda: user.get("a"),  # noqa: B023 - called here
                lambda: user.borrow("a").__enter__(),  # noqa: B023
                lambda: user.pin("a"),  # noqa: B023
                lambda: user.unpin("a"),  # noqa: B023
            ]
            for call in calls:
                with pytest.raises(KeyNotFound):
                    call()
            for timeout in (0, 0.01):
                with pytest.raises(KeyTimeout):
                    user.get("a", timeout=timeout)
                with pytest.raises(KeyTimeout), user.borrow("a", timeout=timeout):
                    pass
            wrongs: list[Any] = ["", b"", "k" * 2000, 3]
            for wrong in wrongs:
                for bad in (user.contains, user.evict, user.pin, user.unpin, user.get):
                    with pytest.raises(SettingsError):
                        bad(wrong)
            with pytest.raises(KeyNotFound):
                user.get_nowait("a")
        nothing_left(owner)


def test_a_get_waits_for_its_key() -> None:
    with blocking() as (owner, client), threads() as run:
        waiting = [run(user.get, "a", timeout=20) for user in (owner, client) for _ in range(3)]
        holds(owner, lambda now: now.misses == 6)
        client.put(BASE, key="a")
        for each in waiting:
            assert same(each.result(20), BASE)
        nothing_left(owner, "a")


def test_a_key_is_read_as_often_as_one_likes_its_ref_once() -> None:
    with blocking() as (owner, client):
        ref = owner.put(BASE, key="a", readers=1)
        for _ in range(3):
            assert same(client.get("a"), BASE)
        assert same(client.get(ref), BASE)
        with pytest.raises(StaleRef):
            client.get(ref)
        assert same(client.get("a"), BASE)
        nothing_left(owner, "a")


def test_a_dropped_feature_stays_while_it_is_borrowed() -> None:
    with blocking(**ONE) as (owner, client):
        client.put(filled(CAPACITY, 1), key="a")
        with client.borrow("a") as view:
            assert owner.evict("a")
            with pytest.raises(PutTimeout):
                owner.put(filled(1), timeout=0.02)
            with pytest.raises(PoolFull):
                owner.put_nowait(filled(1))
            assert same(view, filled(CAPACITY, 1))
        client.put(filled(CAPACITY, 2), key="b", timeout=20)
        assert same(owner.get("b"), filled(CAPACITY, 2))
        nothing_left(owner, "b")


def test_pins() -> None:
    with blocking(**ONE) as (owner, client):
        half = CAPACITY // 2
        for key in ("a", "b"):
            owner.put(filled(half), key=key)
        client.pin("a")
        for number in range(3):
            client.put(filled(half), key=f"new {number}")
        assert client.contains("a")
        assert owner.statistics().pinned_bytes == half
        owner.unpin("a")
        client.put(filled(half), key="last")
        assert not client.contains("a")
        nothing_left(owner, "last", "new 2")


def test_through_the_host() -> None:
    with (
        featcache.blocking.create(settings=small()) as owner,
        featcache.blocking.connect(owner.endpoint, settings=through_host()) as client,
    ):
        owner.put(BASE, key="a")
        for _ in range(2):
            assert same(client.get("a"), BASE)
            out = torch.empty(720)
            assert client.get("a", out=out) is out
            assert same(out, BASE)
            with client.borrow("a") as view:
                assert same(view, BASE)
            assert same(client.get_or_put("a", fails_at_once), BASE)
        assert owner.statistics().relayed == 8
        nothing_left(owner, "a")


# --- single flight -------------------------------------------------------------------------------


def test_one_makes_for_all_threads_and_processes() -> None:
    """`make` runs in the thread of whoever makes."""
    with blocking() as (owner, client), threads() as run:
        users: list[User] = [owner, client]
        go, ran = threading.Event(), list[int]()

        def make() -> torch.Tensor:
            ran.append(threading.get_ident())
            assert go.wait(20)
            return BASE

        def ask(user: User) -> tuple[Any, int]:
            return user.get_or_put("a", make), threading.get_ident()

        asking = [run(ask, user) for user in users * 5]
        holds(owner, lambda now: now.misses == 10)
        go.set()
        found = [each.result(20) for each in asking]
        for feature, _ in found:
            assert same(feature, BASE)
        assert len(ran) == 1
        assert ran[0] in {thread for _, thread in found}
        assert owner.statistics().puts == 1
        nothing_left(owner, "a")


def test_an_error_is_its_makers_and_the_next_makes() -> None:
    with blocking() as (owner, client), threads() as run:
        users: list[User] = [owner, client]
        lock, count = threading.Lock(), [0]

        def make() -> torch.Tensor:
            with lock:
                count[0] += 1
                number = count[0]
            if number <= 3:
                raise ZeroDivisionError(f"{number}")
            return BASE + number

        asking = [run(user.get_or_put, "a", make) for user in users * 4]
        errors = [each.exception(20) for each in asking]
        assert sorted(str(error) for error in errors if error is not None) == ["1", "2", "3"]
        assert count == [4]
        for each, error in zip(asking, errors, strict=True):
            if error is None:
                assert same(each.result(), BASE + 4)
        nothing_left(owner, "a")


@pytest.mark.parametrize("who", ["owner", "client"])
def test_what_comes_of_a_make(who: str) -> None:
    with blocking(**ONE) as both:
        user: User = both[who == "client"]
        strided = tensor(user.get_or_put("a", lambda: BASE.view(24, 30).T))
        assert strided.is_contiguous()
        assert same(strided, BASE.view(24, 30).T)
        assert same(user.get_or_put("a", fails_at_once, device="cpu"), strided)
        with pytest.raises(FeatureTooLarge):
            user.get_or_put("b", lambda: filled(CAPACITY + 1))
        with pytest.raises(ZeroDivisionError):
            user.get_or_put("b", fails_at_once)
        wrong: Any = None
        with pytest.raises(SettingsError):
            user.get_or_put("b", lambda: wrong)
        assert same(user.get_or_put("b", lambda: BASE), BASE)
        nothing_left(both[0], "a", "b")


def test_the_timeout_is_of_waiting_for_another() -> None:
    with blocking() as (owner, client), threads() as run:
        go = threading.Event()

        def make() -> torch.Tensor:
            assert go.wait(20)
            return BASE

        making = run(owner.get_or_put, "a", make)
        holds(owner, lambda now: now.misses == 1)
        with pytest.raises(KeyTimeout):
            client.get_or_put("a", fails_at_once, timeout=0.02)
        go.set()
        assert same(making.result(20), BASE)
        nothing_left(owner, "a")


# --- puts of clients -----------------------------------------------------------------------------


@pytest.mark.parametrize("inline_bytes", [0, MIB], ids=["thread", "inline"])
def test_a_client_puts(slab: Slab, inline_bytes: int) -> None:
    with blocking(slab, inline_bytes=inline_bytes) as (owner, client):
        for value in (BASE, BASE.view(24, 30).T, BASE[3], BASE[:0], BASE.to(torch.bfloat16)):
            for source in (value, value.to(slab.device)):
                ref = client.put(source, readers=2)
                assert same(owner.get(ref), value)
                assert same(client.get(ref), value)
        assert client.statistics().puts == 10
        ref = client.put(BASE, readers=5)
        client.discard(ref)
        with pytest.raises(StaleRef):
            owner.get(ref)
        nothing_left(owner)


def test_arguments_of_a_clients_put() -> None:
    with blocking(**ONE) as (owner, client):
        wrongs: list[dict[str, Any]] = [
            {"readers": 0},
            {"ttl": 0},
            {"key": ""},
            {"timeout": -1},
            {"on_full": "panic"},
            {"on_full": "spill"},
        ]
        for wrong in wrongs:
            with pytest.raises(SettingsError):
                client.put(BASE, **wrong)
        with pytest.raises(FeatureTooLarge):
            client.put(filled(CAPACITY + 1))
        first = client.put(filled(CAPACITY), ttl=None)
        with pytest.raises(PoolFull):
            client.put(filled(1), on_full="raise")
        for timeout in (0, 0.02):
            with pytest.raises(PutTimeout):
                client.put(filled(1), timeout=timeout)
        owner.release(first)
        client.put(filled(1), ttl=0.01)
        holds(owner, lambda now: now.expired == 1)
        nothing_left(owner)


def test_puts_of_many_threads_wait_in_one_queue() -> None:
    with blocking(**ONE) as (owner, client), threads() as run:
        users: list[User] = [owner, client]
        first = owner.put(filled(CAPACITY))
        waiting = []
        for number in range(8):
            waiting.append(run(users[number % 2].put, filled(CAPACITY, number)))
            holds(owner, lambda now: now.waiters == number + 1)  # noqa: B023 - called here
        ref = first
        for number, each in enumerate(waiting):
            client.release(ref)
            ref = each.result(20)
            assert not any(later.done() for later in waiting[number + 1 :])
        assert same(client.get(ref), filled(CAPACITY, 7))
        nothing_left(owner)


def test_many_threads_at_once() -> None:
    """Each key is made, read, put anew and dropped by all; what is read is always whole."""
    with blocking(capacity=256 * KIB, segment=256 * KIB) as (owner, client), threads() as run:
        users: list[User] = [owner, client]

        def work(seed: int) -> int:
            user, wrong = users[seed % 2], 0
            for turn in range(40):
                number = (seed * 7 + turn * 3) % 12
                value = filled(32 * KIB, number)
                if turn % 4 == 0:
                    user.put(value, key=f"{number}")
                elif turn % 4 == 1:
                    try:
                        wrong += not same(user.get(f"{number}"), value)
                    except KeyNotFound:
                        continue
                elif turn % 4 == 2:
                    wrong += not same(user.get_or_put(f"{number}", lambda: value), value)  # noqa: B023 - called here
                else:
                    user.evict(f"{number}")
            return wrong

        assert [each.result(40) for each in [run(work, seed) for seed in range(8)]] == [0] * 8
        nothing_left(owner, *[f"{number}" for number in range(12) if owner.contains(f"{number}")])


# --- ends ----------------------------------------------------------------------------------------


def test_calls_before_opening_and_after_closing() -> None:
    with blocking() as (owner, client):
        late = featcache.blocking.connect(owner.endpoint)
        refuses(late, CacheClosed)
        client.close()
        refuses(client, CacheClosed)
        other = featcache.blocking.connect(owner.endpoint).open()
        other.put(BASE, key="a")
        owner.close()
        refuses(owner, CacheClosed)
        refuses(other, OwnerLost)
        other.close()


def refuses(user: User, error: type[Exception]) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: user.get("a"),
        lambda: user.borrow("a").__enter__(),
        lambda: user.contains("a"),
        lambda: user.evict("a"),
        lambda: user.pin("a"),
        lambda: user.unpin("a"),
        lambda: user.get_or_put("a", lambda: BASE),
        lambda: user.put(BASE),
    ]
    for call in calls:
        with pytest.raises(error):
            call()


def test_a_client_that_is_connected_to_nobody() -> None:
    with featcache.blocking.connect() as loose:
        refuses(loose, SettingsError)


def test_closing_ends_what_waits() -> None:
    with blocking(**ONE) as (owner, client), threads() as run:
        owner.put(filled(CAPACITY))
        waiting = [
            run(client.get, "a", timeout=20),
            run(client.put, filled(1)),
            run(owner.get, "a", timeout=20),
            run(owner.put, filled(1)),
        ]
        holds(owner, lambda now: (now.waiters, now.misses) == (2, 2))
        owner.close()
        for each, error in zip(waiting, [OwnerLost] * 2 + [CacheClosed] * 2, strict=True):
            with pytest.raises(error):
                each.result(20)


def test_the_timeout_is_of_the_bytes_too() -> None:
    """Found, but its bytes do not come: as it is without keys, and with a loop."""
    with blocking() as (owner, client), threads() as run:
        ref = owner.put(BASE, key="a")
        pool = owner._portal.inner._opened().pool
        pool.words.published[ref.slot] = 0
        for user in (owner, client):
            with pytest.raises(GetTimeout) as caught:
                user.get("a", timeout=0.02)
            assert not isinstance(caught.value, KeyNotFound)
            with pytest.raises(GetTimeout), user.borrow("a", timeout=0.02):
                pass
        waiting = [run(user.get, "a", timeout=20) for user in (owner, client)]
        waiting += [run(user.get_or_put, "a", fails_at_once) for user in (owner, client)]
        pool.words.published[ref.slot] = ref.generation
        for each in waiting:
            assert same(each.result(20), BASE)
        nothing_left(owner, "a")


def test_a_writer_that_is_lost_takes_its_key_along() -> None:
    """Its bytes never came: who waits for them looks for the key anew, or makes what it stands for."""
    with blocking() as (owner, client), threads() as run:
        pool, portal = owner._portal.inner._opened().pool, owner._portal
        specs = client.put(filled(8), key="b").specs

        async def promise() -> None:
            slot = pool.store.reserve(Request(8, 0, None, b"a"), 0.0)
            assert slot is not None
            pool.publish_from(slot, ref_of(pool, slot, specs), pool.pages[1])

        portal.call(promise)
        hasty = run(client.get, "a")
        patient = run(client.get, "a", timeout=20)
        making = run(owner.get_or_put, "a", lambda: filled(8, 4))
        holds(owner, lambda now: now.hits == 3)

        async def lose() -> None:
            pool.apply(pool.abandon_writes(pool.pages[1]))

        portal.call(lose)
        for each in (patient, making):
            assert same(each.result(20), filled(8, 4))
        error = hasty.exception(20)  # there may be something again by the time it looks
        assert error is None or isinstance(error, KeyNotFound)
        nothing_left(owner, "a", "b")


def test_backends_that_are_not_there_say_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine with no GPU")
    with blocking() as (owner, client):
        owner.put(BASE, key="a")
        with pytest.raises(BackendUnavailable):
            client.get("a", device="cuda:0")
        nothing_left(owner, "a")


@pytest.mark.parametrize(
    "call",
    [lambda cache: cache.put(filled(1)), lambda cache: cache.get("k")],
    ids=["put", "get a key"],
)
def test_another_thread_closes_between_the_look_and_the_call(
    call: Callable[[FeatureCache], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with featcache.blocking.create(settings=small()) as cache:
        with monkeypatch.context() as closing:
            closing.setattr(cache._portal._thread, "_accepts", False)
            with pytest.raises(CacheClosed):
                call(cache)
        assert cache.statistics().slots_used == 0
