"""One host of a cluster with keys, driven by lines of JSON. Run by `test_key_processes`."""

import asyncio
import json
import sys
from typing import Any

import torch

import featcache
from featcache import FeatureCache
from featcache.errors import FeatcacheError
from support.caches import tensor


class Host:
    """What the driver asks of a host; each answer carries the number of its request."""

    def __init__(self, owner: FeatureCache) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, asked: dict[str, Any]) -> None:
        task = asyncio.ensure_future(self._answer(asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, asked: dict[str, Any]) -> None:
        number, call = asked.pop("number"), getattr(self, f"do_{asked.pop('do')}")
        try:
            answer = {"result": await call(**asked)}
        except FeatcacheError as error:
            answer = {"error": type(error).__name__}
        print(json.dumps(answer | {"number": number}), flush=True)  # noqa: T201 - its answers

    async def do_put(self, key: str, value: int) -> None:
        await self._owner.put(torch.full((100_000,), value, dtype=torch.uint8), key=key)

    async def do_get(self, key: str, timeout: float | None = None) -> int:
        return _value(tensor(await self._owner.get(key, timeout=timeout)))

    async def do_make(self, key: str, value: int, seconds: float) -> int:
        async def make() -> torch.Tensor:
            print(json.dumps({"making": key}), flush=True)  # noqa: T201 - as above
            await asyncio.sleep(seconds)
            return torch.full((100_000,), value, dtype=torch.uint8)

        return _value(tensor(await self._owner.get_or_put(key, make)))

    async def do_count(self, name: str) -> int:
        return int(getattr(self._owner.statistics(), name))


def _value(feature: torch.Tensor) -> int:
    """The value of all the bytes of a feature, -1 if they are not of one."""
    return int(feature[0]) if bool((feature == feature[0]).all()) else -1


async def main(listen: str | None, upstream: list[str]) -> None:
    """Serve lines until they end."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    settings = featcache.Settings(
        capacity="64MiB", segment="8MiB", initial="8MiB", peer_timeout=2.0, peer_lease=4.0
    )
    async with featcache.create(settings=settings, listen=listen, upstream=upstream) as owner:
        host = Host(owner)
        print(json.dumps({"ready": owner.address}), flush=True)  # noqa: T201 - as above
        while line := await lines.readline():
            host.begin(json.loads(line))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] or None, sys.argv[2:]))
