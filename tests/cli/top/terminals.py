"""Commands in a terminal of their own (a pty), and what they leave of it."""

import contextlib
import os
import pty
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from typing import Any

from cli.commands import MAIN, WITHIN_S
from support.processes import Server

ENTERED, LEFT = "\x1b[?1049h", "\x1b[?1049l"
"""The alternate screen."""
CURSOR_SHOWN, CURSOR_HIDDEN = "\x1b[?25h", "\x1b[?25l"


def _main(path: str, arguments: list[str], environment: dict[str, str]) -> None:
    import runpy
    import sys

    os.setsid()
    terminal = os.open(path, os.O_RDWR)  # the first that a new session opens is its own
    for number in range(3):
        os.dup2(terminal, number)
    os.environ.update(environment)
    sys.argv = ["featcache", *arguments]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        opened = os.fdopen(number, "w" if number else "r", closefd=False)
        setattr(sys, name, opened)
        setattr(sys, f"__{name}__", opened)
    runpy.run_path(str(MAIN), run_name="__main__")


class Terminal:
    """A command in a terminal."""

    def __init__(self, arguments: list[str], size: tuple[int, int], env: dict[str, str]) -> None:
        self._master, self._slave = pty.openpty()
        columns, rows = size
        ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.modes: list[Any] = termios.tcgetattr(self._slave)
        self._output = bytearray()
        self._reader = threading.Thread(target=self._read, name="terminal")
        given = {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""} | env
        self.process = Server().Process(
            target=_main, args=(os.ttyname(self._slave), arguments, given)
        )
        self.process.start()
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while got := os.read(self._master, 1 << 16):
                self._output += got

    @property
    def output(self) -> str:
        return self._output.decode(errors="replace")

    def shows(self, text: str) -> None:
        """Wait until this was written."""
        self.until(lambda: text in self.output, text)

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until something holds of the output."""
        give_up_s = time.monotonic() + WITHIN_S
        while not holds():
            assert self.process.exitcode is None, (
                f"it ended without {what!r}: {self.output[-3000:]}"
            )
            assert time.monotonic() < give_up_s, f"no {what!r} in {self.output[-3000:]}"
            time.sleep(0.005)

    def types(self, text: str) -> None:
        os.write(self._master, text.encode())

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None, "started"
        os.kill(self.process.pid, number)

    def ends(self) -> int | None:
        """Return its exit code, once it has ended and all that it wrote is here."""
        self.process.join(WITHIN_S)
        assert self.process.exitcode is not None, f"still running: {self.output[-3000:]}"
        return self.process.exitcode

    def is_as_it_was(self) -> bool:
        """Whether its modes, its screen and its cursor are those from before."""
        mark = "\x00end of output\x00"
        os.write(self._slave, mark.encode())
        give_up_s = time.monotonic() + WITHIN_S
        while mark not in self.output:
            assert time.monotonic() < give_up_s, self.output[-300:]
            time.sleep(0.005)
        output = self.output
        return (
            termios.tcgetattr(self._slave) == self.modes
            and output.rfind(LEFT) > output.rfind(ENTERED) >= 0
            and output.rfind(CURSOR_SHOWN) > output.rfind(CURSOR_HIDDEN)
        )

    def close(self) -> None:
        """Kill what runs in it, and take it away."""
        self.process.kill()
        self.process.join()
        self.process.close()
        os.close(self._slave)
        self._reader.join()
        os.close(self._master)


@contextlib.contextmanager
def terminals() -> Iterator[Callable[..., Terminal]]:
    """Lend what runs a command in a terminal; none is left."""
    opened: list[Terminal] = []

    def run(*arguments: object, size: tuple[int, int] = (80, 24), **env: str) -> Terminal:
        opened.append(Terminal([str(each) for each in arguments], size, env))
        return opened[-1]

    try:
        yield run
    finally:
        for terminal in opened:
            terminal.close()
