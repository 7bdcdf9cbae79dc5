"""``featcache doctor``: whether this machine has what a pool needs, and what to do where it has not."""

import json
from collections.abc import Callable, Iterator
from typing import Final

import attrs
import click
from rich.table import Table

from featcache.cli.checks import CHECKS, Check, State
from featcache.cli.exits import Failure, one_line
from featcache.cli.looking import json_option
from featcache.cli.showing import plain_console

_STYLES: Final[dict[State, str]] = {"ok": "green", "note": "cyan", "warn": "yellow", "bad": "red"}


@click.command
@json_option
def doctor(*, as_json: bool) -> None:
    """Check this machine: what a pool needs is there (ok), would help (warn) or is missing (bad).

    Ends with 1 if anything is bad. With --json one object for each check, on one line.
    """
    found = [check for look in CHECKS for check in _looked(look)]
    if as_json:
        for check in found:
            click.echo(json.dumps(attrs.asdict(check), ensure_ascii=False))
    else:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for _ in range(3):
            table.add_column(overflow="fold")
        for check in found:
            advice = f"\n→ {check.remedy}" if check.remedy else ""
            table.add_row(check.name, check.state, f"{check.found}{advice}")
            table.rows[-1].style = _STYLES[check.state] if check.state != "ok" else None
        plain_console().print(table)
    bad = [check.name for check in found if check.state == "bad"]
    if bad:
        raise Failure(f"not in order: {', '.join(bad)}")


def _looked(look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Yield what a check finds; one that fails itself is a finding too."""
    try:
        yield from look()
    except Exception as error:  # noqa: BLE001 - whatever this machine has in store is told
        name = look.__name__.strip("_").replace("_", " ")
        yield Check(name, "bad", f"{type(error).__name__}: {one_line(error)}")
