"""What a stale ref says to the one that reads it: which of its ends it was, and what to do."""

from collections.abc import Awaitable, Callable

import pytest

from featcache import FeatureCache, FeatureClient, FeatureRef, StaleRef
from support.caches import KIB, filled, pair, spent, until

Call = Callable[[FeatureRef], Awaitable[object]]


async def why(call: Call, ref: FeatureRef) -> str:
    with pytest.raises(StaleRef) as raised:
        await call(ref)
    return str(raised.value)


async def end(how: str, owner: FeatureCache, client: FeatureClient) -> FeatureRef:
    """Put a feature and have its ref end so."""
    ref = await owner.put(filled(KIB), ttl=0.01 if how == "expired" else None)
    if how == "discarded":
        await client.discard(ref)
    elif how == "paid":
        await client.get(ref)
    await until(lambda: owner.statistics().recycled == 1)
    return ref


@pytest.mark.parametrize("how", ["expired", "discarded", "paid"])
@pytest.mark.parametrize("reused", [False, True], ids=["gone", "its slot reused"])
async def test_the_owner_knows_which_it_was(how: str, reused: bool) -> None:
    async with pair() as (owner, client):
        ref = await end(how, owner, client)
        if reused:
            assert (await owner.put(filled(KIB))).slot == ref.slot
        others = {"expired", "discarded", "recycled"} - {"recycled" if how == "paid" else how}
        for call in (owner.get, owner.release, owner.discard, client.discard):
            message = await why(call, ref)
            assert how in message
            assert "put" in message.partition(": ")[2]
            assert not any(f" {other} " in message for other in others), message


async def test_a_session_that_paid_is_told_so() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(KIB), readers=2)
        await client.get(ref)
        assert "paid by this session" in await why(client.get, ref)
        await owner.get(ref)
        await spent(owner)
        assert "paid by this session" in await why(owner.get, ref)


async def test_a_client_says_what_it_can_see() -> None:
    async with pair() as (owner, client):
        ref = await owner.put(filled(KIB), ttl=None)
        await owner.discard(ref)
        message = await why(client.get, ref)
        assert "was discarded" in message
        assert "put the feature again" in message
        await spent(owner)
        assert (await owner.put(filled(KIB))).slot == ref.slot
        assert "was discarded" in await why(client.get, ref)
