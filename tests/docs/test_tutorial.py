"""The tutorial, done as its reader does it; and that a replay fails where a command does."""

import os
import shutil
import socket
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

from docs.pages import DOCS, ROOT, Block, blocks_of
from docs.transcript import Step, Transcript, pattern_of, steps_of
from featcache.cli.program import COMMANDS

TUTORIAL = DOCS / "tutorial.md"
SOURCES = ("src", "pyproject.toml", "README.md", "LICENSE")
METRICS_PORT = 9464


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def fresh_machine(folder: Path) -> tuple[Path, dict[str, str]]:
    """A checkout, and an environment in which all is installed but featcache.

    The packages that it needs are those of the environment of this test, and nothing is downloaded.
    """
    checkout, place = folder / "checkout", folder / "venv"
    checkout.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    venv.create(place, with_pip=False, symlinks=True)
    scripts = place / "bin"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(place)}))
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    pip = scripts / "pip"
    pip.write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    pip.chmod(0o755)
    environment = {
        "COLUMNS": "100",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "NO_COLOR": "1",
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's name for what it is to have is what it is not to have
        "PIP_NO_INDEX": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "XDG_RUNTIME_DIR": str(folder),
    }
    return checkout, environment


def at_port(block: Block, port: int) -> Block:
    """The same block with another port than the tutorial's, which somebody here may use."""
    return block._replace(text=block.text.replace(str(METRICS_PORT), str(port)))


@pytest.mark.timeout(240)  # seven times a new interpreter imports torch
def test_the_tutorial_can_be_done(runtime_dir: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    checkout, environment = fresh_machine(runtime_dir)
    port = free_port()
    found = [at_port(block, port) for block in blocks_of(TUTORIAL)]
    for block in found:
        if block.language == "python" and block.title:
            (checkout / block.title).write_text(block.text)
    steps = steps_of(block for block in found if block.language == "console")
    with Transcript(checkout, environment) as transcript:
        for step in steps:
            transcript.run(step)
        assert transcript.all_ended()


# --- the replay itself ---------------------------------------------------------------------------


def console(text: str, terminal: str = "A") -> Block:
    return Block(TUTORIAL, 0, "console", terminal, text)


def replay(folder: Path, *blocks: Block) -> None:
    environment: Mapping[str, str] = {"PATH": os.environ["PATH"]}
    with Transcript(folder, environment) as transcript:
        for step in steps_of(blocks):
            transcript.run(step)
        assert transcript.all_ended()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("$ false\n", "status 1"),
        ("$ false | cat\n", "status 1"),
        ("$ echo one\n", "instead of"),
        ("$ echo one\ntwo\n", "instead of"),
        ("$ echo one\none\ntwo\n", "instead of"),
        ("$ printf 'one\\ntwo\\n'\none\n", "instead of"),
        ("$ no-such-command\n…\n", "status 127"),
        ("$ echo one; exit 3\none\n", "status"),
        ("$ true\n$ false\n", "status 1"),
    ],
)
def test_a_command_that_fails_or_says_something_else_fails_the_replay(
    tmp_path: Path, text: str, why: str
) -> None:
    with pytest.raises(AssertionError, match=why):
        replay(tmp_path, console(text))


def test_output_is_compared_with_its_wildcards(tmp_path: Path) -> None:
    replay(tmp_path, console("$ printf 'a 1  b\\nc\\nd\\ne 2\\n'\na … b\n…\ne …\n"))
    assert pattern_of(["…"]) != pattern_of(["…x"])


def test_a_command_that_stays_goes_on_in_the_next_block_of_its_terminal(tmp_path: Path) -> None:
    stays = console("$ mkfifo pipe\n$ echo begun; cat pipe\nbegun\n")
    replay(tmp_path, stays, console("$ echo fed > pipe\n", "B"), console("fed\n$ echo $?\n0\n"))


@pytest.mark.parametrize("ends", ["echo begun", "echo begun; exit 1", "echo begun; false"])
def test_one_that_should_stay_and_ends_fails_the_replay(tmp_path: Path, ends: str) -> None:
    with pytest.raises(AssertionError):
        replay(tmp_path, console(f"$ {ends}\nbegun\n"), console("$ true\n", "B"), console("more\n"))


def test_a_terminal_goes_on_only_with_what_it_ran() -> None:
    with pytest.raises(KeyError):
        steps_of([console("output of nothing\n")])
    kept = steps_of([console("$ a\n"), console("more\n")])
    assert kept == [Step("A", "a", (), stays=True), Step("A", None, ("more",), stays=False)]


def test_the_tutorial_has_all_that_a_first_hour_needs() -> None:
    steps = steps_of(block for block in blocks_of(TUTORIAL) if block.language == "console")
    typed = [step.command or "" for step in steps]
    for words in ("pip install '.[cli,metrics]'", "featcache serve", "featcache top", "curl"):
        assert any(words in command for command in typed), words
    assert any(command.startswith("kill -TERM") for command in typed)
    assert {step.terminal for step in steps if step.stays} == {"Terminal 1"}
    assert set(COMMANDS) >= {"serve", "stat"}
