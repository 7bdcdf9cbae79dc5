"""A blocking client's puts in its caller's thread, where it has room ahead: no loop has a part in them."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import featcache
from featcache import CacheClosed, FeatureRef, StaleRef
from featcache.blocking import FeatureCache, FeatureClient
from featcache.client.posts import PublishPosts
from support.caches import KIB, MIB, filled, small, tensor

FEATURE = 16 * KIB


@contextmanager
def blocking(**changes: Any) -> Iterator[tuple[FeatureCache, FeatureClient]]:
    settings = small(**{"capacity": 4 * MIB} | changes)
    with (
        featcache.blocking.create(device="cpu", settings=settings) as owner,
        featcache.blocking.connect(owner.endpoint, settings=settings) as client,
    ):
        yield owner, client


def warm(owner: FeatureCache, client: FeatureClient, puts: int = 4) -> None:
    """Put and read until the client is given room ahead, and has heard of it."""
    for _ in range(puts):
        owner.get(client.put(filled(FEATURE, 1)))
    client.contains(b"nothing")  # an answer: what the owner sent before it has come
    assert writer_of(client)._rooms._rooms


def writer_of(client: FeatureClient) -> Any:
    engine: Any = client._portal.engine
    return engine.puts.bound_writer()


def drained(owner: FeatureCache) -> None:
    patience = threading.Event()
    for _ in range(10_000):
        if owner.statistics().slots_used == 0:
            return
        patience.wait(0.001)
    raise AssertionError(f"{owner.statistics().slots_used} features stay")


@contextmanager
def held(client: FeatureClient) -> Iterator[None]:
    """Hold a client's event loop for the length of the block."""
    held, goes_on = threading.Event(), threading.Event()

    def hold() -> bool:
        held.set()
        return goes_on.wait(30)

    thread = threading.Thread(target=lambda: client._portal.look(hold))
    thread.start()
    held.wait(30)
    try:
        yield
    finally:
        goes_on.set()
        thread.join()


def test_a_put_with_room_ahead_needs_no_loop() -> None:
    with blocking() as (owner, client), ThreadPoolExecutor(1) as threads:
        warm(owner, client)
        with held(client):
            ref = threads.submit(client.put, filled(FEATURE, 7)).result(10)
            assert tensor(owner.get(ref, timeout=10.0))[-1].item() == 7
        drained(owner)
        assert client.statistics().puts == 5


def test_puts_of_many_threads_are_each_read_as_they_were_put() -> None:
    """Threads of varied sizes against each other, and against the client's loop."""
    with (
        blocking() as (owner, client),
        featcache.blocking.connect(owner.endpoint) as reader,
        ThreadPoolExecutor(8) as threads,
    ):

        def puts(thread: int) -> list[FeatureRef]:
            refs = []
            for turn in range(60):
                nbytes, value = KIB * (1 + (7 * thread + turn) % 16), (60 * thread + turn) % 251
                ref = client.put(filled(nbytes, value), timeout=30.0)
                read = tensor((reader if turn % 2 else owner).get(ref, timeout=30.0))
                assert read.numel() == nbytes
                assert bool((read == value).all())
                refs.append(ref)
            return refs

        refs = [ref for each in threads.map(puts, range(8)) for ref in each]

        assert len({(ref.slot, ref.generation) for ref in refs}) == 480
        drained(owner)
        assert client.statistics().puts == 480


def test_threads_that_put_while_the_owner_takes_rooms_back_lose_none() -> None:
    """The slab is full again and again: each owner's put then takes back what nobody has claimed."""
    with blocking(capacity=MIB) as (owner, client), ThreadPoolExecutor(6) as threads:

        def puts(thread: int) -> int:
            cache = owner if thread % 3 == 0 else client
            nbytes = 300 * KIB if cache is owner else FEATURE
            for turn in range(40):
                ref = cache.put(filled(nbytes, turn), timeout=30.0)
                assert tensor(owner.get(ref, timeout=30.0))[-1].item() == turn
            return 40

        assert sum(threads.map(puts, range(6))) == 240
        drained(owner)


def test_a_client_that_closes_while_threads_put_ends_each_of_them() -> None:
    with blocking() as (owner, client), ThreadPoolExecutor(4) as threads:
        warm(owner, client)
        begun = threading.Barrier(5)

        def puts(_: int) -> str:
            begun.wait(30)
            try:
                while True:
                    owner.get(client.put(filled(FEATURE, 3), timeout=30.0), timeout=30.0)
            except (CacheClosed, StaleRef) as error:
                return type(error).__name__

        ends = [threads.submit(puts, number) for number in range(4)]
        begun.wait(30)
        client.close()

        # Stale: of a put whose publish the owner was to hear after the session's end.
        assert {end.result(30) for end in ends} <= {"CacheClosed", "StaleRef"}
        drained(owner)


@pytest.mark.parametrize("fails", ["write", "tell_written", "post"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_put_that_fails_on_its_way_leaves_no_slot(
    monkeypatch: pytest.MonkeyPatch, fails: str, error: type[BaseException]
) -> None:
    with blocking() as (owner, client):
        warm(owner, client)
        writer = writer_of(client)
        attachment = writer.connection.attachment
        target, name = {
            "write": (attachment.mapping, "write"),
            "tell_written": (attachment, "tell_written"),
            "post": (writer._posts, "post_here"),
        }[fails]
        real = getattr(target, name)

        def breaks(*arguments: Any) -> None:
            if fails != "write":
                real(*arguments)
            raise error

        with monkeypatch.context() as broken:
            broken.setattr(target, name, breaks, raising=True)
            with pytest.raises(error):
                client.put(filled(FEATURE, 2))

        drained(owner)
        assert tensor(owner.get(client.put(filled(FEATURE, 4))))[0].item() == 4
        assert attachment.holds == 0


def test_a_post_that_finds_the_ring_full_goes_by_the_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with blocking() as (owner, client):
        warm(owner, client)
        posts: PublishPosts = writer_of(client)._posts
        monkeypatch.setattr(posts._posts, "post", lambda message: False)

        ref = client.put(filled(FEATURE, 9))

        assert tensor(owner.get(ref, timeout=10.0))[0].item() == 9
        drained(owner)


def test_a_claim_comes_before_the_sessions_end_or_is_refused() -> None:
    with blocking() as (owner, client):
        warm(owner, client)
        attachment = writer_of(client).connection.attachment
        (room, *_) = writer_of(client)._rooms._rooms
        attachment.refuse(CacheClosed("over"))

        with pytest.raises(CacheClosed):
            attachment.claim(room.slot, room.generation, room.offset_bytes, room.nbytes)

        assert attachment.holds == 0


def test_a_put_under_a_key_is_the_loops() -> None:
    with blocking() as (owner, client):
        warm(owner, client)

        client.put(filled(FEATURE, 5), key=b"k")

        assert torch.equal(tensor(owner.get(b"k")), filled(FEATURE, 5))
