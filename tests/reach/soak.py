"""Reads between two hosts with kills, stops and cuts: no wrong byte, nothing lost.

The hosts are namespaces of this machine (`reach.netns`), so this needs root and NIXL::

    PYTHONPATH=src:tests python -m reach.soak SECONDS [SEED]

Each read's bytes are compared by checksum. After each fault the reader goes on with a home that lives, and at
the end both pools must be empty.
"""

import random
import signal
import sys
import time
from collections import Counter

from reach.host_program import crc, feature
from reach.netns import HostProcess, TwoHosts, missing, two_hosts

_LOST = ("OwnerLost", "OwnerUnreachable")
_MAX_BYTES = 2 << 20


class Soak:
    """One run."""

    def __init__(self, hosts: TwoHosts, seed: int) -> None:
        self._hosts = hosts
        self._dice = random.Random(seed)
        self._home = hosts.start(0)
        self._reader = hosts.start(1, ranks=4)
        self._seed = 0
        self._spare = ""
        self.counts: Counter[str] = Counter()

    def turn(self) -> None:
        """Read some features, then perhaps meet a fault."""
        for _ in range(20):
            self._read()
        fault = self._dice.choice(["none", "stop", "cut", "kill home", "kill reader"])
        self.counts[fault] += 1
        if fault == "stop":
            self._home.signal(signal.SIGSTOP)
            self._read_in_vain()
            self._home.signal(signal.SIGCONT)
        elif fault == "cut":
            self._hosts.misdirect()
            self._read_in_vain()
            self._hosts.redirect()
        elif fault == "kill home":
            ref, _, _, _ = self._put()
            self._reader.begin("get", ref=ref, ranks=1)
            self._home.signal(signal.SIGKILL)
            answer = self._reader.end()
            assert "result" in answer or answer["error"] in _LOST, answer
            self._home = self._hosts.start(0)
        elif fault == "kill reader":
            ref, _, _, _ = self._put()
            self._reader.begin("get", ref=ref, ranks=1)
            self._reader.signal(signal.SIGKILL)
            self._reader = self._hosts.start(1, ranks=4)

    def _put(self) -> tuple[str, int, int, int]:
        self._seed += 1
        nbytes, ranks = self._dice.randrange(_MAX_BYTES), self._dice.randint(1, 4)
        ref = self._home.ask("put", nbytes=nbytes, seed=self._seed, readers=ranks)
        return ref, nbytes, self._seed, ranks

    def _read(self) -> None:
        ref, nbytes, seed, ranks = self._put()
        while True:
            self._reader.begin("get", ref=ref, ranks=ranks)
            answer = self._reader.end()
            if "result" in answer:
                assert answer["result"] == [crc(feature(nbytes, seed))] * ranks, "a wrong byte"
                self.counts["reads"] += ranks
                return
            # After a cut the link comes back in its own time; a lease that ended has paid the read.
            assert answer["error"] in (*_LOST, "StaleRef"), answer
            self.counts[answer["error"]] += 1
            if answer["error"] == "StaleRef":
                return

    def _read_in_vain(self) -> None:
        self._reader.begin("get", ref=self._spare, ranks=1)
        answer = self._reader.end()
        assert answer["error"] in (*_LOST, "StaleRef"), answer

    def prepare(self) -> None:
        """Have a ref at hand that a fault's read asks for."""
        self._spare = self._put()[0]

    def end(self) -> None:
        """Both pools are empty, once leases and refs have ended."""
        for host in (self._home, self._reader):
            _drained(host)


def _drained(host: HostProcess) -> None:
    give_up_s = time.monotonic() + 60
    while (used := host.ask("used")) != [0, 0]:
        assert time.monotonic() < give_up_s, f"lost: {used}"
        time.sleep(0.2)


def main() -> None:
    """Run for so many seconds."""
    why_not = missing()
    if why_not is not None:
        raise SystemExit(why_not)
    seconds, seed = float(sys.argv[1]), int((*sys.argv[2:], "1")[0])
    with two_hosts() as hosts:
        soak = Soak(hosts, seed)
        give_up_s = time.monotonic() + seconds
        while time.monotonic() < give_up_s:
            soak.prepare()
            soak.turn()
            print(dict(soak.counts), flush=True)  # noqa: T201 - its report
        soak.end()
        print("nothing lost", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
