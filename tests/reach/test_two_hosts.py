"""Two hosts as namespaces of this machine, over TCP and NIXL: what holds there, and when it is cut."""

import signal
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from reach.host_program import crc, feature
from reach.netns import HostProcess, TwoHosts, missing, no_netem, two_hosts
from reach.test_nixl import INSTALLED

WHY_NOT = "NIXL is not installed: pip install 'featcache[reach]'" if not INSTALLED else missing()
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(120),
]
NO_NETEM = WHY_NOT or no_netem()
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def fake_plane() -> None:
    """The real one."""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as made:
        yield made


def put(home: HostProcess, nbytes: int, seed: int, readers: int = 1) -> str:
    ref: str = home.ask("put", nbytes=nbytes, seed=seed, readers=readers)
    return ref


def read(reader: HostProcess, ref: str, nbytes: int, seed: int, ranks: int = 1) -> None:
    got = reader.ask("get", ref=ref, ranks=ranks)
    assert got == [crc(feature(nbytes, seed))] * ranks


def test_four_ranks_of_another_host_read_one_transfer(hosts: TwoHosts) -> None:
    home, reader = hosts.start(0), hosts.start(1, ranks=4)
    for seed, nbytes in enumerate((1, 64 * KIB, MIB, 9 * MIB + 5)):
        ref = put(home, nbytes, seed, readers=4)
        assert len(bytes.fromhex(ref)) <= 150
        read(reader, ref, nbytes, seed, ranks=4)
        assert reader.ask("fetched") == seed + 1
    home.wait_until_empty()
    reader.wait_until_empty()


@pytest.mark.skipif(NO_NETEM is not None, reason=str(NO_NETEM))
def test_a_slow_link_that_loses_packets_loses_no_byte(hosts: TwoHosts) -> None:
    home, reader = hosts.start(0), hosts.start(1, ranks=1)
    hosts.netem("delay", "2ms", "1ms", "loss", "1%")
    for seed in range(5):
        ref = put(home, 100 * KIB + seed, seed)
        read(reader, ref, 100 * KIB + seed, seed)
    home.wait_until_empty()
    reader.wait_until_empty()


@pytest.mark.parametrize("how", ["stopped", "link down", "packets lost"])
def test_a_home_that_is_cut_off_is_lost_and_comes_back(hosts: TwoHosts, how: str) -> None:
    home, reader = hosts.start(0), hosts.start(1, ranks=1)
    read(reader, put(home, MIB, 1), MIB, 1)
    cuts: dict[str, Callable[[], object]] = {
        "stopped": partial(home.signal, signal.SIGSTOP),
        "link down": partial(hosts.link, "down"),
        "packets lost": hosts.misdirect,
    }
    mends: dict[str, Callable[[], object]] = {
        "stopped": partial(home.signal, signal.SIGCONT),
        "link down": partial(hosts.link, "up"),
        "packets lost": hosts.redirect,
    }
    second, third = put(home, MIB, 2), put(home, 3 * MIB, 3)
    cuts[how]()
    reader.begin("get", ref=second, ranks=1)
    assert reader.end()["error"] in ("OwnerLost", "OwnerUnreachable")
    reader.begin("get", ref=third, ranks=1)
    assert reader.end()["error"] in ("OwnerLost", "OwnerUnreachable")
    mends[how]()
    answer = {}
    while "result" not in answer:  # the link may take a moment to be up
        reader.begin("get", ref=third, ranks=1)
        answer = reader.end()
        assert answer.get("error", "OwnerLost") in ("OwnerLost", "OwnerUnreachable", "StaleRef")
        if answer.get("error") == "StaleRef":  # its lease had ended: the read was paid for it
            break
    fourth = put(home, 2 * MIB, 4)
    read(reader, fourth, 2 * MIB, 4)
    reader.wait_until_empty()


def test_a_home_that_is_killed_is_lost_and_another_takes_its_address(hosts: TwoHosts) -> None:
    home, reader = hosts.start(0), hosts.start(1, ranks=1)
    read(reader, put(home, MIB, 1), MIB, 1)
    ref = put(home, MIB, 2)
    home.signal(signal.SIGKILL)
    reader.begin("get", ref=ref, ranks=1)
    assert reader.end()["error"] in ("OwnerLost", "OwnerUnreachable")
    again = hosts.start(0)
    read(reader, put(again, MIB, 3), MIB, 3)
    reader.begin("get", ref=ref, ranks=1)
    assert reader.end()["error"] == "OwnerLost"
    again.wait_until_empty()
    reader.wait_until_empty()


def test_a_reader_that_is_killed_is_paid_for_and_comes_back(hosts: TwoHosts) -> None:
    home, reader = hosts.start(0), hosts.start(1, ranks=1)
    read(reader, put(home, MIB, 1), MIB, 1)
    reader.signal(signal.SIGKILL)
    again = hosts.start(1, ranks=1)
    read(again, put(home, MIB, 2), MIB, 2)
    home.wait_until_empty()
    again.wait_until_empty()
