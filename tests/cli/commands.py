"""Commands as processes: their output, their exit codes, the signals they are sent."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import featcache
from support.processes import Server

MAIN: Final = Path(featcache.__file__).with_name("__main__.py")
WITHIN_S: Final = 40.0


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Its output, an object a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    def failed_with(self, code: int) -> str:
        """Return the one line that it said, and no traceback, as it ended with this code."""
        assert (self.code, self.out) == (code, ""), self
        assert self.err.startswith("featcache: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.strip()


Run: TypeAlias = Callable[..., Ended]


def _main(arguments: list[str], out: Path, err: Path, environment: dict[str, str]) -> None:
    import runpy
    import sys

    for number, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.update(environment)
    sys.argv = ["featcache", *arguments]
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    runpy.run_path(str(MAIN), run_name="__main__")


def started(
    arguments: list[str], out: Path, err: Path, environment: dict[str, str] | None = None
) -> BaseProcess:
    """Start a command, whose output goes to two files."""
    process = Server().Process(target=_main, args=(arguments, out, err, environment or {}))
    process.start()
    return process


class Daemon:
    """A command that runs."""

    def __init__(self, folder: Path, arguments: tuple[object, ...], env: dict[str, str]) -> None:
        number = len(list(folder.glob("command-*.out")))
        self._out, self._err = (folder / f"command-{number}.{kind}" for kind in ("out", "err"))
        for path in (self._out, self._err):
            path.touch()
        self.process = started([str(each) for each in arguments], self._out, self._err, env)
        assert self.process.pid is not None, "started"
        self.pid = self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def line(self, start: str) -> str:
        """Return the rest of the first line of output that begins so, once it is there."""
        import time

        give_up_s = time.monotonic() + WITHIN_S
        while time.monotonic() < give_up_s:
            for line in self.out.splitlines(keepends=True):
                if line.startswith(start) and line.endswith("\n"):
                    return line.removeprefix(start).strip()
            assert self.process.exitcode is None, f"ended with {self.process.exitcode}: {self.err}"
            time.sleep(0.005)
        raise AssertionError(f"no line began with {start!r}: {self.out}{self.err}")

    def holds(self, text: str) -> None:
        """Wait until this is somewhere in its output."""
        import time

        give_up_s = time.monotonic() + WITHIN_S
        while text not in self.out:
            assert self.process.exitcode is None, f"ended with {self.process.exitcode}: {self.err}"
            assert time.monotonic() < give_up_s, f"no {text!r} in {self.out[-2000:]}"
            time.sleep(0.005)

    def endpoint(self) -> str:
        """Return the endpoint, once it serves."""
        return self.line("featcache serves ")

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ends(self) -> Ended:
        """Return how it ended."""
        self.process.join(WITHIN_S)
        code = self.process.exitcode
        assert code is not None, f"still running: {self.out}{self.err}"
        return Ended(code, self.out, self.err)

    def stops(self, number: signal.Signals = signal.SIGTERM) -> Ended:
        """Send a signal; return how it ended."""
        self.send_signal(number)
        return self.ends()

    def close(self) -> None:
        """Kill it if it runs."""
        self.process.kill()
        self.process.join()
        self.process.close()


def run_command(folder: Path) -> Run:
    """Return what runs a command to its end."""

    def run(*arguments: object, **env: str) -> Ended:
        daemon = Daemon(folder, arguments, env)
        try:
            return daemon.ends()
        finally:
            daemon.close()

    return run


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Callable[..., Daemon]]:
    """Lend what starts owners; none is left."""
    started: list[Daemon] = []

    def start(*arguments: object, **env: str) -> Daemon:
        small = ("--capacity", "16MiB", "--set", "segment=1MiB", "--grace", "20")
        daemon = Daemon(folder, ("serve", *small, *arguments), env)
        started.append(daemon)
        return daemon

    try:
        yield start
    finally:
        for daemon in started:
            daemon.close()
