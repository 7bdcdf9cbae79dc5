"""Scripts run as their users run them, except that they are forked and so find torch imported.

A script is ``__main__``, with arguments, output, environment and runtime folder of its own, and is seen
from outside only. Processes that it spawns are forked by the same server; those that it forks or executes
itself are its own.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

import psutil

from support.processes import Forked, Server

_RUNTIME = "XDG_RUNTIME_DIR"
"""In the environment of what a script executes, so that it is known by it."""
_ERRORS, _SPAWNED = "stderr", "spawned"
"""Files in the runtime folder: the standard error, and the ids of what the script spawned."""


class _Spawned(Forked):
    """A process that a script spawns: its id is written down, its errors go where the script's go."""

    _errors: str

    def start(self) -> None:
        self._errors = str(Path("/proc/self/fd/2").readlink())
        super().start()
        with (Path(os.environ[_RUNTIME]) / _SPAWNED).open("a") as file:
            file.write(f"{self.pid}\n")

    def run(self) -> None:
        _redirect(2, Path(self._errors))
        super().run()


class _Context(Server):
    Process = _Spawned


_real_context = multiprocessing.get_context


def _context(kind: str | None = None) -> BaseContext:
    return _real_context("fork") if kind == "fork" else _Context()


def _redirect(descriptor: int, to: Path) -> None:
    opened = os.open(to, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(opened, descriptor)
    os.close(opened)


def _main(script: Path, arguments: list[str], runtime: Path, output: Connection) -> None:
    os.environ[_RUNTIME] = str(runtime)
    os.dup2(output.fileno(), 1)
    output.close()
    _redirect(2, runtime / _ERRORS)
    sys.argv = [str(script), *arguments]
    multiprocessing.get_context = _context  # type: ignore[assignment]  # of two kinds only
    runpy.run_path(str(script), run_name="__main__")


class Program:
    """A script that runs, until it is closed."""

    def __init__(self, script: Path, *arguments: object, runtime: Path) -> None:
        self._runtime = self.runtime = runtime
        for name in (_ERRORS, _SPAWNED):
            (runtime / name).touch()
        ours, theirs = multiprocessing.Pipe(duplex=False)
        given = script, [*map(str, arguments)], runtime, theirs
        self._process = Server().Process(target=_main, args=given)
        self._process.start()
        theirs.close()
        self._output = os.fdopen(os.dup(ours.fileno()))
        ours.close()
        assert self._process.pid is not None, "started"
        self.pid = self._process.pid

    def line(self, start: str) -> str:
        """Return the rest of the next line of output that begins with `start`."""
        for line in self._output:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise AssertionError(f"no line began with {start!r}; {self.code()}: {self.errors()}")

    def output(self) -> str:
        """Return what it prints until it ends."""
        return self._output.read()

    def errors(self) -> str:
        """Return what it and its processes have written to the standard error so far."""
        return (self._runtime / _ERRORS).read_text()

    def code(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._process.exitcode

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def ends(self, within_s: float = 20.0) -> int:
        """Return the exit code; nothing that it made may be left."""
        self._process.join(within_s)
        code = self.code()
        assert code is not None, f"still running after {within_s} s: {self.errors()}"
        self.assert_no_children()
        assert list((self._runtime / "featcache").glob("*")) == []
        return code

    def children(self) -> list[psutil.Process]:
        """Return the processes that it started and that still run, whoever their parent is by now."""
        ids = {int(line) for line in (self._runtime / _SPAWNED).read_text().split()}
        return [process for process in psutil.process_iter() if self._is_child(process, ids)]

    def _is_child(self, process: psutil.Process, spawned: set[int]) -> bool:
        try:
            executed = process.environ().get(_RUNTIME) == str(self._runtime)
            return (executed or process.pid in spawned) and process.status() != "zombie"
        except psutil.Error:  # gone, or of somebody else
            return False

    def assert_no_children(self) -> None:
        """Wait for its processes to end by themselves."""
        give_up_s = time.monotonic() + 20
        while (children := self.children()) and time.monotonic() < give_up_s:
            time.sleep(0.02)
        assert children == []

    def close(self) -> None:
        """Kill it and its processes if they live."""
        for child in self.children():
            child.kill()
        self._process.kill()
        self._process.join()
        self._process.close()
        self._output.close()
