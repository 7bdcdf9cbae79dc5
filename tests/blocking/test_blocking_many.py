"""Shares, and many at once, for code with no loop: the same calls, in the thread that makes them."""

import pytest
import torch

import featcache
from api.test_get_many import values
from blocking.test_blocking_keys import blocking, holds, threads
from featcache import FeatureTooLarge, KeyNotFound, PoolFull, SettingsError, StaleRef
from featcache.blocking.portal import Portal
from support.caches import KIB, MIB, filled, small
from support.hosted import through_host
from support.keyed import CAPACITY, ONE
from support.slabs import Slab, same

BASE = torch.arange(720, dtype=torch.float32)


@pytest.fixture(params=["owner", "client"])
def who(request: pytest.FixtureRequest) -> int:
    """Whose calls: an index into (owner, client)."""
    return ["owner", "client"].index(request.param)


def some(count: int) -> list[torch.Tensor]:
    return [filled(KIB, n) for n in range(count)]


def test_many_are_put_and_read(slab: Slab, who: int) -> None:
    with blocking(slab, slots=128) as both:
        owner, user = both[0], both[who]
        device = slab.device
        refs = user.put_many([(BASE + n).to(device) for n in range(8)], readers=2)
        for reader in both:
            found = reader.get_many(refs)
            assert all(same(one, BASE + n) for n, one in enumerate(found))
        names = [f"{n}" for n in range(8)]
        user.put_many([(BASE - n).to(device) for n in range(8)], keys=names)
        mixed = user.put_many([BASE.to(device)])
        found = user.get_many([*names, *mixed])
        assert same(found[5], BASE - 5)
        assert same(found[8], BASE)
        assert user.contains_many([*names, "x"]) == [True] * 8 + [False]
        assert user.put_many([]) == user.get_many([]) == user.contains_many([]) == []
        for name in names:
            assert owner.evict(name)
        holds(owner, lambda now: now.slots_used == 0)


def test_a_share_is_read_in_any_thread(slab: Slab, who: int) -> None:
    with blocking(slab) as both, threads() as run:
        owner, user = both[0], both[who]
        owner.put(BASE.to(slab.device), key="a")
        refs = [user.share("a", readers=2) for _ in range(4)]
        assert len({ref.slot for ref in refs}) == 4
        assert owner.evict("a")
        for reader in both:
            found = [run(reader.get, ref) for ref in refs]
            assert all(same(one.result(), BASE) for one in found)
        with pytest.raises(KeyNotFound):
            user.share("a", readers=1)
        holds(owner, lambda now: now.slots_used == 0)


def test_a_failed_member_says_which(who: int) -> None:
    with blocking() as both:
        user = both[who]
        refs = user.put_many(some(3))
        user.discard(refs[1])
        with pytest.raises(StaleRef, match="member 2 of 3") as stale:
            user.get_many(refs)
        assert stale.value.member == 1
        with pytest.raises(KeyNotFound, match="member 2 of 2, key 'x'") as missing:
            user.get_many([refs[0], "x"])
        assert missing.value.member == 1
        with pytest.raises(SettingsError, match="member 2 of 2") as wrong:
            user.put_many([filled(1), 3])  # type: ignore[list-item]
        assert wrong.value.member == 1
        with pytest.raises(FeatureTooLarge, match="member 1 of 1") as large:
            user.put_many([filled(MIB + 1)])
        assert large.value.member == 0
        assert values(user.get_many([refs[0], refs[2]])) == [0, 2]
        holds(both[0], lambda now: now.slots_used == 0)


def test_all_wait_for_the_room_of_all(who: int) -> None:
    with blocking(**ONE) as both, threads() as run:
        ref = both[0].put(filled(CAPACITY))
        with pytest.raises(PoolFull):
            both[who].put_many(some(2), on_full="raise")
        waiting = run(both[who].put_many, some(3), timeout=30.0)
        holds(both[0], lambda now: now.waiters == 1)
        both[1].release(ref)
        assert values(both[1].get_many(waiting.result())) == [0, 1, 2]
        holds(both[0], lambda now: now.slots_used == 0)


def test_what_comes_through_host_memory() -> None:
    with (
        featcache.blocking.create(settings=small()) as owner,
        featcache.blocking.connect(owner.endpoint, settings=through_host()) as client,
    ):
        refs = owner.put_many(some(3))
        owner.put(filled(KIB, 9), key="k")
        assert values(client.get_many([*refs, "k"])) == [0, 1, 2, 9]
        again = client.put_many(some(3), keys=["a", None, "c"])
        assert values(owner.get_many(["a", again[1], "c"])) == [0, 1, 2]
        assert owner.statistics().relayed == 4
        holds(owner, lambda now: now.slots_used == 3)


def test_what_the_key_table_tells_enters_no_loop(who: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with blocking() as both:
        both[0].put(BASE, key="a")
        assert same(both[who].get("a"), BASE)

        def enter(*_: object) -> None:
            raise AssertionError("the loop was entered")

        with monkeypatch.context() as patched:
            patched.setattr(Portal, "call", enter)
            assert both[who].contains_many(["a", b"b", "a"]) == [True, False, True]
            with pytest.raises(KeyNotFound):
                both[who].get("b")
        holds(both[0], lambda now: (now.hits, now.misses) == (1, 1))
