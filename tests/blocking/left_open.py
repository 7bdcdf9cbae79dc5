"""A script that ends with blocking objects open, in each way that its arguments name. Run by `test_exit`.

Each way is gone in a fork that has nothing open yet, and whose interpreter really ends: torch is imported
once. What became of it is told in the last line, as JSON: its exit code, output and errors.
"""

import asyncio
import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import featcache
from featcache import CacheClosed, blocking

FEATURE = torch.ones(4 << 10)


def say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201 - it is told by what it prints


def refused(*calls: Callable[[], object]) -> None:
    for call in calls:
        try:
            say("no error:", call())
        except CacheClosed as error:
            say("refused:", error)


def in_threads(cache: blocking.FeatureCache) -> None:
    """Leave a thread and an executor's worker waiting without limit."""
    cache.put(torch.ones(1 << 18))  # all there is
    threading.Thread(target=refused, args=[lambda: cache.put(FEATURE)]).start()
    ThreadPoolExecutor(1).submit(refused, lambda: cache.get("never", timeout=1e6))
    while not (cache.statistics().waiters and cache.statistics().misses):
        time.sleep(0.001)


def forked(cache: blocking.FeatureCache) -> None:
    """Have a child end with what it inherited, then use it here."""
    child = os.fork()
    if child == 0:
        refused(lambda: cache.put(FEATURE))
        sys.exit(5)
    say("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    cache.get(cache.put(FEATURE))


async def in_a_loop() -> str:
    """Leave objects of the awaitable kind open as their loop ends; return the endpoint."""
    cache = await featcache.create(settings=featcache.Settings(capacity=1 << 20)).open()
    client = await featcache.connect(cache.endpoint).open()
    await client.get(await client.put(FEATURE))
    return cache.endpoint


def main(how: str) -> None:
    """Open things, and return or exit."""
    if how == "loop":
        left = Path(asyncio.run(in_a_loop()))
        for path in (left, left.with_name(f"{left.name}.lock")):
            path.unlink()  # which nobody does
        return
    cache = blocking.create(settings=featcache.Settings(capacity=1 << 20)).open()
    client = blocking.connect(cache.endpoint).open()
    client.get(cache.put(FEATURE))
    if how == "exception":
        raise ZeroDivisionError
    if how == "threads":
        in_threads(cache)
    if how == "fork":
        forked(cache)
    if how == "atexit":
        opens = blocking.connect(cache.endpoint).open
        atexit.register(refused, lambda: cache.put(FEATURE), opens)
        atexit.register(cache.close)
    if how == "exit":
        sys.exit(3)


def fork(how: str, folder: Path) -> int:
    """Fork for one way; return the child's id, or 0 in the child, whose output goes into files."""
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{how}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    return child


def ended(child: int, how: str, folder: Path) -> tuple[int, str, str]:
    """Return the exit code, the output and the errors of a child."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, (folder / f"{how}.out").read_text(), (folder / f"{how}.err").read_text()


def start(folder: Path, ways: list[str]) -> str | None:
    """Have a child go each way, and tell what became of them; in a child return its way."""
    children = dict[str, int]()
    for how in ways:
        children[how] = fork(how, folder)
        if children[how] == 0:
            return how
    say(json.dumps({how: ended(child, how, folder) for how, child in children.items()}))
    return None


if __name__ == "__main__" and (way := start(Path(sys.argv[1]), sys.argv[2:])) is not None:
    main(way)  # its end is the interpreter's
