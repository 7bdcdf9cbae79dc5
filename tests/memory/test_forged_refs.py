"""Refs with valid checksums that contradict the pool: refused before a byte is read."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from featcache import FeatureCache, FeatureClient, FeatureRef, MalformedRef, StaleRef, UnknownPool
from featcache.memory.host.slab import HostMapping
from featcache.ref import TensorSpec
from support.caches import filled, pair, tensor

NBYTES = 4096
Pool = tuple[FeatureCache, FeatureClient, FeatureRef]


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[Pool]:
    async with pair() as (owner, client):
        await owner.put(filled(NBYTES, 1), ttl=None)
        ref = await owner.put(filled(NBYTES, 2), readers=2)
        await owner.put(filled(NBYTES, 3), ttl=None)
        yield owner, client, ref


def bare(nbytes: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec(None, "uint8", (nbytes,), 0),)


FORGED: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "extent of the neighbour": ({"offset_bytes": 0}, MalformedRef),
    "extent moved by a byte": ({"offset_bytes": NBYTES + 1}, MalformedRef),
    "extent at the slab's end": ({"offset_bytes": 1 << 20}, MalformedRef),
    "extent far outside the slab": ({"offset_bytes": 1 << 48}, MalformedRef),
    "extent grown by a byte": ({"nbytes": NBYTES + 1, "specs": bare(NBYTES + 1)}, MalformedRef),
    "extent over the whole slab": (
        {"offset_bytes": 0, "nbytes": 1 << 20, "specs": bare(1 << 20)},
        MalformedRef,
    ),
    "extent of no bytes": ({"nbytes": 0, "specs": bare(0)}, MalformedRef),
    "huge extent": ({"nbytes": 1 << 48, "specs": bare(1 << 48)}, MalformedRef),
    "the neighbour's slot": ({"slot": 0}, MalformedRef),
    "a slot that is free": ({"slot": 63}, StaleRef),
    "a slot beyond the table": ({"slot": 64}, MalformedRef),
    "the last slot there can be": ({"slot": (1 << 32) - 1}, MalformedRef),
    "the next generation": ({"generation": 2}, StaleRef),
    "the last generation": ({"generation": (1 << 63) - 1}, StaleRef),
    "another pool": ({"pool_id": bytes(16)}, UnknownPool),
}


@pytest.mark.parametrize("name", FORGED)
async def test_forged(pool: Pool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, client, ref = pool
    changes, error = FORGED[name]
    forged = FeatureRef.from_bytes(msgspec.structs.replace(ref, **changes).to_bytes())
    with monkeypatch.context() as patch:
        for name_of_read in ("view", "read"):
            patch.setattr(
                HostMapping, name_of_read, lambda *_: pytest.fail("it read bytes of the slab")
            )
        for reader in (owner, client):
            with pytest.raises(error):
                await reader.get(forged)
            with pytest.raises(error):
                reader.get_nowait(forged)
            with pytest.raises(error):
                async with reader.borrow(forged):
                    pass
            with pytest.raises(error), reader.borrow(forged):
                pass
            with pytest.raises(error):
                await reader.release(forged)
    # Nothing was paid by that, and nothing is held.
    assert owner.statistics().slots_used == 3
    for reader in (owner, client):
        assert (tensor(await reader.get(ref)) == 2).all()


async def test_the_extent_may_hold_less_than_it_says(pool: Pool) -> None:
    """A part of what was put, or another view of it, is no forgery: it lies within the extent."""
    _, client, ref = pool
    spec = TensorSpec(None, "int16", (7, 3), 256)
    other = FeatureRef.from_bytes(msgspec.structs.replace(ref, specs=(spec,)).to_bytes())
    assert (tensor(await client.get(other)) == 0x0202).all()


@pytest.mark.parametrize("name", FORGED)
async def test_an_owner_discards_no_forged_ref(pool: Pool, name: str) -> None:
    owner, client, ref = pool
    changes, error = FORGED[name]
    with pytest.raises(error):
        await owner.discard(msgspec.structs.replace(ref, **changes))
    for reader in (owner, client):
        await reader.get(ref)  # none of its reads was taken back
    assert owner.statistics().discarded == 0


@pytest.mark.parametrize("name", ["the neighbour's slot", "a slot that is free"])
async def test_a_forged_discard(pool: Pool, name: str) -> None:
    owner, client, ref = pool
    forged = msgspec.structs.replace(ref, generation=9, slot=FORGED[name][0]["slot"])
    for revoker in (owner, client):
        with pytest.raises(StaleRef):
            await revoker.discard(forged)
    assert owner.statistics().slots_used == 3
