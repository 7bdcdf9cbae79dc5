"""A process that ends with blocking objects open ends: with its own exit code, and in order."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import featcache
from featcache.blocking import loopthread
from support.caches import KIB, filled, small
from support.leaks import endpoint_files
from support.processes import Pipe, Server, starting

SCRIPT = Path(__file__).parent / "left_open.py"


class Ended(NamedTuple):
    code: int
    lines: list[str]
    errors: str


@pytest.fixture(scope="module")
def each() -> dict[str, Ended]:
    """What became of the script in each way."""
    ways = ["end", "exit", "exception", "threads", "fork", "atexit", "loop"]
    with tempfile.TemporaryDirectory(prefix="fc-") as folder:
        told = subprocess.check_output(
            [sys.executable, SCRIPT, folder, *ways],
            env=os.environ | {"XDG_RUNTIME_DIR": folder},
            text=True,
            timeout=50,
        )
        assert endpoint_files(Path(folder)) == {}, "each owner's socket went with it"
    return {
        way: Ended(code, quiet(output), "\n".join(quiet(errors)))
        for way, (code, output, errors) in json.loads(told.splitlines()[-1]).items()
    }


def quiet(text: str) -> list[str]:
    """Return the lines but for those of the log."""
    return [line for line in text.splitlines() if "featcache." not in line]


def test_at_the_end_of_the_script(each: dict[str, Ended]) -> None:
    assert each["end"] == Ended(0, [], "")


def test_by_sys_exit(each: dict[str, Ended]) -> None:
    assert each["exit"] == Ended(3, [], "")


def test_by_an_exception(each: dict[str, Ended]) -> None:
    code, lines, errors = each["exception"]
    assert (code, lines) == (1, [])
    assert errors.count("Traceback") == 1
    assert errors.endswith("ZeroDivisionError")


def test_awaitable_objects_that_their_loop_left_open(each: dict[str, Ended]) -> None:
    assert (each["loop"].code, each["loop"].lines) == (0, [])


def test_while_threads_wait_in_calls_without_limit(each: dict[str, Ended]) -> None:
    code, lines, errors = each["threads"]
    assert (code, errors) == (0, "")
    assert len(lines) == 2
    assert all(line.startswith("refused:") for line in lines)


def test_a_forked_child_first(each: dict[str, Ended]) -> None:
    code, lines, errors = each["fork"]
    assert (code, errors) == (0, "")
    assert lines[0].startswith("refused: this process was forked")
    assert lines[1:] == ["child: 5"]


def test_what_is_done_in_a_handler_of_atexit(each: dict[str, Ended]) -> None:
    code, lines, errors = each["atexit"]
    assert (code, errors) == (0, "")
    assert "main thread ended" in lines[0]
    assert "exiting" in lines[1]


async def _own(pipe: Pipe) -> None:
    async with featcache.create(settings=small()) as owner:
        pipe.say(owner.endpoint)
        await pipe.hear()


def _leave_open(endpoint: str, attached: Any = None, go_on: Any = None) -> None:
    client = featcache.blocking.connect(endpoint).open()
    client.get(client.put(filled(KIB)))
    if attached is not None:
        attached.set()
        go_on.wait()


def test_in_a_child_of_multiprocessing() -> None:
    """It runs no handlers of atexit."""
    with featcache.blocking.create(settings=small()) as owner:
        child = Server().Process(target=_leave_open, args=(owner.endpoint,))
        child.start()
        child.join(50)
        assert child.exitcode == 0
        now = owner.statistics()
        assert (now.sessions, now.readers_lost) == (0, 0)
        child.close()


async def test_while_the_owner_is_stopped() -> None:
    with starting() as start:
        owner, server = start(_own), Server()
        (endpoint,) = await owner.hear()
        attached, go_on = server.Event(), server.Event()
        child = server.Process(target=_leave_open, args=(endpoint, attached, go_on))
        child.start()
        assert attached.wait(50)
        owner.signal(signal.SIGSTOP)
        go_on.set()
        child.join(50)
        assert child.exitcode == 0
        child.close()


# --- the end of the process, by its parts ----------------------------------------------------------


def test_readers_end_before_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    def made(name: str, *, last: bool) -> loopthread.LoopThread:
        async def close() -> None:
            ended.append(name)

        thread = loopthread.LoopThread(close, lambda: ended.append(f"{name} told"), last=last)
        thread.start()
        return thread

    monkeypatch.setattr(loopthread, "running", set())
    made("owner", last=True)
    made("reader", last=False)
    loopthread._Exits().end_all()
    assert ended == ["reader told", "reader", "owner told", "owner"]
    assert not loopthread.running


def test_the_wait_for_loops_that_do_not_end_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    async def close() -> None:
        go_on.wait(50)

    monkeypatch.setattr(loopthread, "running", set())
    monkeypatch.setattr(loopthread, "_EXIT_S", 0.01)
    stuck = loopthread.LoopThread(close, int, last=False)
    stuck.start()
    loopthread._Exits().end_all()
    assert stuck.is_alive()
    go_on.set()
    stuck.join()


@pytest.mark.gpu
def test_with_a_slab_on_a_gpu() -> None:
    code = """
import torch
from featcache import blocking
cache = blocking.create(device="cuda:0", capacity="128MiB").open()
client = blocking.connect(cache.endpoint, device="cuda:0").open()
x = torch.ones(1 << 20, device="cuda:0")
assert torch.equal(client.get(cache.put(x)), x)
raise SystemExit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=55, check=False
    )
    assert (done.returncode, "\n".join(quiet(done.stderr))) == (3, "")
