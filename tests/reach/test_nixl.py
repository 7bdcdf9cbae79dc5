"""The data plane that ships: over NIXL, in host memory. Skipped where it is not installed."""

import asyncio
import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch

import featcache
from featcache.reach.nixl_plane import NixlPlane
from featcache.reach.plane import Piece
from reach.hosts import KEY, clients_of, hosts
from support.caches import KIB, MIB, filled, small, spent, tensor

INSTALLED = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13", "nixl"))
pytestmark = pytest.mark.skipif(
    not INSTALLED, reason="NIXL is not installed: pip install 'featcache[reach]'"
)
SLOW_HOST: dict[str, Any] = {"peer_timeout": 5.0, "peer_lease": 20.0}


@pytest.fixture(autouse=True)
def fake_plane() -> None:
    """The real one."""


async def test_features_of_many_sizes_come_whole_and_are_paid() -> None:
    settings = small(capacity=32 * MIB, **SLOW_HOST)
    async with (
        featcache.create(settings=settings, listen="127.0.0.1:0", cluster_key=KEY) as home,
        featcache.create(settings=settings, cluster_key=KEY) as reader,
        featcache.connect(reader.endpoint) as client,
    ):
        for nbytes in (0, 1, 300, 64 * KIB, 100 * KIB + 7, 5 * MIB + 3):
            feature = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
            ref = await home.put(feature)
            assert torch.equal(tensor(await client.get(ref)), feature)
        await spent(home)
        await spent(reader)


async def test_four_ranks_read_one_transfer_of_a_named_ref() -> None:
    async with hosts(**SLOW_HOST) as both, clients_of(both.reader, 3) as others:
        ref = await both.home.put(filled(100 * KIB, 3), readers=4)
        got = await asyncio.gather(*(rank.get(ref) for rank in (both.client, *others)))
        assert all(torch.equal(tensor(each), filled(100 * KIB, 3)) for each in got)
        await spent(both.home)
        await spent(both.reader)


async def test_a_plane_refuses_what_is_not_registered_and_goes_on() -> None:
    loop = asyncio.get_running_loop()
    one, two = NixlPlane.make("one", loop), NixlPlane.make("two", loop)
    try:
        source, target = filled(8 * KIB, 7), filled(8 * KIB, 0)
        await one.register(source.data_ptr(), 4 * KIB)
        await two.register(target.data_ptr(), 8 * KIB)
        peer = await two.add_peer(await one.metadata())
        bad = two.read(peer, [Piece(target.data_ptr(), source.data_ptr(), 8 * KIB)])
        with pytest.raises(featcache.BackendUnavailable, match="NIXL"):
            await bad.ended
        good = two.read(peer, [Piece(target.data_ptr(), source.data_ptr(), 4 * KIB)])
        await good.ended
        assert torch.equal(target[: 4 * KIB], source[: 4 * KIB])
        assert not target[4 * KIB :].any()
        heard = loop.create_future()
        one.on_notification = heard.set_result
        one.expect(notifications=True)
        two.notify(peer, b"paid")
        assert await heard == b"paid"
    finally:
        await one.close()
        await two.close()
    with pytest.raises(featcache.CacheClosed):
        await one.metadata()


ENDS = """
import asyncio, contextlib, os, sys, featcache, torch
KEY = "k" * 32
async def main():
    async with contextlib.AsyncExitStack() as stack:
        home = featcache.create(capacity="8MiB", listen="127.0.0.1:0", cluster_key=KEY)
        reader = featcache.create(capacity="8MiB", cluster_key=KEY)
        await home.open()
        await reader.open()
        ref = await home.put(torch.ones(1000))
        assert (await reader.get(ref)).sum() == 1000
        HOW
try:
    asyncio.run(main())
finally:
    print("ended", flush=True)
"""
WAYS = {
    "closed": "await reader.aclose(); await home.aclose()",
    "left open": "pass",
    "left open by an exit": "sys.exit(0)",
    "forked": """
        if not os.fork():
            sys.exit(0)
        assert os.wait()[1] == 0
        ref = await home.put(torch.ones(2000))
        assert (await reader.get(ref)).sum() == 2000
""",
}


@pytest.mark.parametrize("how", WAYS)
def test_a_process_ends_in_order(how: str) -> None:
    """Agents that are left to the interpreter's end can crash it."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDS.replace("HOW", WAYS[how].strip())],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert ended.returncode == 0, ended.stderr
    assert "ended" in ended.stdout
