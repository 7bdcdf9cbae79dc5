"""``featcache bench``: what a put, a get, a borrow and a hit by key take on this machine."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import featcache
from featcache import FeatureCache, FeatureClient, FeatureRef, SettingsError
from featcache.cli.looking import json_option
from featcache.cli.showing import plain_console, size
from featcache.settings import parse_bytes

_SIZES: Final = "64KiB,1MiB,16MiB"
_CALLS: Final = ("put", "get", "borrow", "get by key", "borrow by key", "contains")
_MAX_SIZES: Final = 8
_SHARE_OF_SLAB: Final = 4
_MICRO: Final = 1e6
_GIB: Final = float(1 << 30)


@click.command
@click.option(
    "--device", default="cpu", show_default=True, help="Where the slab is: cpu or cuda:<n>."
)
@click.option("--sizes", default=_SIZES, show_default=True, help="Sizes of a feature.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 600.0),
    default=20.0,
    show_default=True,
    help="For all measurements together.",
)
@json_option
def bench(device: str, sizes: str, seconds: float, *, as_json: bool) -> None:
    """Measure puts and reads on this machine, one at a time, in one process, in under a minute.

    A client attached by the socket reads what an owner puts. The times are medians of one call, on a GPU with
    its work done; with --json one object for each size, on one line.
    """
    nbytes = [parse_bytes(part, "sizes") for part in sizes.split(",")]
    if len(nbytes) > _MAX_SIZES:
        raise SettingsError(f"sizes={sizes!r} are too many: at most {_MAX_SIZES}")
    results = asyncio.run(_Bench(device, nbytes, seconds).run())
    if as_json:
        for result in results:
            click.echo(json.dumps({"device": device} | result))
        return
    table = Table(
        box=None, padding=(0, 2, 0, 0), title=f"µs a call, {device}", title_justify="left"
    )
    table.add_column("bytes")
    for call in (*_CALLS, "put and get"):
        table.add_column(call, justify="right")
    for result in results:
        figures = (f"{result['us'][call]:.1f}" for call in _CALLS)
        table.add_row(size(result["nbytes"]), *figures, f"{result['gib_per_s']:.2f} GiB/s")
    plain_console().print(table)


class _Bench:
    """All measurements of one device."""

    def __init__(self, device: str, sizes: list[int], seconds: float) -> None:
        self._device = device
        self._sizes = sizes
        self._each_s = seconds / (len(sizes) * len(_CALLS))
        self._on_gpu = device.startswith("cuda")

    async def run(self) -> list[dict[str, Any]]:
        """Measure each size; the bar goes to stderr, if that is a terminal."""
        capacity = max(64 << 20, 2 * _SHARE_OF_SLAB * max(self._sizes))
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not Console(stderr=True).is_terminal,
        )
        async with (
            featcache.create(device=self._device, capacity=capacity, initial=capacity) as cache,
            featcache.connect(cache.endpoint) as client,
        ):
            with bar:
                task = bar.add_task("measuring", total=len(self._sizes) * len(_CALLS))
                results = []
                for nbytes in self._sizes:
                    bar.update(task, description=size(nbytes))
                    results.append(
                        await self._measure(cache, client, nbytes, lambda: bar.advance(task))
                    )
            return results

    async def _measure(
        self,
        cache: FeatureCache,
        client: FeatureClient,
        nbytes: int,
        done: Callable[[], None],
    ) -> dict[str, Any]:
        feature = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        out = torch.empty_like(feature)
        key = f"bench-{nbytes}"
        await cache.put(feature, key=key)
        refs: list[FeatureRef] = []

        async def put() -> None:
            refs.append(await cache.put(feature))

        async def unput() -> None:
            await client.release(refs.pop())

        async def get() -> None:
            await client.get(refs.pop(), out=out)

        async def borrow() -> None:
            async with client.borrow(refs.pop()):
                pass

        async def get_key() -> None:
            await client.get(key, out=out)

        async def borrow_key() -> None:
            async with client.borrow(key):
                pass

        async def contains() -> None:
            await client.contains(key)

        calls: dict[str, tuple[Callable[[], Awaitable[None]] | None, Callable[[], Awaitable[None]]]]
        calls = {
            "put": (None, put),
            "get": (put, get),
            "borrow": (put, borrow),
            "get by key": (None, get_key),
            "borrow by key": (None, borrow_key),
            "contains": (None, contains),
        }
        seen: dict[str, float] = {}
        for name in _CALLS:
            before, call = calls[name]
            after = unput if name == "put" else None
            seen[name] = await self._timed(before, call, after)
            done()
        await cache.evict(key)
        return {
            "nbytes": nbytes,
            "us": {name: seconds * _MICRO for name, seconds in seen.items()},
            "gib_per_s": nbytes / _GIB / (seen["put"] + seen["get"]),
        }

    async def _timed(
        self,
        before: Callable[[], Awaitable[None]] | None,
        call: Callable[[], Awaitable[None]],
        after: Callable[[], Awaitable[None]] | None,
    ) -> float:
        """Return the median seconds of a call."""
        times: list[float] = []
        for _ in self._while(self._each_s):  # of which the first is no measurement: it warms up
            if before is not None:
                await before()
                self._settle()
            began = time.perf_counter()
            await call()
            self._settle()
            times.append(time.perf_counter() - began)
            if after is not None:
                await after()
        measured = sorted(times[1:] or times)
        return measured[len(measured) // 2]

    def _settle(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    @staticmethod
    def _while(seconds: float) -> Iterator[None]:
        give_up_s = time.monotonic() + seconds
        yield
        while time.monotonic() < give_up_s:
            yield
