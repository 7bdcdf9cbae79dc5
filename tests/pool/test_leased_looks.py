"""What an owner's look at lease entries costs, whatever a session wrote there."""

import contextlib
import random
from collections import Counter

import pytest
import torch

from featcache import FeatureCache, PoolFull
from featcache.memory.key_table import place_of
from featcache.memory.words import Counts
from featcache.pool.page import SessionPage
from support.caches import KIB
from support.keyed import nothing_lost, page_of, party, pool_of

FEATURES = 40


async def fill(owner: FeatureCache) -> None:
    for number in range(FEATURES):
        await owner.put(torch.full((KIB,), number, dtype=torch.uint8), key=f"{number}", readers=0)


async def test_a_search_for_victims_looks_at_each_sessions_entries_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A session may have thousands of entries in use: a look for each feature would hold up the loop."""
    looks: Counter[int] = Counter()
    look = SessionPage.leased

    def counted(page: SessionPage) -> object:
        looks[page.session] += 1
        return look(page)

    async with party(2, capacity=FEATURES * KIB, segment=FEATURES * KIB) as (owner, clients):
        await fill(owner)
        with contextlib.ExitStack() as held:
            for number in range(FEATURES):
                reader = clients[number % 2]
                await reader.contains("0")  # it is attached
                held.enter_context(reader.borrow(f"{number}"))
            monkeypatch.setattr(SessionPage, "leased", counted)
            with pytest.raises(PoolFull):
                await owner.put(torch.zeros(KIB, dtype=torch.uint8), on_full="raise")
            assert looks, "it looked for one that nobody reads"
            assert max(looks.values()) <= 4
            monkeypatch.undo()
        await nothing_lost(owner)


@pytest.mark.parametrize("what", ["noise", "ones", "all in use", "stale"])
async def test_a_session_whose_words_are_anything_keeps_only_what_it_names(what: str) -> None:
    """It holds up no other session, and once it has ended nothing is left of it."""
    chance = random.Random(what)
    async with party(2, capacity=FEATURES * KIB, segment=FEATURES * KIB, grants=64) as (
        owner,
        (hostile, other),
    ):
        await fill(owner)
        for user in (hostile, other):
            await user.get("0")
        words = page_of(owner, 1).words
        for _ in range(20):
            live = list(pool_of(owner).store.table.in_use())
            for index in range(64):
                slot = chance.choice(live)
                place = place_of(slot.index, slot.generation + (what == "stale"))
                noise = chance.getrandbits(64)
                words.lease[index] = {"noise": noise, "ones": (1 << 64) - 1}.get(what, place)
                words.serial[index] = noise if what in {"noise", "ones"} else 2 + index
            for index in range(len(words.used)):
                words.used[index] = chance.getrandbits(64)
            words.header[Counts.LEASES_HIGH] = chance.choice([64, 65, chance.getrandbits(64)])
            for number in range(5):
                with contextlib.suppress(PoolFull):
                    await owner.put(
                        torch.full((2 * KIB,), number, dtype=torch.uint8),
                        key=f"{number}",
                        readers=0,
                        on_full="raise",
                    )
                if await other.contains(f"{number}"):
                    found = await other.get(f"{number}")
                    assert isinstance(found, torch.Tensor)
                    assert (found == number).all()
            owner.statistics()
        await hostile.aclose()
        page = pool_of(owner).pages
        assert list(page) == [2]
        await nothing_lost(owner)
