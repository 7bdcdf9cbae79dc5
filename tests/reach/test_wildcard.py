"""An owner that listens at all addresses of its host."""

import socket

import pytest

import featcache
from featcache.reach.secret import parse_address
from reach.hosts import KEY, quick


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize(
    ("listen", "families"), [("0.0.0.0:0", ["127.0.0.1"]), ("[::]:0", ["127.0.0.1", "::1"])]
)
async def test_a_wildcard_is_all_addresses_and_refs_carry_the_hosts_name(
    listen: str, families: list[str]
) -> None:
    async with featcache.create(settings=quick(), listen=listen, cluster_key=KEY) as owner:
        assert owner.address is not None
        where = parse_address(owner.address)
        assert where.host == socket.gethostname()
        for each in families:
            with socket.create_connection((each, where.port)) as made:
                assert made.getpeername()[:2] == (each, where.port)
