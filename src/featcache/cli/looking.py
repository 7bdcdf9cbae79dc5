"""What the commands that look at a pool share: their arguments, and an observer for as long as they run."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import attrs
import click

import featcache
from featcache import Observer

T = TypeVar("T")

ENDPOINT_VARIABLE: Final = "FEATCACHE_ENDPOINT"
ENDPOINT_HELP: Final = (
    "ENDPOINT is what featcache serve prints; where it is left out it is that of "
    f"{ENDPOINT_VARIABLE} in the environment."
)
NO_ENDPOINT: Final = (
    f"Missing argument 'ENDPOINT': give it, or set {ENDPOINT_VARIABLE} (featcache ls lists the "
    "pools here)"
)


def _given(_: click.Context, __: click.Parameter, endpoint: str | None) -> str:
    if endpoint is None:
        raise click.UsageError(NO_ENDPOINT)
    return endpoint


endpoint_argument = click.argument(
    "endpoint", envvar=ENDPOINT_VARIABLE, required=False, callback=_given
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")


def observed(endpoint: str, look: Callable[[Observer], Awaitable[T]]) -> T:
    """Return what `look` returns of an observer that is attached to an endpoint."""

    async def attached() -> T:
        async with featcache.observe(endpoint, name="featcache") as observer:
            return await look(observer)

    return asyncio.run(attached())


def as_json(record: Any, **more: Any) -> str:
    """Return a record as JSON: keys in bytes as their label, and in hex beside it."""

    def plain(_: Any, __: Any, value: Any) -> Any:
        return value.hex() if isinstance(value, bytes) else value

    found = attrs.asdict(record, value_serializer=plain) if attrs.has(type(record)) else record
    return json.dumps(found | more, ensure_ascii=False)
