"""An HTTP server whose workers look at uploaded pictures where the server put them.

    python examples/server [--host 127.0.0.1] [--port 8000] [--capacity 64MiB]
    curl -F image=@cat.png http://127.0.0.1:8000/images
    curl --data-binary @cat.png http://127.0.0.1:8000/images

The answer has what each worker saw: the mean colour, and a histogram of brightness.
"""

import argparse
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from app import application


class Server(uvicorn.Server):
    """uvicorn, which says where it listens and leaves with 0 when it is told to stop."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            print(f"listening on http://{host}:{port}", flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="examples/server")
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0 for one that is free")
    add("--capacity", default="64MiB", help="of the pool (default: %(default)s)")
    add("--put-timeout", type=float, default=1.0, help="seconds that a request waits for room")
    add("--timeout", type=float, default=10.0, help="seconds that the workers have to answer")
    add("--delay", type=float, default=0.0, help="seconds that the workers take, to see it fill")
    options = parser.parse_args()
    config = uvicorn.Config(
        application(options),
        host=options.host,
        port=options.port,
        log_level="warning",
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    server.run(sockets=[config.bind_socket()])
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
