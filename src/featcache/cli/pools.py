"""``featcache ls`` and ``featcache sweep``."""

import asyncio
import json
from typing import Any, Final

import click
from rich.table import Table

import featcache
from featcache import FeatcacheError, Snapshot
from featcache.api.endpoints import Endpoint, find_endpoints
from featcache.api.endpoints import sweep as sweep_endpoints
from featcache.cli.exits import one_line
from featcache.cli.looking import json_option
from featcache.cli.showing import age, plain_console, printable, size

_PATIENCE_S: Final = 2.0


@click.command
@json_option
def ls(*, as_json: bool) -> None:
    """List the pools of this user on this host.

    Those at endpoints in the user's own folder, alive or stale, and those at other paths at which somebody
    listens. With --json one object each, on one line.
    """
    found = find_endpoints()
    seen = asyncio.run(_look_at_all(found))
    if as_json:
        for endpoint, snapshot in zip(found, seen, strict=True):
            click.echo(json.dumps(_plain(endpoint, snapshot), ensure_ascii=False))
        return
    if not found:
        click.echo("no pools")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("endpoint", "state", "pid", "up", "device", "used", "keys", "sessions"):
        table.add_column(column, overflow="fold")
    for endpoint, snapshot in zip(found, seen, strict=True):
        table.add_row(*_row(endpoint, snapshot))
    console = plain_console()
    console.print(table)
    for endpoint, snapshot in zip(found, seen, strict=True):
        if isinstance(snapshot, str):
            console.print(f"· {printable(endpoint.path)}: {printable(snapshot)}", soft_wrap=True)


async def _look_at_all(found: list[Endpoint]) -> list[Snapshot | str]:
    return [await _look(endpoint) for endpoint in found]


async def _look(endpoint: Endpoint) -> Snapshot | str:
    """Return a pool, or why there is nothing to be seen."""
    if endpoint.state == "stale":
        return "its owner died: featcache sweep removes it"
    try:
        async with featcache.observe(endpoint.path, timeout=_PATIENCE_S) as observer:
            return await observer.snapshot()
    except FeatcacheError as error:
        return one_line(error).removeprefix(f"{endpoint.path}: ")


def _row(endpoint: Endpoint, seen: Snapshot | str) -> list[str]:
    pid = "-" if endpoint.pid is None else str(endpoint.pid)
    first = [printable(endpoint.path), endpoint.state, pid]
    if isinstance(seen, str):
        return [*first, *"-----"]
    figures = seen.statistics
    used = f"{size(figures.used_bytes)} of {size(figures.capacity_bytes)}"
    return [
        *first,
        *(age(seen.uptime_s), printable(seen.device), used),
        *(str(figures.keys), str(figures.sessions)),
    ]


def _plain(endpoint: Endpoint, seen: Snapshot | str) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "endpoint": endpoint.path,
        "state": endpoint.state,
        "pid": endpoint.pid,
    }
    if isinstance(seen, str):
        return plain | {"why": seen}
    figures = seen.statistics
    return plain | {
        "pool": seen.pool,
        "device": seen.device,
        "uptime_s": seen.uptime_s,
        "version": seen.version,
        "level": seen.level,
        "capacity_bytes": figures.capacity_bytes,
        "used_bytes": figures.used_bytes,
        "keys": figures.keys,
        "sessions": figures.sessions,
    }


@click.command
def sweep() -> None:
    """Remove the sockets and locks of owners that died from this user's folder, and nothing else."""
    swept = sweep_endpoints()
    for path in swept:
        click.echo(f"removed {path}")
    if not swept:
        click.echo("nothing to remove")
