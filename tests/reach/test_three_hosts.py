"""Three hosts as namespaces of this machine: a ref that is read on two of them, and what one's end costs."""

import signal
from collections.abc import Iterator

import pytest

from reach.host_program import crc, feature, rank_name
from reach.netns import HostProcess, TwoHosts, two_hosts
from reach.test_two_hosts import WHY_NOT

pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.timeout(120),
]
NBYTES = 300_000
LOST = ("OwnerLost", "OwnerUnreachable")


@pytest.fixture(autouse=True)
def fake_plane() -> None:
    """The real one."""


@pytest.fixture
def network() -> Iterator[TwoHosts]:
    with two_hosts(3) as made:
        yield made


def named(network: TwoHosts) -> list[str]:
    """The first rank of the second host, and of the third."""
    return [rank_name(address, 0) for address in network.addresses[1:]]


def right(reader: HostProcess, ref: str, seed: int) -> None:
    assert reader.ask("get", ref=ref, ranks=1) == [crc(feature(NBYTES, seed))]


def test_a_ref_is_read_on_two_hosts_by_name_and_owes_nothing_then(network: TwoHosts) -> None:
    home, two, three = network.start(0), network.start(1, ranks=1), network.start(2, ranks=1)
    for seed in range(3):
        ref = home.ask("put", nbytes=NBYTES, seed=seed, readers=named(network))
        for reader in (two, three):
            reader.begin("get", ref=ref, ranks=1)
        for reader in (two, three):
            assert reader.end() == {"result": [crc(feature(NBYTES, seed))]}
    for host in (home, two, three):
        host.wait_until_empty()
    assert [host.ask("fetched") for host in (two, three)] == [3, 3]


def test_a_reading_host_that_vanishes_is_paid_for_and_the_other_reads(network: TwoHosts) -> None:
    home, two, three = network.start(0), network.start(1, ranks=1), network.start(2, ranks=1)
    for number, reader in enumerate((two, three)):
        right(
            reader,
            home.ask("put", nbytes=NBYTES, seed=number, readers=[named(network)[number]]),
            number,
        )
    ref = home.ask("put", nbytes=NBYTES, seed=7, readers=named(network))
    two.signal(signal.SIGKILL)
    right(three, ref, 7)
    home.wait_until_empty()  # before the ref's time is over: the dead host's lease ends first
    three.wait_until_empty()


def test_a_home_that_starts_again_while_two_hosts_read_is_lost_to_both_and_found_anew(
    network: TwoHosts,
) -> None:
    home, two, three = network.start(0), network.start(1, ranks=1), network.start(2, ranks=1)
    before = home.ask("put", nbytes=30 << 20, seed=1, readers=named(network))
    for reader in (two, three):
        reader.begin("get", ref=before, ranks=1)
    home.signal(signal.SIGKILL)
    for reader in (two, three):
        answer = reader.end()
        assert "result" in answer or answer["error"] in LOST
    again = network.start(0)
    for reader in (two, three):
        reader.begin("get", ref=before, ranks=1)
        assert reader.end()["error"] in (*LOST, "StaleRef")
    ref = again.ask("put", nbytes=NBYTES, seed=2, readers=named(network))
    for reader in (two, three):
        right(reader, ref, 2)
    for host in (again, two, three):
        host.wait_until_empty()
