"""The command: a frame to print or to write, frames one after another, or the application."""

import asyncio
import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

import featcache
from featcache.cli.exits import Exit, Failure
from featcache.cli.looking import ENDPOINT_HELP, endpoint_argument
from featcache.cli.top.frame import draw, map_cells
from featcache.cli.top.look import Look, this_look
from featcache.cli.top.model import VIEWS, Model, View
from featcache.cli.top.watch import Watch, clock, look_once

_STILL: Final = (80, 24)
_PICTURE: Final = (120, 36)
_SOONEST_S, _LATEST_S = 0.1, 3600.0
_MOST_LOOKS: Final = 1000
_MOST_COLUMNS, _MOST_ROWS = 1000, 500
_NIGHT: Final = TerminalTheme(
    (13, 17, 23),
    (201, 209, 217),
    [
        *((72, 79, 88), (255, 85, 85), (0, 190, 135), (240, 228, 66)),
        *((70, 150, 220), (222, 88, 176), (86, 182, 194), (201, 209, 217)),
    ],
)
"""The colours of a picture that are the terminal's own elsewhere."""
_SIZE: Final = re.compile(r"([1-9][0-9]{1,3})x([1-9][0-9]{0,3})")


@click.command(epilog=ENDPOINT_HELP)
@endpoint_argument
@click.option(
    "--interval", type=float, default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Print one frame, and end.")
@click.option(
    "--svg",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write one frame as a picture, and end.",
)
@click.option(
    "--looks",
    type=click.IntRange(1, _MOST_LOOKS),
    default=1,
    show_default=True,
    help="Looks before the frame of --once or --svg: more of them show more of the past.",
)
@click.option("--size", metavar="COLSxROWS", help="Of the frame of --once or --svg.")
@click.option(
    "--view",
    type=click.Choice(VIEWS),
    default="all",
    show_default=True,
    help="What is below the map.",
)
@click.option("--sort", help="The order of the table in view.")
@click.option("--filter", "filtered", default="", help="Rows with this text alone.")
@click.option("--ascii", "plain", is_flag=True, help="No signs outside ASCII.")
def top(
    endpoint: str,
    *,
    interval: float,
    once: bool,
    svg: Path | None,
    looks: int,
    size: str | None,
    view: View,
    sort: str | None,
    filtered: str,
    plain: bool,
) -> int:
    """Watch the pool at ENDPOINT: its slab by offset, pressure and hit rate, sessions, who owes, who waits.

    Keys: 1 to 5 the tables, s sorts, r reverses, / filters, space freezes, e evicts a key, ? explains all.
    Without a terminal, or on a dumb one, frames are printed one after another. NO_COLOR is heeded.
    """
    if not _SOONEST_S <= interval <= _LATEST_S:
        raise click.BadParameter("give 0.1 to 3600 seconds", param_hint="--interval")
    model = Model(endpoint, interval_s=interval, view=view)
    model.filter(filtered)
    if sort is not None:
        _sort(model, sort)
    if once or svg is not None:
        asyncio.run(_still(model, looks, _size(size), once=once, svg=svg, plain=plain))
        return Exit.OK
    if not _is_interactive():
        asyncio.run(_stream(model, _size(size), plain=plain))
    look = this_look(Console().color_system, sys.stdout.encoding, plain=plain)
    try:
        screen = importlib.import_module("featcache.cli.top.screen")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "textual":
            raise
        raise Failure(
            "textual is missing: pip install 'featcache[cli]', or print one frame with --once",
            Exit.UNAVAILABLE,
        ) from None
    return int(screen.run(model, look))


def _sort(model: Model, order: str) -> None:
    known = model.orders_known()
    if order not in known:
        raise click.BadParameter(f"{order!r} is none of {', '.join(known)}", param_hint="--sort")
    model.sort(order)


def _size(text: str | None) -> tuple[int, int] | None:
    """Return columns and rows; None leaves them to the terminal."""
    if text is None:
        return None
    found = _SIZE.fullmatch(text)
    columns, rows = (int(each) for each in found.groups()) if found else (0, 0)
    if not (found and columns <= _MOST_COLUMNS and rows <= _MOST_ROWS):
        raise click.BadParameter("give columns and rows, such as 120x40", param_hint="--size")
    return columns, rows


def _is_interactive() -> bool:
    dumb = os.environ.get("TERM", "").lower() in {"", "dumb", "unknown"}
    return not dumb and all(each.isatty() for each in (sys.stdin, sys.stdout, sys.stderr))


def _room(size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the columns and rows of a frame that is printed."""
    if size is not None:
        return size
    try:
        found = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        return _from_environment("COLUMNS", _STILL[0]), _from_environment("LINES", _STILL[1])
    return found.columns or _STILL[0], max(2, (found.lines or _STILL[1]) - 1)  # the prompt follows


def _from_environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return (
        int(text)
        if text.isascii() and text.isdigit() and 0 < int(text) <= _MOST_COLUMNS
        else otherwise
    )


async def _still(
    model: Model,
    looks: int,
    size: tuple[int, int] | None,
    *,
    once: bool,
    svg: Path | None,
    plain: bool,
) -> None:
    width, height = _room(size) if once else size or _PICTURE
    async with featcache.observe(model.endpoint, name="featcache top") as observer:
        for count in range(looks):
            if count:
                await asyncio.sleep(model.interval_s)
            await look_once(observer, model, map_cells(width, height))
    if once:
        _print(model, width, height, plain=plain)
    if svg is not None:
        _write(model, *(size or _PICTURE), svg)


def _print(model: Model, width: int, height: int, *, plain: bool) -> None:
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    look = this_look(console.color_system, sys.stdout.encoding, plain=plain)
    lines = draw(model, look, width, height, clock(), keys=False)
    while lines and not lines[-1].plain.strip():
        lines.pop()
    if look.colours == "none":  # attributes are escapes as well
        for line in lines:
            click.echo(line.plain.rstrip())
    else:
        console.print(Text("\n").join(lines), no_wrap=True, soft_wrap=True)
    sys.stdout.flush()


def _write(model: Model, width: int, height: int, path: Path) -> None:
    console = Console(
        record=True, width=width, height=height, file=io.StringIO(), color_system="truecolor",
        force_terminal=True, highlight=False, markup=False, emoji=False, legacy_windows=False,
    )  # fmt: skip
    lines = draw(model, Look("full"), width, height, clock())
    console.print(Text("\n").join(lines), no_wrap=True, soft_wrap=True)
    console.save_svg(str(path), title="featcache top", theme=_NIGHT, unique_id="featcache-top")


async def _stream(model: Model, size: tuple[int, int] | None, *, plain: bool) -> None:
    """Print a frame a refresh, until interrupted."""
    watch = Watch(model, lambda: map_cells(*_room(size)), lambda: None)
    looking = asyncio.ensure_future(watch.run())
    try:
        while True:
            done, _ = await asyncio.wait([looking], timeout=model.interval_s)
            if done:
                looking.result()
            _print(model, *_room(size), plain=plain)
            click.echo("")
    finally:
        looking.cancel()
        await asyncio.wait([looking])
