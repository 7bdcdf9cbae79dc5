"""A client says how a ref ended, by its slot's words: without a message, whatever the owner does."""

import pytest

from featcache import FeatureRef, StaleRef
from support.caches import KIB, filled, pair, until


async def test_a_client_tells_the_endings_apart() -> None:
    async with pair(capacity=256 * KIB) as (owner, client):
        await client.get(await owner.put(filled(16)))
        paid = await owner.put(filled(16))
        await client.get(paid)
        await until(lambda: owner.statistics().slots_used == 0)

        async def told(ref: FeatureRef, why: str) -> None:
            await until(lambda: owner.statistics().slots_used == 0)
            with pytest.raises(StaleRef, match=why):
                client.get_nowait(ref)
            with pytest.raises(StaleRef, match=why):
                await client.get(ref)

        await told(paid, "was paid by this session already")
        discarded = await owner.put(filled(16))
        await owner.discard(discarded)
        await told(discarded, "was discarded")
        await told(await owner.put(filled(16), ttl=0.01), "expired with reads unpaid")
        evicted = await owner.put(filled(16), key="k")
        await owner.evict("k")
        await told(evicted, "was evicted")
        replaced = await owner.put(filled(16), key="r")
        await owner.put(filled(16), key="r")
        with pytest.raises(StaleRef, match="was replaced"):
            client.get_nowait(replaced)


async def test_a_ref_that_was_paid_is_told_from_one_that_ended_before_the_last_of_its_slot() -> (
    None
):
    async with pair(capacity=256 * KIB, slots=2) as (owner, client):
        await owner.discard(await owner.put(filled(16), readers=["nobody"]))
        await until(lambda: owner.statistics().slots_used == 0)
        paid = await owner.put(filled(16))
        await owner.get(paid)
        await until(lambda: owner.statistics().slots_used == 0)
        with pytest.raises(StaleRef, match="every read that it owed was paid:"):
            client.get_nowait(paid)
        last = await owner.put(filled(16))
        await owner.discard(last)
        with pytest.raises(StaleRef, match="recycled"):
            client.get_nowait(paid)
        with pytest.raises(StaleRef, match="was discarded"):
            client.get_nowait(last)
