"""One host, driven by lines of JSON: its owner, and clients of it. Run by `test_two_hosts`."""

import asyncio
import contextlib
import json
import sys
import zlib
from typing import Any

import torch

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef
from featcache.errors import FeatcacheError


def feature(nbytes: int, seed: int) -> torch.Tensor:
    """Bytes that are told by their seed."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=made)


def crc(tensor: torch.Tensor) -> int:
    """The checksum of a feature's bytes."""
    return zlib.crc32(tensor.numpy().tobytes())


def rank_name(address: str, number: int) -> str:
    """The name of a rank of the host that listens there."""
    return f"rank{number} of {address}"


class Host:
    """What the driver asks of a host."""

    def __init__(self, owner: FeatureCache, ranks: list[FeatureClient]) -> None:
        self._owner = owner
        self._ranks = ranks

    async def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        call = getattr(self, f"do_{asked.pop('do')}")
        try:
            return {"result": await call(**asked)}
        except FeatcacheError as error:
            return {"error": type(error).__name__, "text": str(error)}

    async def do_put(self, nbytes: int, seed: int, readers: int | list[str]) -> str:
        return (await self._owner.put(feature(nbytes, seed), readers=readers)).to_bytes().hex()

    async def do_get(self, ref: str, ranks: int) -> list[int]:
        wanted = FeatureRef.from_bytes(bytes.fromhex(ref))
        got = await asyncio.gather(*(rank.get(wanted) for rank in self._ranks[:ranks]))
        assert all(isinstance(each, torch.Tensor) for each in got)
        return [crc(each) for each in got if isinstance(each, torch.Tensor)]

    async def do_used(self) -> list[int]:
        now = self._owner.statistics()
        return [now.used_bytes, now.slots_used]

    async def do_fetched(self) -> int:
        beyond = self._owner._opened().beyond
        assert beyond is not None
        return beyond.reads.fetched


async def main(listen: str, ranks: int) -> None:
    """Serve lines until they end."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    settings = featcache.Settings(
        capacity="64MiB",
        segment="8MiB",
        recycle_interval=0.01,
        peer_timeout=2.0,
        peer_lease=4.0,
        ttl=30.0,
    )
    async with contextlib.AsyncExitStack() as stack:
        owner = await stack.enter_async_context(
            featcache.create(settings=settings, listen=listen)  # the key is in the environment
        )
        clients = [
            await stack.enter_async_context(
                featcache.connect(owner.endpoint, name=rank_name(listen, number))
            )
            for number in range(ranks)
        ]
        host = Host(owner, clients)
        print(json.dumps({"result": owner.address}), flush=True)  # noqa: T201 - its answers
        while line := await lines.readline():
            print(json.dumps(await host.answer(json.loads(line))), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
