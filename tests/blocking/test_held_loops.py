"""A blocking call that would wait for the loop of its own thread is refused at once."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import featcache
from featcache import FeatureRef, WrongLoop, events
from featcache.blocking import FeatureClient
from support.caches import KIB, filled, small

pytestmark = pytest.mark.usefixtures("no_leaks")


def _borrowed(client: FeatureClient, what: FeatureRef | str) -> None:
    with client.borrow(what):
        pass


CALLS: dict[str, Callable[[FeatureClient, FeatureRef], Any]] = {
    "put": lambda client, _: client.put(filled(1)),
    "get of a key": lambda client, _: client.get("k", timeout=20),
    "borrow of a key": lambda client, _: _borrowed(client, "k"),
    "get_or_put": lambda client, _: client.get_or_put("k", lambda: filled(1)),
    "release": lambda client, ref: client.release(ref),
    "discard": lambda client, ref: client.discard(ref),
    "evict": lambda client, _: client.evict("k"),
    "pin": lambda client, _: client.pin("k"),
    "unpin": lambda client, _: client.unpin("k"),
    "close": lambda client, _: client.close(),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_client_in_the_thread_of_its_owners_loop(call: str) -> None:
    async with featcache.create(settings=small()) as owner:
        ref = await owner.put(filled(KIB), readers=2)
        with pytest.raises(WrongLoop, match=r"'MainThread'.*featcache\.connect"):
            featcache.blocking.connect(owner.endpoint, settings=small()).open()
        client = featcache.blocking.connect(owner.endpoint, settings=small())
        await asyncio.to_thread(client.open)
        with pytest.raises(WrongLoop, match=r"'MainThread'.*featcache\.connect"):
            CALLS[call](client, ref)
        client.get(ref)  # enters no loop
        assert not client.contains("k")  # nor does a look at the key table
        assert client.statistics().gets == 1  # only its own
        await asyncio.to_thread(client.put, filled(1))
        await asyncio.to_thread(client.close)
        assert owner.statistics().sessions == 0


async def test_a_client_that_would_attach_to_it_at_a_ref() -> None:
    async with featcache.create(settings=small()) as owner:
        ref = await owner.put(filled(KIB))
        with featcache.blocking.connect(settings=small()) as client:  # of no owner yet
            for call in (client.get, client.release, client.discard):
                with pytest.raises(WrongLoop):
                    call(ref)
            with pytest.raises(WrongLoop):
                _borrowed(client, ref)
            await asyncio.to_thread(client.get, ref)
            with pytest.raises(WrongLoop):
                client.close()
            await asyncio.to_thread(client.close)


async def test_by_another_spelling_of_its_endpoint(runtime_dir: Path) -> None:
    async with featcache.create(settings=small()) as owner:
        link = runtime_dir / "link"
        link.symlink_to(owner.endpoint)
        for spelling in (str(link), f"{runtime_dir}/featcache/./{Path(owner.endpoint).name}"):
            with pytest.raises(WrongLoop):
                featcache.blocking.connect(spelling, settings=small()).open()


async def test_in_another_loops_thread_it_waits() -> None:
    """As in the cells of a notebook, whose loop has nothing else to do."""
    with (
        featcache.blocking.create(settings=small()) as owner,
        featcache.blocking.connect(owner.endpoint, settings=small()) as client,
    ):
        client.get(owner.put(filled(KIB)))
    async with featcache.create(settings=small()), featcache.connect():
        with featcache.blocking.create(settings=small()) as other:  # another owner than this loop's
            other.get(other.put(filled(KIB)))


def test_a_hook_that_calls_into_its_own_loop() -> None:
    errors: list[BaseException] = []
    with featcache.blocking.create(settings=small()) as owner:

        def hook(event: events.Event) -> None:
            if not isinstance(event, events.ReaderAttached):
                return
            assert owner.statistics().puts == 0
            assert owner.pressure.level == "normal"
            for call in (lambda: owner.contains("k"), lambda: owner.put(filled(1)), owner.close):
                try:
                    call()
                except WrongLoop as error:
                    errors.append(error)
            with pytest.raises(WrongLoop):
                featcache.blocking.connect(owner.endpoint).open()

        events.add_hook(hook)
        try:
            with featcache.blocking.connect(owner.endpoint, settings=small()):
                pass
        finally:
            events.remove_hook(hook)
        assert ["own event loop" in str(error) for error in errors] == [True] * 3
        owner.put(filled(1))
