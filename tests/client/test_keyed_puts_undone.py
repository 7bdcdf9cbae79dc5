"""Batches under keys that fail or are cancelled late: their own features go, nobody else's."""

import asyncio
from typing import Any

import pytest

from featcache import FeatureRef, MalformedRef
from featcache.control import many
from featcache.owner.requests import RequestHandlers
from support.caches import KIB, filled, pair, steps, until
from support.keyed import nothing_lost, party
from support.slabs import same

TWO_MESSAGES = many.MAX_PUBLISHED + 1


async def test_a_batch_that_fails_late_takes_back_its_own_features_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another has put under one of its keys by then: that stays."""
    refuse = RequestHandlers._publish_many
    newer: list[FeatureRef] = []

    def fails_at_the_second(self: Any, session: int, message: many.PublishMany) -> Any:
        if len(message.members) == many.MAX_PUBLISHED:
            return refuse(self, session, message)
        newer.append(owner.put_nowait(filled(KIB, 7), key="1"))
        raise MalformedRef("not this one")

    monkeypatch.setattr(RequestHandlers, "_publish_many", fails_at_the_second)
    async with pair(slots=2 * TWO_MESSAGES) as (owner, client):
        keys = [str(n) for n in range(TWO_MESSAGES)]
        with pytest.raises(MalformedRef):
            await client.put_many([filled(1, 3)] * TWO_MESSAGES, keys=keys)
        await until(lambda: owner.statistics().keys == 1)
        assert same(await owner.get("1"), filled(KIB, 7))
        assert same(await client.get(newer[0]), filled(KIB, 7))
        await nothing_lost(owner)


async def test_a_batch_that_is_cancelled_while_it_is_published_is_kept_under_no_key() -> None:
    async with party(2) as (owner, (client, other)):
        await client.put_many([filled(KIB)], keys=["warm"])
        at = 0
        for step in range(40):
            task = asyncio.create_task(client.put_many([filled(KIB)] * 3, keys=["a", "b", None]))
            await steps(step)
            task.cancel()
            [found] = await asyncio.gather(task, return_exceptions=True)
            await other.evict("nothing")  # what it told before has been heard
            if isinstance(found, BaseException):
                assert isinstance(found, asyncio.CancelledError)
                at += 1
                await until(lambda: owner.statistics().keys == 1)
            else:
                await owner.discard(found[2])
                await owner.evict("a")
                await owner.evict("b")
        assert at
        await nothing_lost(owner)
