"""Every block of code of every page is run, by what its language is."""

import ast
import asyncio
import configparser
import os
import re
import shlex
import signal
import socket
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import featcache
from docs.pages import PAGES, ROOT, Block, blocks, blocks_of
from docs.scene import scene
from featcache import events
from featcache.cli.config import options_of
from featcache.cli.program import COMMANDS, run
from featcache.cli.program import featcache as program
from featcache.events import hooks
from featcache.integrations import tracing

TUTORIAL = ROOT / "docs" / "tutorial.md"
PYTHON = blocks("python")
SHELL = blocks("sh", "bash")
DRAWN = {"": {"architecture.md"}, "text": {"sizing.md"}}
"""Blocks that are no code: the pictures, and formulas."""
LOOKS = {"stat", "keys", "ls", "doctor"}
"""Commands that end by themselves."""
ENDPOINT = "ENDPOINT"
METRICS_PORT = 9464


def named(block: Block) -> Any:
    return pytest.param(block, id=block.name)


# --- python ---------------------------------------------------------------------------------------


def here(source: str) -> str:
    """The source for this machine: devices that it has, a port that nobody uses, and less memory."""
    gpus = torch.cuda.device_count()

    def device(found: re.Match[str]) -> str:
        return f'"cuda:{int(found[1]) % gpus}"' if gpus else '"cpu"'

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    source = re.sub(r'"cuda:(\d)"', device, source).replace(str(METRICS_PORT), str(port))
    return re.sub(r'((?:capacity|spill)="\d)GiB"', r'\g<1>6MiB"', source)


def needs_gpu(block: Block) -> bool:
    return "torch.cuda" in block.text


def python_blocks() -> list[Any]:
    gpu = (pytest.mark.gpu,)
    return [
        pytest.param(block, id=block.name, marks=gpu if needs_gpu(block) else ())
        for block in PYTHON
        if not block.title  # a file of the tutorial's, which its replay runs
        and "import ray" not in block.text  # it starts a cluster: as examples/ray_transport.py does
    ]


def imports_before(block: Block) -> str:
    """What the blocks above on the page import: a page imports a name once."""
    lines = []
    for above in blocks_of(block.page):
        if above.language == "python" and above.number < block.number:
            body = ast.parse(above.text).body
            lines += [
                ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)
            ]
    return "\n".join(lines)


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hooks, handlers and spans that a snippet leaves are taken back."""
    added, handler = hooks._hooks, signal.getsignal(signal.SIGTERM)
    yield
    for hook in [each for each in hooks._hooks if each not in added]:
        events.remove_hook(hook)
    signal.signal(signal.SIGTERM, handler)
    tracing.uninstrument()


async def execute(source: str, names: dict[str, Any]) -> None:
    code = compile(source, "snippet", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & 0x80:  # CO_COROUTINE: it awaits
        await eval(code, names)  # noqa: S307 - the documentation's own
    elif "signal.signal" in source:
        exec(code, names)  # noqa: S102 - as above; handlers are set in the main thread alone
    else:  # as in a program with no loop, whose owner is elsewhere
        await asyncio.to_thread(exec, code, names)


@pytest.mark.usefixtures("_as_before", "no_leaks")
@pytest.mark.parametrize("block", python_blocks())
async def test_a_snippet_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene() as names:
        monkeypatch.setenv("FEATCACHE_ENDPOINT", names["endpoint"])
        await execute(imports_before(block), dict(names))
        await execute(f"{imports_before(block)}\n{here(block.text)}", names)
        if re.search(r"^async def main\(\)", block.text, re.MULTILINE):
            await ends_by_signal(names["main"])


async def ends_by_signal(main: Callable[[], Any]) -> None:
    """Run a server's main until it handles signals, send one, and await its end."""
    before = signal.getsignal(signal.SIGTERM)
    running = asyncio.ensure_future(main())
    while signal.getsignal(signal.SIGTERM) is before:
        assert not running.done(), await running
        await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    await running
    asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


@pytest.mark.parametrize("block", [named(block) for block in PYTHON])
def test_a_snippet_names_what_featcache_has(block: Block) -> None:
    """Also those that run on a GPU alone."""
    compile(block.text, "snippet", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    known = {"featcache": featcache, "events": events, "blocking": featcache.blocking}
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module == "featcache":
            assert all(hasattr(featcache, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = known.get(node.value.id)
            assert module is None or hasattr(module, node.attr), node.attr


async def test_a_snippet_that_fails_would_be_seen() -> None:
    async with scene() as names:
        for source in ("raise KeyError(ref)", "await cache.get('nothing')", "unknown_name"):
            with pytest.raises((KeyError, NameError, LookupError)):
                await execute(source, dict(names))


# --- the shell ------------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    """The commands of a block, as words, without variables before and `&` behind them.

    One that goes on after a backslash, or within quotes, is one.
    """
    found, open_quotes = [], ""
    for line in block.text.replace("\\\n", " ").splitlines():
        open_quotes += line
        try:
            words = [word for word in shlex.split(open_quotes, comments=True) if word != "&"]
        except ValueError:  # no closing quotation
            open_quotes += "\n"
            continue
        open_quotes = ""
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if words:
            found.append(words)
    assert not open_quotes, f"{block.name}: {open_quotes}"
    return found


def featcache_words(words: list[str]) -> list[str] | None:
    """The words behind `featcache`, also where docker runs it; None where it is not run."""
    begins = words[:1] == ["featcache"] or (words[:1] == ["docker"] and "featcache" in words)
    return words[words.index("featcache") + 1 :] if begins else None


@pytest.mark.parametrize("block", [named(block) for block in SHELL])
async def test_a_command_of_the_shell_does_what_is_said(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks run; what stays, or changes the machine, is parsed by the program that it starts."""
    known = {
        "featcache",
        "docker",
        "pip",
        "openssl",
        "chmod",
        "mkdir",
        "make",
        "python",
        "sglang",
        "vllm",
        "apt-get",
        "mooncake_master",
    }
    async with scene() as names:
        monkeypatch.setenv("FEATCACHE_ENDPOINT", names["endpoint"])
        for words in commands(block):
            assert words[0] in known, words
            if words[0] == "pip":
                check_pip(words)
            arguments = featcache_words(words)
            if arguments is None:
                continue
            assert arguments[0] in COMMANDS, arguments
            if arguments[0] in LOOKS:
                given = [names["endpoint"] if each == ENDPOINT else each for each in arguments]
                code = await asyncio.to_thread(run, given)
                assert code in {0, 1} if arguments[0] == "doctor" else code == 0, arguments
            else:
                check_options(arguments)


def check_options(arguments: list[str]) -> None:
    command = program.get_command(click.Context(program), arguments[0])
    assert command is not None
    context = command.make_context(arguments[0], arguments[1:], resilient_parsing=False)
    if arguments[0] == "serve":
        given = {
            name: value for name, value in context.params.items() if name not in {"config", "more"}
        }
        options_of(given, None)


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert words[1] == "install", words
    for found in re.findall(r"(?:featcache|\.)\[([\w,]+)\]", " ".join(words)):
        assert set(found.split(",")) <= set(extras), words


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [named(block) for block in blocks("toml")])
def test_a_configuration_is_taken(block: Block, tmp_path: Path) -> None:
    config = tmp_path / "pool.toml"
    config.write_text(block.text)
    told = options_of({}, str(config))
    assert told.settings.capacity > 0


@pytest.mark.parametrize("block", [named(block) for block in blocks("ini")])
def test_a_unit_of_systemd_starts_what_there_is(block: Block) -> None:
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign] # names have capitals there
    unit.read_string(block.text)
    words = shlex.split(unit["Service"]["ExecStart"])
    assert Path(words[0]).name == "featcache"
    command = program.get_command(click.Context(program), words[1])
    assert command is not None
    command.make_context(words[1], words[2:])


def test_no_block_is_left_out() -> None:
    """A block in another language gets a test here, or stands in the table of what is no code."""
    run_in = {"python", "console", "sh", "bash", "toml", "ini"}
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in run_in or page.name in DRAWN.get(block.language, ()), (
                block.name
            )
    assert {block.page for block in blocks("console")} == {TUTORIAL}, "replayed by test_tutorial"
    titled = [block for block in blocks("python") if block.title]
    assert {block.page for block in titled} == {TUTORIAL}, "as above"
