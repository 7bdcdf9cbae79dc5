"""``featcache serve``: an owner as a daemon."""

import asyncio
import contextlib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias

import click
import structlog

import featcache
from featcache import FeatureCache, SettingsError
from featcache.api.cluster import read_key
from featcache.cli.config import ServeOptions, no_setting, options_of
from featcache.cli.exits import Exit, Failure, one_line
from featcache.cli.logs import configure
from featcache.cli.notify import notify
from featcache.errors import FeatcacheError

_METRICS: Final = "featcache.integrations.metrics"


class _MetricsServer(contextlib.AbstractContextManager[Any], Protocol):
    url: str


_ServeMetrics: TypeAlias = Callable[..., _MetricsServer]
_SOON_S: Final = 0.2
"""An end that takes no longer is not told to wait."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@click.command
@click.option("--device", metavar="DEVICE", help="cpu, or cuda:<n>.  [default: cpu]")
@click.option("--capacity", metavar="SIZE", help="Bytes the slab may grow to.  [default: 1GiB]")
@click.option("--initial", metavar="SIZE", help="Bytes committed from the beginning.")
@click.option("--spill", metavar="SIZE", help="Bytes of a second slab in host memory.")
@click.option("--endpoint", metavar="PATH", help="Where to listen.  [default: a path of its own]")
@click.option("--name", metavar="NAME", help="The owner's own name.")
@click.option("--listen", metavar="HOST:PORT", help="Let other hosts read here; needs a key.")
@click.option(
    *("--cluster-key-file", "cluster_key_file"),
    metavar="FILE",
    help="The cluster's key; or FEATCACHE_CLUSTER_KEY.",
)
@click.option("--tier", metavar="MODULE:FACTORY", help="A store below the pool: what makes it.")
@click.option(
    *("--upstream", "upstream"),
    metavar="HOST:PORT",
    multiple=True,
    help="A host that is the home of keys; can be given again, and the same for all.",
)
@click.option("--metrics-port", metavar="PORT", help="Serve Prometheus metrics there.")
@click.option("--metrics-host", metavar="ADDRESS", help="On this address.  [default: 127.0.0.1]")
@click.option("--log", metavar="FORM", help="console or json.  [default: console]")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning, error.  [default: info]")
@click.option(
    *("--grace", "--shutdown-grace", "shutdown_grace"),
    metavar="SECONDS",
    help="For reads in progress at the end.  [default: 10]",
)
@click.option("--config", metavar="FILE", help="TOML with these, and any other setting, by name.")
@click.option(
    *("--set", "more"),
    metavar="NAME=VALUE",
    multiple=True,
    help="Any other setting, such as ttl=60; can be given again.",
)
def serve(config: str | None, more: tuple[str, ...], **given: Any) -> None:
    """Own a pool until SIGTERM or SIGINT, and print its endpoint once it can be connected to.

    Each option is also read from the environment, as FEATCACHE_CAPACITY and so on, and so is every setting
    of featcache.Settings; FEATCACHE_SHUTDOWN_GRACE is --grace. An option comes before the environment, and
    that before the file.

    At the first signal no more puts are taken, waits end, and reads in progress may finish within --grace;
    a second one ends at once.
    """
    options = options_of(given | _more(more), config)
    configure(options.log, options.log_level)
    cache = featcache.create(
        device=options.device,
        endpoint=options.endpoint,
        name=options.name,
        spill=options.spill,
        settings=options.settings,
        listen=options.listen,
        upstream=options.upstream,
        cluster_key=None
        if options.cluster_key_file is None
        else read_key(options.cluster_key_file),
        tier=None if options.tier is None else _made_tier(options.tier),
    )
    asyncio.run(_Service(cache, options).run())


def _made_tier(named: str) -> Any:
    """Return the tier that a factory makes; it is named as ``module:factory``."""
    module, colon, name = named.partition(":")
    if not (colon and module and name):
        raise SettingsError(f"--tier {named}: write MODULE:FACTORY")
    try:
        return getattr(importlib.import_module(module), name)()
    except FeatcacheError:
        raise
    except ModuleNotFoundError as error:
        advice = "install it, or add the folder that it lies in to PYTHONPATH"
        raise SettingsError(f"--tier {named}: {error}: {advice}") from error
    except Exception as error:  # whatever a factory of the user's raises
        kind = type(error).__name__
        raise SettingsError(f"--tier {named}: {kind}: {one_line(error)}") from error


def _more(pairs: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise SettingsError(f"--set {pair}: write NAME=VALUE")
        name = name.strip().replace("-", "_")
        known = [field.name for field in featcache.Settings.__attrs_attrs__]
        if name not in known:
            raise SettingsError(f"--set {pair}: {no_setting(name, known)}")
        found[name] = value.strip()
    return found


class _Service:
    """One owner, from its start to its end."""

    def __init__(self, cache: FeatureCache, options: ServeOptions) -> None:
        self._cache = cache
        self._options = options
        self._ends = asyncio.Event()
        self._signals = 0

    async def run(self) -> None:
        """Serve until a signal comes."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        if not await self._opened():
            return  # a signal came first
        try:
            with self._metrics():
                click.echo(f"featcache serves {self._cache.endpoint}")
                if self._cache.address is not None:
                    click.echo(f"featcache listens to other hosts at {self._cache.address}")
                sys.stdout.flush()
                notify(f"READY=1\nMAINPID={os.getpid()}\nSTATUS=serves {self._cache.endpoint}")
                await self._ends.wait()
                notify("STOPPING=1")
                await self._drained()
        finally:
            await self._cache.aclose()

    async def _drained(self) -> None:
        """Let reads finish, and tell where the end waits for them."""
        grace_s = self._options.shutdown_grace
        draining = asyncio.ensure_future(self._cache.drain(grace_s))
        waiting = {"why": "reads are in progress", "grace_s": grace_s}
        log = structlog.get_logger("featcache")
        with contextlib.suppress(OSError):  # a log that nobody reads any more stops no end in order
            if not (await asyncio.wait([draining], timeout=_SOON_S))[0]:
                log.info("featcache.stopping", **waiting)
        if not await draining:
            with contextlib.suppress(OSError):
                log.warning("featcache.grace_over", **waiting)

    async def _opened(self) -> bool:
        opening = asyncio.ensure_future(self._cache.open())
        ending = asyncio.ensure_future(self._ends.wait())
        try:
            await asyncio.wait([opening, ending], return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                opening.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await opening
                return False
            try:
                opening.result()
            except SettingsError as error:
                if "is in use" in str(error):
                    raise Failure(str(error), Exit.IN_USE) from error
                raise
            return True
        finally:
            ending.cancel()

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1:
            # At once: whoever sends a second signal waits for nothing. What a killed owner leaves is
            # removed by the next one, or by `featcache sweep`.
            os._exit(128 + number)
        self._ends.set()

    def _metrics(self) -> contextlib.AbstractContextManager[Any]:
        """Serve metrics for as long as the context lasts, if a port was given."""
        port, host = self._options.metrics_port, self._options.metrics_host
        if port is None:
            return contextlib.nullcontext()
        try:
            serve_metrics: _ServeMetrics = importlib.import_module(_METRICS).serve
        except ImportError:
            told = "--metrics-port needs the extra: pip install 'featcache[metrics]'"
            raise Failure(told, Exit.UNAVAILABLE) from None
        try:
            server = serve_metrics(port, self._cache, host=host)
        except SettingsError as error:
            if getattr(error.__cause__, "errno", None) == errno.EADDRINUSE:
                raise Failure(str(error), Exit.IN_USE) from error
            raise
        structlog.get_logger("featcache").info("featcache.metrics", url=server.url)
        return server
