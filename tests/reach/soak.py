"""Reads between hosts with kills, stops and cuts: no wrong byte, nothing lost.

The hosts are namespaces of this machine (`reach.netns`), each both a home and a reader, so this needs root
and NIXL::

    PYTHONPATH=src:tests python -m reach.soak [--hosts 2] [--reads 100000] [--seed 1] [--out FILE]

In each round every host makes features, and the ranks of all other hosts read them, with gets, borrows,
releases and cancelled gets; in most, one of the hosts is killed and started again, stopped for a while, or
cut off, by its link or by packets that are lost unseen. Each read's bytes are compared by checksum; a call
that takes `_LONGEST_S` has hung. At the end nothing is in use, pinned, owed or in quarantine on any host.
"""

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench import machine, resultfile
from reach.netns import HostProcess, TwoHosts, missing, two_hosts

PROGRAM: Final = Path(__file__).parent / "storm_program.py"
FAULTS: Final = (
    "none",
    "killed",
    "stopped",
    "link down",
    "packets lost",
)
RANKS: Final = 2
_BATCH: Final = 100
"""Features that each host makes in a round."""
_LONGEST_S: Final = 40.0
"""A call that took longer has hung: `peer_timeout` is 2 s, and a put may wait for room until `ttl`."""
_RIGHT: Final = frozenset(("got", "borrowed", "released"))
_LOST: Final = frozenset(("OwnerLost", "its home has ended", "stale", "cancelled"))


class Soak:
    """One run."""

    def __init__(self, network: TwoHosts, seed: int) -> None:
        self._network = network
        self._dice = random.Random(seed)
        self._hosts = [self._start(number) for number in range(len(network.names))]
        self._seed = 0
        self.faults: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.longest_s = 0.0

    def _start(self, number: int) -> HostProcess:
        return self._network.start(number, RANKS, PROGRAM)

    @property
    def reads(self) -> int:
        """Reads that were done."""
        return sum(self.ended[how] for how in _RIGHT)

    def round(self) -> None:
        """Have every host make features and read the others', and meet a fault meanwhile."""
        made = self._make()
        fault = self._dice.choices(FAULTS, [4, 1, 1, 1, 1])[0]
        for number, host in enumerate(self._hosts):
            wanted = [each for at, batch in enumerate(made) if at != number for each in batch]
            self._dice.shuffle(wanted)
            host.begin("read", refs=wanted)
        self.faults[fault] += 1
        killed = self._fault(fault, self._dice.randrange(len(self._hosts)))
        for number, host in enumerate(self._hosts):
            if number == killed:
                continue
            told = host.end()["result"]
            assert fault != "none" or "stale" not in told["ended"], f"paid for no reason: {told}"
            self.ended.update(told["ended"])
            self.longest_s = max(self.longest_s, told["longest_s"])
        wrong = set(self.ended) - _RIGHT - _LOST
        assert not wrong, f"{ {each: self.ended[each] for each in wrong} } in a round of {fault}"
        assert self.longest_s < _LONGEST_S, f"a call of {self.longest_s:.1f} s after {fault}"

    def _make(self) -> list[list[tuple[str, int]]]:
        readers = RANKS * (len(self._hosts) - 1)
        made = list[list[tuple[str, int]]]()
        for host in self._hosts:
            first, self._seed = self._seed, self._seed + _BATCH
            refs = host.ask("make", first=first, count=_BATCH, readers=readers)
            made.append(list(zip(refs, range(first, self._seed), strict=True)))
        return made

    def _fault(self, fault: str, number: int) -> int | None:
        """Do something to a host, soon; return it if its answer is lost."""
        host, network = self._hosts[number], self._network
        if fault == "none":
            return None
        time.sleep(self._dice.random() * 0.5)
        if fault == "killed":
            host.signal(signal.SIGKILL)
            host.close()
            self._hosts[number] = self._start(number)
            return number
        faults: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "stopped": (
                partial(host.signal, signal.SIGSTOP),
                partial(host.signal, signal.SIGCONT),
            ),
            "link down": (
                partial(network.link, "down", number),
                partial(network.link, "up", number),
            ),
            "packets lost": (
                partial(network.misdirect, number),
                partial(network.redirect, number),
            ),
        }
        begins, ends = faults[fault]
        begins()
        # Shorter than the time in which a host is given up, longer, or longer than its lease.
        time.sleep(self._dice.choice([0.3, 3.0, 5.0]))
        ends()
        return None

    def left(self) -> list[dict[str, int]]:
        """Return what is left on each host, once leases and refs have ended: nothing."""
        give_up_s = time.monotonic() + 90
        while True:
            found: list[dict[str, int]] = [host.ask("left") for host in self._hosts]
            if not any(any(each.values()) for each in found) or time.monotonic() > give_up_s:
                return found
            time.sleep(0.5)


def run(count: int, reads: int, seed: int) -> dict[str, Any]:
    """Run until so many reads are done; return the result. AssertionError tells what went wrong."""
    began_s = time.monotonic()
    with two_hosts(count) as network:
        soak, told = Soak(network, seed), 0
        while soak.reads < reads:
            soak.round()
            if soak.reads // 5000 > told:
                told = soak.reads // 5000
                print(soak.reads, dict(soak.faults), dict(soak.ended), flush=True)  # noqa: T201
        left = soak.left()
        if any(any(each.values()) for each in left):
            slots = "\n".join(slot for host in soak._hosts for slot in host.ask("slots"))
            raise AssertionError(f"lost: {left}\n{slots}\nafter {dict(soak.faults)}")
        counts = [host.ask("counts") for host in soak._hosts]
    return {
        "hosts": count,
        "seed": seed,
        "reads": soak.reads,
        "features": soak._seed,
        "seconds": round(time.monotonic() - began_s),
        "longest_call_s": round(soak.longest_s, 2),
        "wrong": 0,
        "faults": dict(soak.faults),
        "ended": dict(soak.ended),
        "left": {key: sum(each[key] for each in left) for key in left[0]},
        "fetched_since_the_last_start": sum(each["fetched"] for each in counts),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--reads", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    why_not = missing()
    if why_not is not None:
        raise SystemExit(why_not)
    result = run(args.hosts, args.reads, args.seed)
    print(result, flush=True)  # noqa: T201 - its report
    header = {
        "date": machine.now(),
        "command": f"python -m reach.soak --hosts {args.hosts} --reads {args.reads}",
        "machine": machine.machine(),
    }
    resultfile.write(args.out, header | {"run": result})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
