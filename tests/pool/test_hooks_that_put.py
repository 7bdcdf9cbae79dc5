"""A hook that is told of an eviction may use the cache: all that went with it is carried out by then."""

import torch

from featcache import FeatureRef, events
from featcache.events import Event, KeyEvicted
from support.caches import KIB, tensor
from support.keyed import nothing_lost, party, pool_of

FEATURES = 8


def full_of(value: int, units: int = 1) -> torch.Tensor:
    return torch.full((units * KIB,), value, dtype=torch.uint8)


async def test_a_put_by_a_hook_takes_no_slot_that_can_still_be_read() -> None:
    refs: list[FeatureRef] = []
    async with party(1, capacity=FEATURES * KIB, segment=FEATURES * KIB) as (owner, (client,)):
        for number in range(FEATURES):
            await owner.put(full_of(number), key=f"{number}", readers=0)
        await client.get("0")
        pool = pool_of(owner)

        def put(event: Event) -> None:
            if isinstance(event, KeyEvicted) and not refs:
                for slot in pool.store.first_retiring(FEATURES):
                    assert pool.words.live[slot.index] != slot.generation, "it can be recycled"
                refs.append(owner.put_nowait(full_of(99), key="new"))

        events.add_hook(put)
        try:
            await owner.put(full_of(7, 4), key="large", readers=0)
        finally:
            events.remove_hook(put)
        for user in (owner, client):
            assert tensor(user.get_nowait("new"))[0] == 99
            assert tensor(user.get_nowait("large"))[0] == 7
        assert tensor(await client.get(refs[0]))[0] == 99
        await nothing_lost(owner)
