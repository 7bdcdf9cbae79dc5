"""A module imports from its own room and from rooms on lower floors; rooms on one floor never meet.

None is longer than 400 lines. The tables below are the rules. Imports under TYPE_CHECKING do not
count; imports inside functions do, and so do importlib.import_module and __import__ with a literal
name.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = "featcache"
LONGEST_LINES = 400

# The floors, from the top; on each, its rooms. A room is a folder, or the modules at the root that
# are named here.
FLOORS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("featcache.cli", "featcache.cli.*", "featcache.__main__"),),
    (("featcache.integrations", "featcache.integrations.*"),),
    (("featcache",),),
    (("featcache.blocking", "featcache.blocking.*"),),
    (("featcache.api", "featcache.api.*"),),
    (("featcache.owner", "featcache.owner.*"),),
    (
        ("featcache.pool", "featcache.pool.*"),
        ("featcache.client", "featcache.client.*"),
        ("featcache.reach", "featcache.reach.*"),
    ),
    (("featcache.session", "featcache.session.*"),),
    (("featcache.memory", "featcache.memory.*"), ("featcache.control", "featcache.control.*")),
    (("featcache.core", "featcache.core.*"),),
    (
        tuple(
            f"featcache.{name}"
            for name in (
                *(
                    "errors",
                    "events",
                    "events.*",
                    "observation",
                    "ref",
                    "settings",
                    "statistics",
                ),
                *("tier", "version"),
            )
        ),
    ),
)

ROOMS = tuple((floor, names) for floor, rooms in enumerate(FLOORS) for names in rooms)
CORE, MEMORY, ROOT = FLOORS[-2][0], FLOORS[-3][0], FLOORS[-1][0]
CLI, INTEGRATIONS = FLOORS[0][0], FLOORS[1][0]
NAMED = frozenset(name for _, names in ROOMS for name in names if "*" not in name)

Rules = dict[tuple[str, ...], tuple[str, ...]]  # for these modules: these others

# Which modules must not import these from outside the package.
FORBIDDEN: Rules = {
    # synchronous and pure: no torch, no I/O, no clock of its own
    CORE: (
        "torch",
        "cuda",
        "socket",
        "select",
        "selectors",
        "mmap",
        "os",
        "subprocess",
        "multiprocessing",
        "time",
        "datetime",
        "asyncio",
        "anyio",
        "threading",
        "concurrent",
        "structlog",
    ),
    # the library is whole without what only its integrations need
    tuple(name for _, names in ROOMS if names is not INTEGRATIONS for name in names): (
        "prometheus_client",
        "opentelemetry",
        "ray",
        "vllm",
    ),
    # and without what only the command line needs
    tuple(name for _, names in ROOMS if names is not CLI for name in names): (
        "click",
        "rich",
        "textual",
    ),
    # only memory/ calls the driver
    tuple(name for _, names in ROOMS for name in names if names is not MEMORY): ("cuda",),
}

# Which modules must not import these from outside, not even through others of the package.
NEVER_REACHED_OUTSIDE: Rules = {
    ROOT: ("torch", "cuda", "uvloop"),  # a ref can be handled where there is no torch
}


class Module(NamedTuple):
    name: str
    source: str
    is_package: bool = False


class Imports(NamedTuple):
    inside: frozenset[str]  # modules of the package, by full name
    outside: frozenset[str]  # others, by the first part of their name


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def patterns_for(name: str, rules: Rules) -> tuple[str, ...]:
    return tuple(
        pattern for names, patterns in rules.items() if matches(name, names) for pattern in patterns
    )


def room_of(name: str) -> tuple[int, tuple[str, ...]] | None:
    return next((room for room in ROOMS if matches(name, room[1])), None)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes under one, without the bodies of `if TYPE_CHECKING`."""
    yield node
    children: Iterator[ast.AST] | list[ast.stmt] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and is_type_checking(node.test):
        children = node.orelse
    for child in children:
        yield from executed(child)


def called_import(node: ast.Call) -> str | None:
    """The name in import_module("name") or __import__("name")."""
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in {"import_module", "__import__"} and node.args:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return argument.value
    return None


def imported_from(module: Module, node: ast.ImportFrom, known: frozenset[str]) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        parts = module.name.split(".")
        kept = parts[: len(parts) - node.level + module.is_package]
        base = ".".join([*kept, base] if base else kept)
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if full in known | NAMED else base  # a submodule, or a name inside a module


def imports_of(module: Module, known: frozenset[str]) -> Imports:
    names: set[str] = set()
    for node in executed(ast.parse(module.source, module.name)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(imported_from(module, node, known))
        elif isinstance(node, ast.Call) and (name := called_import(node)):
            names.add(name)
    inside = {name for name in names if name == PACKAGE or name.startswith(f"{PACKAGE}.")}
    return Imports(
        inside=frozenset(inside - {module.name}),
        outside=frozenset(name.split(".")[0] for name in names - inside),
    )


def reached(name: str, graph: Mapping[str, Imports]) -> set[str]:
    """A module and all of the package that it imports, directly or not."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in graph and current not in seen:
            seen.add(current)
            waiting.extend(graph[current].inside)
    return seen


def room_violations(name: str, imports: Imports) -> Iterator[str]:
    room = room_of(name)
    if room is None:
        yield f"{name} has no room: give it one, or its room a floor in FLOORS"
        return
    for target in imports.inside:
        other = room_of(target)
        if other is None or other is room:
            continue  # a target with no room is told of by itself
        if other[0] < room[0]:
            yield f"{name} imports {target}, which is above it"
        elif other[0] == room[0]:
            yield f"{name} imports {target}, whose room is on the same floor"


def rule_violations(name: str, graph: Mapping[str, Imports]) -> Iterator[str]:
    outside = {package for module in reached(name, graph) for package in graph[module].outside}
    for rules, verb, targets in (
        (FORBIDDEN, "imports", graph[name].outside),
        (NEVER_REACHED_OUTSIDE, "reaches", outside),
    ):
        forbidden = patterns_for(name, rules)
        yield from (f"{name} {verb} {target}" for target in targets if matches(target, forbidden))


def violations(modules: list[Module]) -> list[str]:
    known = frozenset(module.name for module in modules)
    graph = {module.name: imports_of(module, known) for module in modules}
    found: set[str] = set()
    for name, imports in graph.items():
        found.update(room_violations(name, imports))
        found.update(rule_violations(name, graph))
    try:
        TopologicalSorter({name: imports.inside for name, imports in graph.items()}).prepare()
    except CycleError as error:
        found.add(f"a cycle: {' < '.join(error.args[1])}")
    return sorted(found)


def modules_under(source: Path) -> list[Module]:
    modules = []
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(Module(name, path.read_text(), is_package))
    return modules


def test_imports_point_down() -> None:
    modules = modules_under(SOURCE)
    assert PACKAGE in {module.name for module in modules}
    assert violations(modules) == []


def test_no_module_is_longer_than_its_bound() -> None:
    lengths = {module.name: len(module.source.splitlines()) for module in modules_under(SOURCE)}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_LINES} == {}


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("featcache.core.store", "import featcache.memory.slab", "which is above it"),
        ("featcache.core.store", "from ..memory import slab", "which is above it"),
        ("featcache.core.store", "from time import monotonic", "imports time"),
        ("featcache.core.store", "def f():\n    import os.path", "imports os"),
        ("featcache.core.store", "import importlib\nimportlib.import_module('torch')", "torch"),
        ("featcache.core.store", "try:\n    import anyio\nexcept ImportError: pass", "anyio"),
        ("featcache.memory.slab", "from featcache.control import server", "on the same floor"),
        ("featcache.control.server", "from featcache.memory.slab import Slab", "on the same floor"),
        ("featcache.client.puts", "from featcache.pool.pool import Pool", "on the same floor"),
        ("featcache.session.reader", "from featcache.pool.pool import Pool", "which is above it"),
        ("featcache.api.cache", "from featcache import blocking", "which is above it"),
        ("featcache.api.cache", "from .. import blocking", "which is above it"),
        ("featcache.blocking", "from featcache.integrations import metrics", "which is above it"),
        ("featcache.api.cache", "import prometheus_client", "imports prometheus_client"),
        ("featcache.pool.pool", "from cuda.bindings import driver", "imports cuda"),
        ("featcache.ref", "import torch", "reaches torch"),
        ("featcache.ref", "import featcache.events", "reaches torch"),
        ("featcache.core.slots", "from . import store", "a cycle"),
        ("featcache.errors", "import featcache.ref", "a cycle"),
        ("featcache.extra", "", "has no room"),
    ],
)
def test_a_violation_is_found(module: str, source: str, message: str) -> None:
    sound = [
        Module("featcache", "from featcache import blocking", is_package=True),
        Module("featcache.integrations", "", is_package=True),
        Module("featcache.integrations.metrics", "import featcache\nimport prometheus_client"),
        Module("featcache.blocking", "from featcache.api.cache import create", is_package=True),
        Module("featcache.api", "", is_package=True),
        Module("featcache.api.cache", "from featcache.pool.pool import Pool"),
        Module("featcache.pool", "", is_package=True),
        Module("featcache.pool.pool", "from featcache.pool.recycler import Recycler"),
        Module("featcache.pool.recycler", "if TYPE_CHECKING:\n    from .pool import Pool"),
        Module("featcache.client", "", is_package=True),
        Module("featcache.client.puts", "from featcache.session.reader import Reader"),
        Module("featcache.session", "", is_package=True),
        Module("featcache.session.reader", "from featcache.memory.slab import Slab"),
        Module("featcache.control", "", is_package=True),
        Module("featcache.control.server", "from featcache.core import slots"),
        Module("featcache.memory", "", is_package=True),
        Module("featcache.memory.slab", "import torch"),
        Module("featcache.memory.cuda", "import cuda.bindings.driver", is_package=True),
        Module("featcache.core", "", is_package=True),
        Module("featcache.core.store", "from . import slots\nfrom ..errors import PoolFull"),
        Module("featcache.core.slots", "if typing.TYPE_CHECKING:\n    from .store import Store"),
        Module("featcache.errors", ""),
        Module("featcache.ref", "from featcache.errors import MalformedRef"),
    ]
    assert violations(sound) == []
    broken = [entry for entry in sound if entry.name != module]
    if source == "import featcache.events":
        broken.append(Module("featcache.events", "import torch"))
    found = violations([*broken, Module(module, source)])
    assert any(message in violation for violation in found), found


# Fails the import of what must not be imported, so that the test holds where it is not installed.
IMPORT_ALONE = """
import importlib.abc, sys
import torch  # may look for cuda.bindings for itself: what counts is what featcache adds

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"cuda", "uvloop"}:
            print(name)

sys.meta_path.insert(0, Watch())
before = set(sys.modules)
import featcache
print(*(name for name in set(sys.modules) - before if name.split(".")[0] in {"cuda", "uvloop"}))
"""


def test_importing_featcache_imports_neither_cuda_nor_uvloop() -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
