"""A small HTTP server for scrapes, in a thread of its own."""

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from featcache.errors import SettingsError

_PATIENCE_S = 5.0
"""How long a connection may say nothing."""


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as it is called
        """Log nothing: a scrape is no event."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind, without the look for the host's name that can take seconds where no name server answers."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class MetricsServer:
    """Listens until it is closed; a context manager."""

    def __init__(self, host: str, port: int, scraped: Callable[[], CollectorRegistry]) -> None:
        """Listen, or raise SettingsError. `scraped` returns the registry that answers a scrape."""

        def answer(environ: Any, start_response: Any) -> Iterable[bytes]:
            return make_wsgi_app(scraped())(environ, start_response)  # type: ignore[no-any-return]  # it has no types

        kind = _Server6 if ":" in host else _Server
        try:
            self._server = make_server(host, port, answer, kind, _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise SettingsError(f"metrics can't listen at {host} port {port}: {why}") from error
        self.host, self.port = host, int(self._server.server_port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="featcache-metrics", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """What a browser or Prometheus fetches."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        """Answer no more. Idempotent."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
