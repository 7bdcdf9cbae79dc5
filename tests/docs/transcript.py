"""A page's terminals, replayed: its commands in real shells, its output compared.

A block of ``console`` is what one terminal shows, the terminal named by its title. A line that begins
with ``$ `` is a command, the lines up to the next one are its output, in which ``…`` stands for any part of a
line, and alone on a line for any number of lines. Blanks are compared as one blank, since tables are as
wide as what is in them. A block that begins with output is more of the command that its terminal ran
last, which has to be running until then. Each command has to end with status 0, but for those.
"""

import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from docs.pages import Block

WITHIN_S: Final = 50.0
_PROMPT: Final = "$ "
_ANY: Final = "…"


class Step(NamedTuple):
    """A command of a terminal, or more output of its last one."""

    terminal: str
    command: str | None
    expected: tuple[str, ...]
    stays: bool
    """Whether it runs on while other terminals go on."""


def steps_of(blocks: Iterable[Block]) -> list[Step]:
    """Return what is to be done, in the order of the page."""
    found: list[Step] = []
    last: dict[str, int] = {}
    for block in blocks:
        terminal = block.title
        assert terminal, f"{block.name}: a console block has its terminal as its title"
        for command, output in _split(block.text):
            if command is None:
                found[last[terminal]] = found[last[terminal]]._replace(stays=True)
            last[terminal] = len(found)
            found.append(Step(terminal, command, tuple(output), stays=False))
    return found


def _split(text: str) -> list[tuple[str | None, list[str]]]:
    parts: list[tuple[str | None, list[str]]] = []
    for line in text.splitlines():
        if line.startswith(_PROMPT):
            parts.append((line.removeprefix(_PROMPT), []))
        else:
            if not parts:
                parts.append((None, []))
            parts[-1][1].append(line)
    return parts


def pattern_of(expected: Iterable[str]) -> str:
    """Return what matches such output, each line of it with its end."""
    lines = []
    for line in expected:
        if line.strip() == _ANY:
            lines.append(r"(?:[^\n]*\n)*?")
        else:
            parts = (
                r"[^\S\n]+".join(map(re.escape, re.split(r"[^\S\n]+", part)))
                for part in line.rstrip().split(_ANY)
            )
            lines.append(r"[^\n]*?".join(parts) + r"[^\S\n]*\n")
    return "".join(lines)


class Terminal:
    """One shell: commands go in one by one, and what they say comes out."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._shell = subprocess.Popen(
            ["/bin/bash", "--noprofile", "--norc"],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._commands = 0
        self._said = ""
        self._status: int | None = 0
        """Of the last command, None while it runs."""
        self._send("set -o pipefail")
        self.ends()

    def run(self, step: Step) -> str:
        """Run a step; return what is wrong with it, or nothing."""
        if step.command is not None:
            self._said = ""
            self._send(step.command)
        pattern = pattern_of(step.expected)
        if step.stays:
            matched = self._until(lambda: re.match(pattern, self._said) is not None)
            wrong = (
                "" if matched and self._status is None else "it does not run on with this output"
            )
            # What comes later is compared with what was not: a `…` alone takes what is left over.
            found = re.match(pattern, self._said)
            self._said = self._said[found.end() :] if found else self._said
            return wrong and f"{wrong} (status {self._status}): {self._said}"
        status = self.ends()
        if status:
            return f"it ended with status {status}: {self._said}"
        if re.fullmatch(pattern, self._said) is None:
            return f"its output is\n{self._said}instead of\n" + "\n".join(step.expected)
        return ""

    def ends(self) -> int | None:
        """Return the status of the command, or None if it runs on for too long."""
        self._until(lambda: self._status is not None)
        return self._status

    def close(self) -> None:
        """End the shell and what it runs."""
        os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()
        for pipe in (self._shell.stdin, self._shell.stdout):
            assert pipe is not None, "both are pipes"
            pipe.close()

    def _send(self, command: str) -> None:
        self._commands += 1
        self._status = None
        assert self._shell.stdin is not None, "a pipe"
        mark = f"printf '\\036%d %d\\036' {self._commands} $?"
        self._shell.stdin.write(f"{command}\n{mark}\n".encode())
        self._shell.stdin.flush()

    def _until(self, there: Callable[[], bool]) -> bool:
        """Take output until something is there or the command has ended; return whether it is there."""
        give_up_s = time.monotonic() + WITHIN_S
        assert self._shell.stdout is not None, "a pipe"
        with selectors.DefaultSelector() as selector:
            selector.register(self._shell.stdout, selectors.EVENT_READ)
            while not there():
                left_s = give_up_s - time.monotonic()
                if self._status is not None or not selector.select(max(left_s, 0)):
                    return there()
                data = os.read(self._shell.stdout.fileno(), 1 << 16)
                if not data:
                    self._status = -1  # the shell itself ended
                self._take(data.decode(errors="replace"))
        return True

    def _take(self, text: str) -> None:
        self._said += text
        mark = re.search(rf"\x1e{self._commands} (\d+)\x1e", self._said)
        if mark is not None:
            self._status = int(mark[1])
            self._said = self._said[: mark.start()] + self._said[mark.end() :]


class Transcript:
    """The terminals of a page."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._terminals: dict[str, Terminal] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for terminal in self._terminals.values():
            terminal.close()

    def run(self, step: Step) -> None:
        """Run a step in its terminal.

        Raises:
            AssertionError: it failed, or said something else.

        """
        if step.terminal not in self._terminals:
            self._terminals[step.terminal] = Terminal(self._folder, self._environment)
        wrong = self._terminals[step.terminal].run(step)
        assert not wrong, f"{step.terminal}, {_PROMPT}{step.command or '(going on)'}: {wrong}"

    def all_ended(self) -> bool:
        """Whether no command runs on."""
        return all(terminal.ends() == 0 for terminal in self._terminals.values())
