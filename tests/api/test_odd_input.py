"""Odd input is refused at once, by an error that says what to do; and no session ends by it."""

import copy
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
import torch

import featcache
from featcache import (
    CacheClosed,
    FeatureCache,
    FeatureClient,
    FeatureRef,
    KeyNotFound,
    PutTimeout,
    SettingsError,
)
from support.caches import KIB, filled, full, pair, small, spent, tensor, tensors

Pair = tuple[FeatureCache, FeatureClient]
User = FeatureCache | FeatureClient
LONE = "a\ud800"


@pytest_asyncio.fixture
async def both() -> AsyncIterator[Pair]:
    """An owner and a client, both of which can still be used after the test."""
    async with pair() as (owner, client):
        yield owner, client
        for user in (owner, client):
            await user.get(await user.put(filled(KIB)))
        assert owner.statistics().sessions == 1
        await spent(owner)


@pytest.mark.parametrize("dims", [65, 300, 1024])
async def test_a_tensor_of_many_dimensions(both: Pair, dims: int) -> None:
    owner, client = both
    value = torch.arange(6.0).reshape([3, *[1] * (dims - 2), 2])
    for writer in (owner, client):
        for given in (value, value.transpose(0, -1), value[..., ::2]):
            ref = FeatureRef.from_bytes((await writer.put(given, readers=2)).to_bytes())
            async with owner.borrow(ref) as view:
                assert torch.equal(tensor(view), given)
            assert torch.equal(tensor(await client.get(ref)), given)


BAD_PUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "1025 dimensions": (torch.ones(1).reshape([1] * 1025), {}),
    "more bytes than 63 bits": (torch.ones(1).expand(1 << 61), {}),
    "an empty shape that overflows": (torch.empty(0, 1 << 31, 1 << 31), {}),
    "a name that is no text": ({LONE: torch.ones(1)}, {}),
    "a ref that would be too long": ({f"{'n' * 250}{n}": torch.ones(1) for n in range(256)}, {}),
    "a reader that is no text": (torch.ones(1), {"readers": ["tp0", LONE]}),
    "on_full in a list": (torch.ones(1), {"on_full": ["wait"]}),
    "on_full in a dict": (torch.ones(1), {"on_full": {}}),
    "no on_full": (torch.ones(1), {"on_full": None}),
}


@pytest.mark.parametrize("name", BAD_PUTS)
async def test_puts_that_are_refused_when_they_are_given(both: Pair, name: str) -> None:
    feature, how = BAD_PUTS[name]
    refusal = featcache.FeatureTooLarge if "more bytes" in name else SettingsError
    for writer in both:
        with pytest.raises(refusal):
            await writer.put(feature, **how)
    if "on_full" not in how:
        with pytest.raises(refusal):
            both[0].put_nowait(feature, **how)
    assert both[0].statistics().puts == 0


async def test_many_tensors_whose_ref_is_not_too_long(both: Pair) -> None:
    owner, client = both
    feature = {f"{n}" + "é" * 100: torch.full((n,), n) for n in range(200)}
    for writer in (owner, client):
        ref = await writer.put(feature, readers=1)
        found = tensors(await client.get(FeatureRef.from_bytes(ref.to_bytes())))
        assert all(torch.equal(found[name], value) for name, value in feature.items())


@pytest.mark.parametrize("make", [None, 3, torch.ones(1), "make"], ids=repr)
async def test_what_can_make_nothing(both: Pair, make: Any) -> None:
    owner, client = both
    await owner.put(filled(KIB), key="there")
    for user in (owner, client):
        for key in ("there", "not there"):
            with pytest.raises(SettingsError, match="make is a function"):
                await user.get_or_put(key, make)
    await owner.evict("there")


@pytest.mark.parametrize("timeout", ["x", -1, float("nan"), [], float("inf")], ids=repr)
async def test_times_that_are_none(both: Pair, timeout: Any) -> None:
    with pytest.raises(SettingsError, match="timeout"):
        await both[0].pressure.below("high", timeout=timeout)


async def test_keys_that_are_no_text(both: Pair) -> None:
    calls: list[Callable[[User], Awaitable[Any]]] = [
        lambda user: user.put(filled(1), key=LONE),
        lambda user: user.get(LONE),
        lambda user: user.get_or_put(LONE, lambda: filled(1)),
        *(
            lambda user, name=name: getattr(user, name)(LONE)
            for name in ("contains", "evict", "pin", "unpin")
        ),
    ]
    for user in both:
        for call in calls:
            with pytest.raises(SettingsError, match="lone surrogate"):
                await call(user)
        with pytest.raises(SettingsError, match="lone surrogate"):
            user.borrow(LONE)


async def test_another_cpu(both: Pair) -> None:
    ref = await both[0].put(filled(1))
    for user in both:
        for device in ("cpu:1", torch.device("cpu", 1)):
            with pytest.raises(SettingsError, match="one 'cpu'"):
                await user.get(ref, device=device)
            with pytest.raises(SettingsError, match="one 'cpu'"):
                user.get_nowait(ref, device=device)
            with pytest.raises(SettingsError, match="one 'cpu'"):
                await user.get_or_put("k", lambda: filled(1), device=device)
    await both[1].get(ref, device="cpu:0")


@pytest.mark.parametrize("device", [LONE, "cpu:x", "", "meta", 1.5, []], ids=repr)
async def test_a_device_that_is_none(both: Pair, device: Any) -> None:
    ref = await both[0].put(filled(1))
    for user in both:
        with pytest.raises(SettingsError, match="device="):
            await user.get(ref, device=device)
        with pytest.raises(SettingsError, match="device="):
            user.get_nowait(ref, device=device)
    for make in (featcache.create, featcache.connect, featcache.blocking.create):
        with pytest.raises(SettingsError, match="device="):
            make(device=device)
    await both[1].get(ref)


def test_a_key_that_is_no_text_where_there_is_no_loop() -> None:
    calls: list[Callable[[Any], Any]] = [
        lambda user: user.put(filled(1), key=LONE),
        lambda user: user.get(LONE),
        lambda user: user.borrow(LONE).__enter__(),
        lambda user: user.get_or_put(LONE, lambda: filled(1)),
        *(
            lambda user, name=name: getattr(user, name)(LONE)
            for name in ("contains", "evict", "pin", "unpin")
        ),
    ]
    with (
        featcache.blocking.create(settings=small()) as owner,
        featcache.blocking.connect(owner.endpoint, settings=small()) as client,
    ):
        for user in (owner, client):
            for call in calls:
                with pytest.raises(SettingsError, match="lone surrogate"):
                    call(user)


async def test_a_long_key_is_cut_in_what_is_said_of_it(both: Pair) -> None:
    calls: list[Callable[[User], Awaitable[Any]]] = [
        lambda user: user.pin("k" * 1000),
        lambda user: user.unpin("k" * 1000),
        lambda user: user.get("k" * 1000),
    ]
    for user in both:
        for call in calls:
            with pytest.raises(KeyNotFound) as raised:
                await call(user)
            assert len(str(raised.value)) < 120


async def test_an_owner_that_takes_fewer_tensors() -> None:
    async with (
        featcache.create(settings=small(tensors=2)) as owner,
        featcache.connect(owner.endpoint, settings=small()) as client,
    ):
        with pytest.raises(SettingsError, match="at most 2"):
            await client.put({f"{n}": filled(1) for n in range(3)})
        await client.get(await client.put({f"{n}": filled(1) for n in range(2)}))
        await spent(owner)


async def test_a_put_does_not_count_itself_among_those_that_wait(both: Pair) -> None:
    owner, client = both
    ref = await full(owner)
    for timeout in (0, 0.01):
        with pytest.raises(PutTimeout, match="and 0 puts wait"):
            await owner.put(filled(1), timeout=timeout)
    await client.release(ref)


async def test_what_is_one_processs_is_not_pickled(both: Pair) -> None:
    owner, client = both
    wholes: list[object] = [
        *(owner, client),
        *(featcache.create(settings=small()), featcache.connect()),
        *(featcache.blocking.create(settings=small()), featcache.blocking.connect()),
    ]
    for whole in wholes:
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=r"connect\(endpoint\)"):
                way(whole)


# --- with no loop --------------------------------------------------------------------------------


def is_open(user: featcache.blocking.FeatureCache | featcache.blocking.FeatureClient) -> bool:
    return user.is_open


def test_what_is_said_of_blocking_ones() -> None:
    owner = featcache.blocking.create(settings=small())
    assert not is_open(owner)
    assert repr(owner) == "<blocking.FeatureCache on cpu: not opened yet: use 'with', or open()>"
    calls: list[Callable[[], Any]] = [
        lambda: owner.put(filled(1)),
        lambda: owner.put_nowait(filled(1)),
        lambda: owner.get("key"),
        lambda: owner.borrow("key"),
        lambda: owner.endpoint,
        lambda: owner.pressure.level,
        owner.statistics,
        lambda: featcache.blocking.connect().get("key"),
    ]
    for call in calls:
        with pytest.raises(CacheClosed, match="use 'with', or open"):
            call()
    with owner:
        assert is_open(owner)
        assert repr(owner) == f"<blocking.FeatureCache on cpu: {owner.endpoint}>"
        client = featcache.blocking.connect(owner.endpoint, name="tp0")
        assert not is_open(client)
        with client:
            assert is_open(client)
            assert repr(client) == f"<blocking.FeatureClient tp0 of {owner.endpoint}>"
        assert not is_open(client)
        with pytest.raises(CacheClosed, match="was closed"):
            client.get("key")
    assert not is_open(owner)
    assert "was closed" in repr(owner)
    with pytest.raises(CacheClosed, match="opens once"):
        owner.open()


def test_odd_input_of_blocking_ones() -> None:
    wrong: Any = None
    with (
        featcache.blocking.create(settings=small()) as owner,
        featcache.blocking.connect(owner.endpoint, settings=small()) as client,
    ):
        for user in (owner, client):
            with pytest.raises(SettingsError, match="make is a function"):
                user.get_or_put("key", wrong)
            on_full: Any
            for on_full in (["wait"], None):
                with pytest.raises(SettingsError, match="on_full"):
                    user.put(filled(1), on_full=on_full)
        with pytest.raises(SettingsError, match="timeout"):
            owner.pressure.below("high", timeout=-1)
        owner.put(filled(KIB, 3), key="key")
        with client.borrow("key") as view:  # it has a loop to look the key up in
            assert (tensor(view) == 3).all()
