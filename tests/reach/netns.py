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


def missing() -> str | None:
    """Why there can be no such hosts here; None if there can."""
    if os.geteuid() != 0:
        return "namespaces with a network of their own need root"
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (iproute2, util-linux)"
    probe = ["ip", "netns", "add", "fc-probe"]
    made = subprocess.run(probe, capture_output=True, check=False)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.decode().strip()}"
    run("ip", "netns", "del", "fc-probe")
    return None


def run(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.decode()}"


def no_netem() -> str | None:
    """Why this kernel's links can't be told to lose packets; None if they can."""
    if missing() is not None or shutil.which("tc") is None:
        return "tc is not installed (iproute2), or no namespace can be made"
    run("ip", "netns", "add", "fc-probe")
    try:
        lose = [
            "ip",
            "netns",
            "exec",
            "fc-probe",
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
        run("ip", "netns", "del", "fc-probe")


class HostProcess:
    """A `host_program` in a namespace."""

    def __init__(self, namespace: str, address: str, ranks: int) -> None:
        self.namespace = namespace
        self._process = subprocess.Popen(
            [
                *("ip", "netns", "exec", namespace),
                *("unshare", "--pid", "--mount", "--ipc", "--fork", "--kill-child", "--mount-proc"),
                *(sys.executable, str(PROGRAM), address, str(ranks)),
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
    """Two namespaces and the link between them."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.names = [f"fc{tag}a", f"fc{tag}b"]
        self.addresses = [f"{NET}.1:7400", f"{NET}.2:7400"]
        self.running: list[HostProcess] = []

    def make(self) -> None:
        one, two = self.names
        for name in self.names:
            run("ip", "netns", "add", name)
        run(
            "ip",
            "link",
            "add",
            one,
            "netns",
            one,
            "type",
            "veth",
            "peer",
            "name",
            two,
            "netns",
            two,
        )
        for number, name in enumerate(self.names, 1):
            self.within(number - 1, "ip", "address", "add", f"{NET}.{number}/24", "dev", name)
            self.within(number - 1, "ip", "link", "set", name, "up")
            self.within(number - 1, "ip", "link", "set", "lo", "up")

    def within(self, host: int, *command: str) -> None:
        """Run a command in a host's network."""
        run("ip", "netns", "exec", self.names[host], *command)

    def start(self, host: int, ranks: int = 0) -> HostProcess:
        """Start a host's program."""
        started = HostProcess(self.names[host], self.addresses[host], ranks)
        self.running.append(started)
        return started

    def link(self, state: str) -> None:
        """Set the first host's end of the link ``up`` or ``down``."""
        self.within(0, "ip", "link", "set", self.names[0], state)

    def misdirect(self) -> None:
        """Have the first host send to a station that is not there: what it sends is lost unseen."""
        nowhere = ("lladdr", "02:00:00:00:00:99", "dev", self.names[0], "nud", "permanent")
        self.within(0, "ip", "neigh", "replace", f"{NET}.2", *nowhere)

    def redirect(self) -> None:
        """Have it find the other host again."""
        self.within(0, "ip", "neigh", "del", f"{NET}.2", "dev", self.names[0])

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
        for name in self.names:
            gone = ["ip", "netns", "del", name]
            subprocess.run(gone, capture_output=True, check=False)


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Two hosts for as long as the context lasts."""
    made = TwoHosts(f"{os.getpid() % 100000}")
    try:
        made.make()
        yield made
    finally:
        made.close()
