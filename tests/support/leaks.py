"""What a process has open, counted, so that a test can see whether it left anything behind."""

import os
import threading
import time
from collections import Counter
from multiprocessing import resource_tracker
from pathlib import Path


def threads_ended(timeout_s: float = 20.0) -> None:
    """Wait for the threads of what was closed: the last one to end may hold the last reference.

    Those of what was not closed stay, and what that has open tells of it.
    """
    give_up_s = time.monotonic() + timeout_s
    for thread in threading.enumerate():
        if thread.name.startswith("featcache"):
            thread.join(max(0.0, give_up_s - time.monotonic()))


def open_descriptors() -> Counter[str]:
    """Counts the open descriptors of this process by what they lead to."""
    # multiprocessing starts its tracker once, at the first need, and keeps its pipe to the end.
    tracker = getattr(resource_tracker._resource_tracker, "_fd", None)
    targets: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names, not the links' targets
        if int(entry) == tracker:
            continue
        try:
            targets[os.readlink(f"/proc/self/fd/{entry}")] += 1  # noqa: PTH115 - "pipe:[1]" is no path
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return targets


def mapped_memfds() -> Counter[str]:
    """Counts the mappings that this process has of featcache's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return Counter(line.split(maxsplit=5)[5] for line in lines if "memfd:featcache" in line)


def endpoint_files(runtime_dir: Path) -> Counter[str]:
    """Counts the files in the folder of endpoints."""
    return Counter(str(path) for path in (runtime_dir / "featcache").glob("*"))


def difference(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """What there is more of (positive) or less of (negative) than before."""
    return {
        name: after[name] - before[name]
        for name in sorted(before | after)
        if after[name] != before[name]
    }
