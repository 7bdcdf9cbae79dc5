"""Tensors of every kind that torch has, by every way in: refused, or put as what they mean.

In a process of its own, which one that is not refused would end; with what is in test_no_memory besides:
blocking objects, spilling, a GPU.
"""

import asyncio
import functools
import inspect
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef, SettingsError, content_key
from featcache.memory.pack import pack
from support.caches import KIB, filled, pair, small, tensor, until
from support.fakegpu import fake_gpu, segmented
from support.memoryless import COUNT, MEMORYLESS, ODD
from support.processes import Child, Pipe, Start, starting, warm_up

Pair = tuple[FeatureCache, FeatureClient]


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    warm_up()


@pytest.fixture
def start(no_leaks: None) -> Iterator[Start]:
    with starting() as started:
        yield started


async def there(owner: FeatureCache) -> FeatureRef:
    return await owner.put(torch.ones(COUNT))


async def kept(owner: FeatureCache) -> str:
    await owner.put(torch.ones(COUNT), key="kept")
    return "kept"


async def nowait(owner: FeatureCache, value: Any) -> FeatureRef:
    return owner.put_nowait(value)


async def into_nowait(owner: FeatureCache, out: Any) -> None:
    owner.get_nowait(await there(owner), out=out)


async def key_of(value: Any) -> bytes:
    return content_key(value)


async def into_dict(owner: FeatureCache, reader: FeatureClient, out: Any) -> None:
    ref = await owner.put({"good": torch.ones(COUNT), "bad": torch.ones(COUNT)})
    await reader.get(ref, out={"good": torch.ones(COUNT), "bad": out})


def in_dict(value: Any) -> dict[str, Any]:
    return {"good": filled(KIB), "bad": value}


async def _into(owner: FeatureCache, reader: FeatureCache | FeatureClient, out: Any) -> None:
    await reader.get(await there(owner), out=out)


async def _into_keyed(owner: FeatureCache, client: FeatureClient, out: Any) -> None:
    await client.get(await kept(owner), out=out)


WAYS: dict[str, Callable[[FeatureCache, FeatureClient, Any], Awaitable[Any]]] = {
    "put": lambda owner, _, value: owner.put(value),
    "put under a key": lambda owner, _, value: owner.put(value, key="k"),
    "put_nowait": lambda owner, _, value: nowait(owner, value),
    "put of a dict": lambda owner, _, value: owner.put(in_dict(value)),
    "get_or_put": lambda owner, _, value: owner.get_or_put("k", lambda: value),
    "spill": lambda owner, _, value: owner.put(value, on_full="spill"),
    "a client's put": lambda _, client, value: client.put(value),
    "a client's put of a dict": lambda _, client, value: client.put(in_dict(value)),
    "a client's get_or_put": lambda _, client, value: client.get_or_put("k", lambda: value),
    "content_key": lambda _, __, value: key_of(value),
    "get": _into,
    "the owner's get": lambda owner, _, out: _into(owner, owner, out),
    "get_nowait": lambda owner, _, out: into_nowait(owner, out),
    "get by key": _into_keyed,
    "get of a dict": into_dict,
}


Try = Callable[[Any], Any]


async def refusals(pipe: Pipe, ways: Mapping[str, Try]) -> None:
    """Say what each tensor met on each way; which was the last, if it ended the process."""
    for way, attempt in ways.items():
        found: dict[str, str] = {}
        for name, make in MEMORYLESS.items():
            pipe.say("trying", way, name)
            try:
                done = attempt(make())
                if inspect.isawaitable(done):
                    await done
                found[name] = "taken"
            except Exception as error:  # noqa: BLE001 - what it is is what is asked
                found[name] = type(error).__name__
        pipe.say("refused", way, found)
    pipe.say("done")


async def try_on_the_host(pipe: Pipe) -> None:
    async with (
        featcache.create(settings=small(slots=1024), spill="1MiB") as owner,
        featcache.connect(owner.endpoint, settings=small()) as client,
    ):
        ways = {way: functools.partial(call, owner, client) for way, call in WAYS.items()}
        await refusals(pipe, ways)
        ref = await owner.put(filled(KIB, 3))
        assert torch.equal(tensor(await client.get(ref)), filled(KIB, 3))


async def try_on_a_gpu(pipe: Pipe) -> None:
    with fake_gpu() as gpu:
        async with segmented(gpu) as (owner, client):
            ways: dict[str, Try] = {
                way: functools.partial(call, owner, client)
                for way, call in WAYS.items()
                if way not in {"spill", "get", "get_nowait", "content_key"}
            }
            await refusals(pipe, ways)


async def try_blocking(pipe: Pipe) -> None:
    def here() -> None:
        with (
            featcache.blocking.create(settings=small()) as owner,
            featcache.blocking.connect(owner.endpoint, settings=small()) as client,
        ):
            ways: dict[str, Try] = {
                "put": owner.put,
                "a client's put": client.put,
                "get_or_put": lambda value: client.get_or_put("k", lambda: value),
                "get": lambda out: client.get(owner.put(torch.ones(COUNT)), out=out),
            }
            asyncio.run(refusals(pipe, ways))

    await asyncio.to_thread(here)


async def answers(child: Child) -> dict[str, dict[str, str]]:
    """What a child met, by way; it has ended when this returns."""
    found: dict[str, dict[str, str]] = {}
    last: Any = None
    try:
        while (message := await child.hear())[0] != "done":
            last = message
            if message[0] == "refused":
                found[message[1]] = message[2]
    except (EOFError, ConnectionError):
        pytest.fail(f"the process ended in {last}")
    assert await child.ends() == 0
    return found


async def says(child: Child, word: str) -> None:
    """Wait for a child's one word, and its end."""
    await child.expect(word)
    assert await child.ends() == 0


PLACES = {"host": try_on_the_host, "gpu": try_on_a_gpu, "no loop": try_blocking}


@pytest.mark.parametrize("place", PLACES)
async def test_it_is_refused_by_every_way_in(start: Start, place: str) -> None:
    found = await answers(start(PLACES[place]))
    assert len(found) >= 4
    assert found == dict.fromkeys(found, dict.fromkeys(MEMORYLESS, "SettingsError"))


# --- what torch can say the value of -------------------------------------------------------------


async def value_of(pipe: Pipe, name: str) -> None:
    make = ODD[name]
    wanted = (make() + 0).detach().resolve_conj().resolve_neg().contiguous()
    async with pair() as (owner, client):
        for writer in (owner, client):
            assert torch.equal(tensor(await client.get(await writer.put(make()))), wanted)
            found = await client.get(await writer.put({"odd": make(), "good": filled(KIB, 2)}))
            assert isinstance(found, dict)
            assert torch.equal(found["odd"], wanted)
            assert torch.equal(found["good"], filled(KIB, 2))
        assert content_key(make()) == content_key(wanted)
    with fake_gpu() as gpu:
        async with segmented(gpu) as (owner, client):
            ref = await owner.put(make(), readers=2)
            assert torch.equal(tensor(await owner.get(ref, device="cpu")), wanted)
            assert torch.equal(tensor(await client.get(ref, device="cpu")), wanted)
    pipe.say("right")


@pytest.mark.parametrize("name", ODD)
async def test_a_tensor_that_means_something_is_put_as_that(start: Start, name: str) -> None:
    await says(start(value_of, name), "right")


async def test_an_out_that_goes_while_its_get_waits(start: Start) -> None:
    await says(start(lose_target), "refused")


async def lose_target(pipe: Pipe) -> None:
    with fake_gpu() as gpu:
        async with segmented(gpu) as (owner, client):
            ref = await owner.put(gpu.tensor(torch.ones(COUNT)))
            out = torch.zeros(COUNT)
            waiting = asyncio.ensure_future(client.get(ref, out=out))
            await until(lambda: client.statistics().sessions == 1 and not waiting.done())
            out.untyped_storage().resize_(0)
            gpu.run()
            with pytest.raises(SettingsError, match="out"):
                await waiting
            await client.release(ref)
    pipe.say("refused")


def test_a_fake_tensor_is_refused_without_a_word_of_torchs_own() -> None:
    with FakeTensorMode():
        fake = torch.zeros(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for feature in (fake, {"x": fake}):
            with pytest.raises(SettingsError, match="FakeTensor"):
                pack(feature, 8)


def test_a_functional_tensor_is_refused_as_what_it_is() -> None:
    def put(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(SettingsError, match=r"torch\.func"):
            pack(x, 8)
        return x

    torch.func.functionalize(put)(torch.zeros(4))
