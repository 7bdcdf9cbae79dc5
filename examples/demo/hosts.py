"""The demo over two hosts: network namespaces of this machine, or two owners on its loopback.

The owner that puts is on one host; the four ranks read through the owner of the other, which fetches
each picture's patches once for all of them. Namespaces need root and iproute2.
"""

import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from featcache import FeatcacheError

NET = "10.231.78"
KEY = "FEATCACHE_CLUSTER_KEY"
NETWORKS = "DEMO_NETWORKS"
IP = shutil.which("ip")
PATIENCE = 60.0


class NoHosts(FeatcacheError):
    """The other host's owner did not start."""


class TwoHosts:
    """Where the demo's owner listens, and the endpoint that the ranks on the other host connect to."""

    def __init__(self, listen: str, endpoint: str, network: str | None, what: str) -> None:
        self.listen = listen
        self.endpoint = endpoint
        self.network = network
        self.what = what


def enter(network: str) -> None:
    """Move this thread, and what it starts, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{network}").open() as file:
        if libc.setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"the namespace {network} can't be entered")


def why_no_namespaces() -> str | None:
    """Why two namespaces can't be had; None if they can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if IP is None:
        return "namespaces need ip (iproute2)"
    probe = f"fc-demo{os.getpid()}p"
    try:
        ip("netns", "add", probe)
    except subprocess.CalledProcessError as error:
        return str(error.stderr.decode().strip())
    ip("netns", "del", probe)
    return None


def ip(*arguments: str) -> None:
    assert IP is not None
    subprocess.run([IP, *arguments], check=True, capture_output=True)


def make(names: Sequence[str]) -> None:
    """Make two network namespaces, joined by a pair of veth devices."""
    for name in names:
        ip("netns", "add", name)
    ends = [f"v{os.getpid()}{end}" for end in "ab"]
    peer = ("type", "veth", "peer", "name", ends[1], "netns", names[1])
    ip("link", "add", ends[0], "netns", names[0], *peer)
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        ip("-n", name, "address", "add", f"{NET}.{number}/24", "dev", end)
        ip("-n", name, "link", "set", end, "up")
        ip("-n", name, "link", "set", "lo", "up")


def remove(names: Sequence[str]) -> None:
    for name in names:
        with suppress(subprocess.CalledProcessError):
            ip("netns", "del", name)


def begin_within() -> list[str]:
    """Begin this program anew in the first of two namespaces; there, return their names.

    `ip` runs it, which also has /sys show the namespace's devices: UCX looks for them there.
    """
    if NETWORKS in os.environ:
        return os.environ[NETWORKS].split(",")
    names = [f"fc-demo{os.getpid()}{end}" for end in "ab"]
    os.environ[NETWORKS] = ",".join(names)
    assert IP is not None
    try:
        make(names)
        within = [IP, "netns", "exec", names[0], sys.executable, *sys.argv]
        os.execv(IP, within)  # noqa: S606 - no shell is wanted
    finally:
        remove(names)


@contextmanager
def two_hosts(capacity: str) -> Iterator[TwoHosts]:
    """Two hosts: this process is on one, on the other an owner serves those who read."""
    os.environ[KEY] = secrets.token_hex(32)  # of both hosts, and gone with them
    why_not = None if NETWORKS in os.environ else why_no_namespaces()
    if why_not is not None:
        port = free_port()
        what = f"two owners on the loopback device, as {why_not}"
        with reading_host(capacity, None) as endpoint:
            yield TwoHosts(f"127.0.0.1:{port}", endpoint, None, what)
        return
    names = begin_within()
    what = f"two network namespaces: {NET}.1 puts, {NET}.2 reads"
    try:
        with reading_host(capacity, names[1]) as endpoint:
            yield TwoHosts(f"{NET}.1:7400", endpoint, names[1], what)
    finally:
        remove(names)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def reading_host(capacity: str, network: str | None) -> Iterator[str]:
    """The owner of the host that reads; its endpoint."""
    with tempfile.TemporaryDirectory(prefix="featcache-demo-") as folder:
        endpoint = Path(folder) / "reader.sock"
        serve = [sys.executable, "-m", "featcache", "serve", "--capacity", capacity]
        within = [] if network is None else [str(IP), "netns", "exec", network]
        owner = subprocess.Popen(
            [*within, *serve, "--endpoint", str(endpoint), "--log-level", "error"],
            stdout=subprocess.DEVNULL,
        )
        try:
            give_up = time.monotonic() + PATIENCE
            while not endpoint.exists():
                if owner.poll() is not None or time.monotonic() > give_up:
                    raise NoHosts("the reading host's owner did not start: see what it says above")
                time.sleep(0.05)
            yield str(endpoint)
        finally:
            owner.terminate()
            owner.wait()
