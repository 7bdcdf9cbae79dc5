"""The program: its commands, each imported when it is called, and the end of whatever goes wrong."""

import contextlib
import difflib
import importlib
import os
import sys
from typing import Any, Final

import click

from featcache.cli.exits import Exit, Failure, code_of, one_line
from featcache.errors import FeatcacheError
from featcache.version import VERSION

COMMANDS: Final = {
    "serve": ("featcache.cli.serve", "own a pool, as a daemon"),
    "ls": ("featcache.cli.pools", "list the pools of this user on this host"),
    "stat": ("featcache.cli.stat", "show a pool: its figures, its sessions, who owes"),
    "top": ("featcache.cli.top", "watch a pool, live: its slab, its sessions, who owes, who waits"),
    "keys": ("featcache.cli.keys", "list the keys of a pool"),
    "evict": ("featcache.cli.keys", "drop a key"),
    "sweep": ("featcache.cli.pools", "remove sockets and locks of owners that died"),
    "doctor": ("featcache.cli.doctor", "check this machine"),
    "bench": ("featcache.cli.bench", "measure this machine in under a minute"),
}
"""By name: the module, and a line of help. A command is the module's function of its name."""


class _Commands(click.Group):
    """Imports a command's module when it is needed: torch takes its time."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command), "a module's command has its name"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        near = difflib.get_close_matches(name, COMMANDS, 1)
        if near and name not in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{name}'. Did you mean '{near[0]}'?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # here, since click would make a failure of it
            _forget_output()
            raise click.exceptions.Exit(Exit.OK) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in COMMANDS.items()])


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 failed, 2 usage, 3 no owner there, 4 refused by the owner, 5 endpoint or "
    "port in use, 6 device, memory or package not there, 7 owner lost.",
)
@click.version_option(VERSION, prog_name="featcache")
@click.pass_context
def featcache(ctx: click.Context) -> None:
    """Tensors shared between the processes of a model server."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(Exit.USAGE)


def run(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    code: Any = Exit.OK
    try:
        code = featcache.main(arguments, prog_name="featcache", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        code = _said(error.format_message(), Exit.USAGE)
    except click.Abort:
        code = 130
    except Failure as error:
        code = _said(one_line(error), error.code)
    except FeatcacheError as error:
        code = _said(one_line(error), code_of(error))
    except BrokenPipeError:  # of the flush
        _forget_output()
        code = Exit.OK
    except OSError as error:
        code = _said(one_line(error), Exit.FAILED)
    except KeyboardInterrupt:
        code = 130
    return int(code or 0)


def _forget_output() -> None:
    """Write nowhere from here on: whoever read the output has gone, as `| head` does."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _said(text: str, code: Exit) -> Exit:
    sys.stderr.write(f"featcache: {' '.join(text.split())}\n")
    return code
