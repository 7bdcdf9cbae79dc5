"""Hosts as namespaces of this machine: network, PID and mount, joined by a pair of veth devices."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent / "host_program.py"
KEY = "the key of two hosts that are namespaces"
NET = "10.231.77"
_PROBE = f"fc-probe{os.getpid()}"


def missing() -> str | None:
    """Why there can be no such hosts here; None if there can."""
    if os.geteuid() != 0:
        return "namespaces with a network of their own need root"
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (iproute2, util-linux)"
    probe = ["ip", "netns", "add", _PROBE]
    made = subprocess.run(probe, capture_output=True, check=False)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.decode().strip()}"
    run("ip", "netns", "del", _PROBE)
    return None


def run(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.decode()}"


def no_netem() -> str | None:
    """Why this kernel's links can't be told to lose packets; None if they can."""
    if missing() is not None or shutil.which("tc") is None:
        return "tc is not installed (iproute2), or no namespace can be made"
    run("ip", "netns", "add", _PROBE)
    try:
        lose = [
            "ip",
            "netns",
            "exec",
            _PROBE,
            "tc",
            "qdisc",
            "add",
            "dev",
            "lo",
            "root",
            "netem",
        ]
        done = subprocess.run([*lose, "loss", "1%"], capture_output=True, check=False)
        return "this kernel has no netem" if done.returncode else None
    finally:
        run("ip", "netns", "del", _PROBE)


class HostProcess:
    """A `host_program` in a namespace."""

    def __init__(self, namespace: str, address: str, ranks: int, program: Path = PROGRAM) -> None:
        self.namespace = namespace
        self._process = subprocess.Popen(
            [
                *("ip", "netns", "exec", namespace),
                *("unshare", "--pid", "--mount", "--ipc", "--fork", "--kill-child", "--mount-proc"),
                *(sys.executable, str(program), address, str(ranks)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"FEATCACHE_CLUSTER_KEY": KEY, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._take() == {"result": address}

    def _take(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the host ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def begin(self, do: str, **asked: Any) -> None:
        """Ask, and do not wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **asked}) + "\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """Return the whole answer, an error included."""
        return self._take()

    def ask(self, do: str, **asked: Any) -> Any:
        """Return the result; an error fails the test."""
        self.begin(do, **asked)
        answer = self.end()
        assert "result" in answer, answer
        return answer["result"]

    def wait_until_empty(self) -> None:
        """Return once nothing is in its pool; the test's limit ends a wait that has no end."""
        while self.ask("used") != [0, 0]:
            pass

    def pid(self) -> int:
        """The pid, out here, of the process in the namespace."""
        pid = self._process.pid  # `ip` and `unshare` replace themselves; unshare forks the program
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0])

    def signal(self, number: signal.Signals) -> None:
        """Send the program a signal."""
        os.kill(self.pid(), number)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(Exception):
            os.kill(self.pid(), signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class TwoHosts:
    """Namespaces and the network between them: a link of two, or a switch that more are linked to."""

    def __init__(self, tag: str, count: int = 2) -> None:
        self.tag = tag
        self.names = [f"fc{tag}{letter}" for letter in "abcdefgh"[:count]]
        self.addresses = [f"{NET}.{number}:7400" for number in range(1, count + 1)]
        self.running: list[HostProcess] = []
        self._switch = f"fc{tag}s"

    def make(self) -> None:
        for name in self.names:
            run("ip", "netns", "add", name)
        if len(self.names) == 2:
            self._join(self.names[0], self.names[0], self.names[1], self.names[1])
        else:
            within = ("ip", "netns", "exec", self._switch)
            run("ip", "netns", "add", self._switch)
            run(*within, "ip", "link", "add", "switch", "type", "bridge")
            run(*within, "ip", "link", "set", "switch", "up")
            for name in self.names:
                self._join(name, name, self._switch, f"to-{name}")
                run(*within, "ip", "link", "set", f"to-{name}", "master", "switch", "up")
        for number, name in enumerate(self.names, 1):
            self.within(number - 1, "ip", "address", "add", f"{NET}.{number}/24", "dev", name)
            self.within(number - 1, "ip", "link", "set", name, "up")
            self.within(number - 1, "ip", "link", "set", "lo", "up")

    @staticmethod
    def _join(namespace: str, device: str, other: str, other_device: str) -> None:
        ends = ("type", "veth", "peer", "name", other_device, "netns", other)
        run("ip", "link", "add", device, "netns", namespace, *ends)

    def within(self, host: int, *command: str) -> None:
        """Run a command in a host's network."""
        run("ip", "netns", "exec", self.names[host], *command)

    def start(self, host: int, ranks: int = 0, program: Path = PROGRAM) -> HostProcess:
        """Start a host's program."""
        started = HostProcess(self.names[host], self.addresses[host], ranks, program)
        self.running.append(started)
        return started

    def link(self, state: str, host: int = 0) -> None:
        """Set a host's end of its link ``up`` or ``down``."""
        self.within(host, "ip", "link", "set", self.names[host], state)

    def misdirect(self, host: int = 0) -> None:
        """Have a host send to a station that is not there: what it sends is lost unseen."""
        nowhere = ("lladdr", "02:00:00:00:00:99", "dev", self.names[host], "nud", "permanent")
        for number in range(1, len(self.names) + 1):
            if number - 1 != host:
                self.within(host, "ip", "neigh", "replace", f"{NET}.{number}", *nowhere)

    def redirect(self, host: int = 0) -> None:
        """Have it find the others again."""
        for number in range(1, len(self.names) + 1):
            if number - 1 != host:
                lost = ("ip", "neigh", "del", f"{NET}.{number}", "dev", self.names[host])
                self.within(host, *lost)

    def netem(self, *how: str) -> None:
        """Have the link lose or delay packets, in both directions; with nothing, no longer."""
        for host, name in enumerate(self.names):
            verb = (
                ("replace", "dev", name, "root", "netem", *how)
                if how
                else ("del", "dev", name, "root")
            )
            self.within(host, "tc", "qdisc", *verb)

    def close(self) -> None:
        for each in self.running:
            each.close()
        for name in [*self.names, self._switch]:
            gone = ["ip", "netns", "del", name]
            subprocess.run(gone, capture_output=True, check=False)


@contextlib.contextmanager
def two_hosts(count: int = 2) -> Iterator[TwoHosts]:
    """Two hosts, or more, for as long as the context lasts."""
    made = TwoHosts(f"{os.getpid() % 100000}", count)
    try:
        made.make()
        yield made
    finally:
        made.close()
