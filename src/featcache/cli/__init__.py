"""The command line: ``featcache``, or ``python -m featcache``. It needs the extra ``cli``."""

import importlib
import sys

from featcache.cli.exits import Exit

__all__ = ["main"]


def main() -> None:
    """Run a command, and end the process with its exit code (`featcache.cli.exits.Exit`)."""
    try:
        program = importlib.import_module("featcache.cli.program")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"click", "rich"}:
            raise
        sys.stderr.write(f"featcache: {error.name} is missing: pip install 'featcache[cli]'\n")
        sys.exit(Exit.UNAVAILABLE)
    sys.exit(program.run())
