"""``featcache stat``: a pool as it is now."""

import asyncio
import sys
from typing import Final

import click

from featcache import Observer
from featcache.cli.looking import ENDPOINT_HELP, as_json, endpoint_argument, json_option, observed
from featcache.cli.showing import plain_console, snapshot_text

SCHEMA: Final = 1
"""Of the JSON: grows when a field changes or goes, not when one comes."""


@click.command(epilog=ENDPOINT_HELP)
@endpoint_argument
@json_option
@click.option("--watch", is_flag=True, help="Again and again, until interrupted.")
@click.option(
    *("--interval", "--every", "interval"),
    type=float,
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
def stat(endpoint: str, *, as_json: bool, watch: bool, interval: float) -> None:
    """Show the pool at ENDPOINT: its figures, its sessions, who owes and who waits.

    With --json one object, on one line; with --watch one line a look.
    """
    if not 0.05 <= interval <= 3600:  # noqa: PLR2004 - a range told in the error
        raise click.BadParameter("give 0.05 to 3600 seconds", param_hint="--interval")
    observed(endpoint, lambda observer: _show(observer, as_json, interval if watch else None))


async def _show(observer: Observer, in_json: bool, every_s: float | None) -> None:
    console = plain_console()
    while True:
        snapshot = await observer.snapshot()
        if in_json:
            click.echo(as_json(snapshot, schema=SCHEMA))
        else:
            if every_s is not None and sys.stdout.isatty():
                console.clear()
            console.print(snapshot_text(snapshot))
        sys.stdout.flush()
        if every_s is None:
            return
        await asyncio.sleep(every_s)
