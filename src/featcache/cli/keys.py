"""``featcache keys`` and ``featcache evict``."""

import json
import os
from typing import Literal

import attrs
import click

from featcache import Observer
from featcache.cli.exits import Failure
from featcache.cli.looking import (
    ENDPOINT_HELP,
    ENDPOINT_VARIABLE,
    NO_ENDPOINT,
    endpoint_argument,
    json_option,
    observed,
)
from featcache.cli.showing import keys_table, plain_console
from featcache.observation import KeysPage, KeyView

_ORDERS = {"largest": "size", "oldest": "age", "most-hit": "hits"}
Order = Literal["size", "age", "hits"]


@click.command(epilog=ENDPOINT_HELP)
@endpoint_argument
@click.option(
    *("--by", "by"),
    type=click.Choice(["largest", "oldest", "most-hit", "size", "age", "hits"]),
    default="largest",
    show_default=True,
    help="Which come first.",
)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 512), help="Keys.")
@click.option("--after", help="Go on after a page: what it printed as next.")
@click.option("--all", "everything", is_flag=True, help="All of them, page after page.")
@json_option
def keys(
    endpoint: str, by: str, limit: int, after: str | None, *, everything: bool, as_json: bool
) -> None:
    """List the keys of the pool at ENDPOINT, a page at a time.

    With --json one object for each key, on one line, and with a next page one that has only "next".
    """
    order: Order = _ORDERS.get(by, by)  # type: ignore[assignment]  # the choice is one of these
    console = plain_console()

    async def show(observer: Observer) -> None:
        following = after
        while True:
            page = await observer.keys(order, after=following, limit=limit)
            if as_json:
                _print_lines(page, last=not everything)
            else:
                console.print(keys_table(page, by))
            following = page.next
            if following is None or not everything:
                break
        if following is not None and not as_json:
            console.print(f"next: --after {following}", soft_wrap=True)

    observed(endpoint, show)


def _print_lines(page: KeysPage, *, last: bool) -> None:
    for one in page.keys:
        click.echo(json.dumps(_plain(one), ensure_ascii=False))
    if page.next is not None and last:
        click.echo(json.dumps({"next": page.next}))


def _plain(one: KeyView) -> dict[str, object]:
    return attrs.asdict(one) | {"key": one.label, "key_hex": one.key.hex()}


@click.command(epilog=ENDPOINT_HELP)
@click.argument("given", nargs=-1, metavar="[ENDPOINT] KEY")
@click.option("--hex", "in_hex", is_flag=True, help="KEY is the key's bytes in hex.")
def evict(given: tuple[str, ...], *, in_hex: bool) -> None:
    """Drop KEY from the pool at ENDPOINT, pinned or not; its readers may finish.

    Ends with 1 if there is no such key.
    """
    endpoint, key = _endpoint_and_key(given)
    try:
        name = bytes.fromhex(key) if in_hex else key.encode()
    except ValueError:
        raise click.BadParameter(f"{key!r} is not hex", param_hint="KEY") from None
    if not observed(endpoint, lambda observer: observer.evict(name)):
        raise Failure(f"there is no key {key!r} at {endpoint}")
    click.echo(f"evicted {key}")


def _endpoint_and_key(given: tuple[str, ...]) -> tuple[str, str]:
    """Return both arguments of `evict`: the last is the key, the one before it may be left out."""
    endpoint = os.environ.get(ENDPOINT_VARIABLE)
    match given:
        case (endpoint, key):
            return endpoint, key
        case (key,) if endpoint:
            return endpoint, key
        case ():
            raise click.UsageError("Missing argument 'KEY'")
        case (only,):
            raise click.UsageError(f"{NO_ENDPOINT}; or is {only!r} that, and the KEY is missing?")
    raise click.UsageError(f"Got unexpected extra argument ({given[2]})")
