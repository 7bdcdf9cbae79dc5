"""Metrics for Prometheus, by `prometheus_client` (the extra ``metrics``).

`register` has an owner or a client told of at each scrape of a registry; `asgi_app` answers scrapes in
a server that runs already, `serve` in a small one of its own. An object that is not registered runs the
code that it would run without this module; of one that is, a put or a get costs about a microsecond
more.
"""

import threading
import weakref
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

try:
    import prometheus_client
except ImportError as missing:
    raise ImportError(
        "featcache.integrations.metrics needs prometheus_client: pip install 'featcache[metrics]'"
    ) from missing

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from featcache.integrations.metrics import multiprocess
from featcache.integrations.metrics.collector import CacheCollector
from featcache.integrations.metrics.server import MetricsServer
from featcache.integrations.metrics.sources import Cache

__all__ = ["MetricsServer", "asgi_app", "register", "serve", "unregister"]

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_lock: Final = threading.RLock()
_collectors: "weakref.WeakKeyDictionary[CollectorRegistry, CacheCollector]" = (
    weakref.WeakKeyDictionary()
)
_files: list[multiprocess.Files] = []


def register(cache: Cache, registry: CollectorRegistry | None = None) -> None:
    """Have an open owner or client told of in a registry, from now on until it closes.

    Byte counters and histograms count from here, all else since the object opened. A second time for
    the same registry changes nothing. Safe in any thread.

    Args:
        cache: a `FeatureCache` or `FeatureClient`, of `featcache` or of `featcache.blocking`.
        registry: where its metrics go; None is prometheus_client's own. In multi-process mode
            (``PROMETHEUS_MULTIPROC_DIR``) they go to this process's files there, whatever this is.

    Raises:
        CacheClosed: it is not open.
        SettingsError: it is no such object.
        ValueError: (of prometheus_client) the registry has other metrics with these names.

    """
    with _lock:
        if multiprocess.is_on():
            if not _files:
                _files.append(multiprocess.Files())
            _files[0].sources.add(cache)
            _files[0].start()
            return
        chosen = prometheus_client.REGISTRY if registry is None else registry
        collector = _collectors.get(chosen) or CacheCollector()
        collector.sources.add(cache)
        if chosen not in _collectors:
            try:
                chosen.register(collector)
            except BaseException:
                collector.sources.remove(cache)
                raise
            _collectors[chosen] = collector


def unregister(cache: Cache, registry: CollectorRegistry | None = None) -> None:
    """Undo `register`; what is not registered is ignored. One that closed needs no such call."""
    with _lock:
        if multiprocess.is_on():
            for files in _files:
                files.write()
                files.sources.remove(cache)
                if not len(files.sources):
                    files.stop()
            return
        chosen = prometheus_client.REGISTRY if registry is None else registry
        collector = _collectors.get(chosen)
        if collector is not None:
            collector.sources.remove(cache)


def _scraped(registry: CollectorRegistry | None) -> CollectorRegistry:
    """Return the registry that answers a scrape now."""
    if not multiprocess.is_on():
        return prometheus_client.REGISTRY if registry is None else registry
    for files in _files:
        files.write()
    merged = CollectorRegistry()
    MultiProcessCollector(merged)  # type: ignore[no-untyped-call]  # it has no types
    return merged


def asgi_app(*caches: Cache, registry: CollectorRegistry | None = None) -> App:
    """Return an ASGI app that answers each request with the metrics, to be mounted in a server.

    ``app.mount("/metrics", asgi_app())``. In multi-process mode it answers for all processes, whichever
    of them is reached.

    Args:
        caches: objects to `register` first.
        registry: the registry that is told of; None is prometheus_client's own.

    """
    for cache in caches:
        register(cache, registry)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # it was given to a server as it is
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await prometheus_client.make_asgi_app(_scraped(registry))(scope, receive, send)

    return app


def serve(
    port: int,
    *caches: Cache,
    host: str = "127.0.0.1",
    registry: CollectorRegistry | None = None,
) -> MetricsServer:
    """Answer scrapes over HTTP, in a thread of its own, until the returned server is closed.

    Args:
        port: 0 has the system choose one; it is then the server's `port`.
        caches: objects to `register` first.
        host: the address to listen at: the loopback alone, unless told otherwise. Metrics are not secret,
            but nobody is asked who he is.
        registry: as in `asgi_app`.

    Raises:
        SettingsError: the port is in use, or the address can't be had.

    """
    server = MetricsServer(host, port, lambda: _scraped(registry))
    try:
        for cache in caches:
            register(cache, registry)
    except BaseException:
        server.close()
        raise
    return server
