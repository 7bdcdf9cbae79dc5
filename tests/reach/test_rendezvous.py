"""Which host is the home of a key."""

from collections import Counter

from featcache.reach.rendezvous import Ranking

ADDRESSES = [f"10.0.0.{n}:7400" for n in range(1, 6)]
KEYS = [b"key %d" % n for n in range(5000)]
SECRET = b"a key of the cluster"


def test_all_hosts_come_to_the_same_order_whatever_that_of_their_lists() -> None:
    there, here = Ranking(SECRET, ADDRESSES), Ranking(SECRET, [*ADDRESSES[::-1], ADDRESSES[2]])
    assert all(there.of(key) == here.of(key) for key in KEYS)
    assert sorted(there.of(b"k")) == sorted(ADDRESSES)


def test_each_host_is_the_home_of_its_share_of_the_keys() -> None:
    ranking = Ranking(SECRET, ADDRESSES)
    for place in range(2):
        counts = Counter(ranking.of(key)[place] for key in KEYS)
        assert all(850 < counts[address] < 1150 for address in ADDRESSES)


def test_without_one_host_only_its_keys_move_and_they_spread() -> None:
    before, after = Ranking(SECRET, ADDRESSES), Ranking(SECRET, ADDRESSES[1:])
    moved = Counter[str]()
    for key in KEYS:
        home, stand_in = before.of(key)[:2]
        assert after.of(key)[0] == (stand_in if home == ADDRESSES[0] else home)
        if home == ADDRESSES[0]:
            moved[stand_in] += 1
    assert len(moved) == len(ADDRESSES) - 1
    assert max(moved.values()) < 2 * min(moved.values())


def test_another_cluster_key_is_another_order() -> None:
    one, other = Ranking(SECRET, ADDRESSES), Ranking(b"another", ADDRESSES)
    same = sum(one.of(key)[0] == other.of(key)[0] for key in KEYS)
    assert same < len(KEYS) / 3
