"""The documentation against the code: what it names exists, and what exists is named in it."""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

import featcache
from featcache import errors, events
from featcache.settings import Settings
from featcache.statistics import Statistics

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "featcache"
REPOSITORY = re.compile(r"https://github\.com/featcache/featcache/(?:blob|tree)/main/")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
REFERENCE = ROOT / "docs" / "settings-and-events.md"
MAX_README_WORDS = 1300

FENCE = re.compile(r"^```(\w*)[^\n`]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)|^\[[^\]\n]+\]: (\S+)$", re.MULTILINE)
USED_LABEL = re.compile(r"\]\[([^\]\n]+)\]")
DEFINED_LABEL = re.compile(r"^\[([^\]\n]+)\]:", re.MULTILINE)

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", path.read_text())


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of every table."""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def names_in(cell: str) -> list[str]:
    return CODE.findall(cell)


def section_of(heading: str) -> str:
    """A second-level section of the reference page."""
    return REFERENCE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def row_of(heading: str, name: str) -> list[str]:
    """The one row of a section whose first cell is this name alone."""
    found = [cells for cells in rows(section_of(heading)) if cells[0] == f"`{name}`"]
    assert len(found) == 1, f"{name} has {len(found)} rows under {heading}"
    return found[0]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


# --- the reference page -----------------------------------------------------------------------


def classes_of(module: Any, root: type) -> list[Any]:
    found = inspect.getmembers(module, inspect.isclass)
    return [each for _, each in found if issubclass(each, root)]


def event_classes() -> list[type[events.Event]]:
    return [kind for kind in classes_of(events, events.Event) if kind is not events.Event]


def error_classes() -> list[type[Exception]]:
    return classes_of(errors, Exception)


@pytest.mark.parametrize("field", attrs.fields(Settings), ids=lambda field: str(field.name))
def test_a_setting_stands_with_its_variable_and_default(
    monkeypatch: pytest.MonkeyPatch, field: "attrs.Attribute[Any]"
) -> None:
    for each in attrs.fields(Settings):
        monkeypatch.delenv(f"FEATCACHE_{each.name.upper()}", raising=False)
    _, variable, default, unit, bounds = row_of("Settings", field.name)
    assert names_in(variable) == [f"FEATCACHE_{field.name.upper()}"]
    assert unit
    assert bounds
    without = getattr(Settings(), field.name)
    # Through the environment, as a user would say it.
    monkeypatch.setenv(f"FEATCACHE_{field.name.upper()}", names_in(default)[0])
    assert getattr(Settings(), field.name) == without


@pytest.mark.parametrize("kind", event_classes(), ids=lambda kind: kind.__name__)
def test_an_event_stands_with_its_level_and_fields(kind: type[events.Event]) -> None:
    _, name, level, fields, when = row_of("Events", kind.__name__)
    assert names_in(name) == [kind.name]
    assert level == kind.severity
    assert names_in(fields) == [each.name for each in attrs.fields(kind) if each.name != "pool"]
    assert when


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_an_error_stands_with_its_parents(kind: type[Exception]) -> None:
    _, parents, when, remedy = row_of("Errors", kind.__name__)
    assert names_in(parents) == [parent.__name__ for parent in kind.__bases__]
    assert when
    assert remedy


def test_every_figure_of_the_statistics_stands_there() -> None:
    first = [name for cells in rows(section_of("Statistics")) for name in names_in(cells[0])]
    assert sorted(first) == sorted(field.name for field in attrs.fields(Statistics))


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("Settings", {field.name for field in attrs.fields(Settings)}),
        ("Events", {kind.__name__ for kind in event_classes()}),
        ("Errors", {kind.__name__ for kind in error_classes()}),
    ],
)
def test_a_row_of_something_that_is_gone_goes_too(heading: str, known: set[str]) -> None:
    first = {name for cells in rows(section_of(heading)) for name in names_in(cells[0])}
    assert first == known


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", featcache.__all__)
def test_a_public_name_stands_in_the_documentation(name: str) -> None:
    text = "\n".join(path.read_text() for path in PAGES)
    assert re.search(rf"\b{name}\b", text)


@pytest.mark.parametrize("kind", ["FeatureCache", "FeatureClient"])
def test_the_readme_has_every_public_call(kind: str) -> None:
    life = {"open", "aclose", "is_open"}
    own = [
        cls
        for cls in getattr(featcache, kind).__mro__
        if cls.__module__.startswith("featcache.api.")
    ]
    documented = "get get_nowait borrow release discard get_or_put contains evict pin unpin put"
    for name in (*documented.split(), "statistics"):
        assert any(name in vars(cls) for cls in own), f"{kind}.{name} is not there"
        assert re.search(rf"`(?:await )?{name}\(", (ROOT / "README.md").read_text()), name
    assert life <= {name for cls in own for name in vars(cls)}


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    end = next(end for end in range(len(parts), 0, -1) if is_module(parts[:end]))
    found: Any = importlib.import_module(".".join(parts[:end]))
    for part in parts[end:]:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def is_module(parts: list[str]) -> bool:
    path = ROOT / "src" / Path(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@page
def test_a_dotted_name_is_there(path: Path) -> None:
    told = {kind.name for kind in event_classes()}
    text = path.read_text()
    for dotted in set(re.findall(r"\bfeatcache(?:\.[A-Za-z_]\w*)+", text)) - told:
        assert resolves(dotted), f"{path.name} names {dotted}"


# Not the changelog, which tells of files of its day.
@pytest.mark.parametrize(
    "path", [path for path in PAGES if path.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_a_path_is_there(path: Path) -> None:
    """A file or folder in code, from the root or, of a room, from the package."""
    titles = re.findall(r'^```\w+ title="([^"]+)"', path.read_text(), re.MULTILINE)
    for name in names_in(prose(path)):
        if name in titles:
            continue  # a file that the reader makes
        looks = "/" in name or name.endswith((".py", ".md", ".toml"))
        if looks and re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", name):
            places = (ROOT / name, PACKAGE / name)
            assert any(place.exists() for place in places), f"{path.name} names {name}"


def class_names(folder: Path) -> Iterator[str]:
    for source in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ClassDef):
                yield node.name


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_a_class_that_is_named_is_there(name: str) -> None:
    known = set(class_names(PACKAGE))
    camel = {
        word for word in names_in(prose(ROOT / name)) if re.fullmatch(r"[A-Z]\w*[a-z]\w*", word)
    }
    assert camel <= known
    drawn = "".join(block for _, block in FENCE.findall((ROOT / name).read_text()))
    assert set(re.findall(r"\b[A-Z][a-z]+[A-Z]\w*", drawn)) <= known


# --- the tables of CONTRIBUTING, and signatures ---------------------------------------------------


def heading_of(heading: str) -> str:
    """A third-level section of CONTRIBUTING."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split(f"\n### {heading}\n")[1]
    return re.split(r"^##", text, flags=re.MULTILINE)[0]


def definitions(body: list[ast.stmt]) -> Iterator[str]:
    """The names that statements define, and the members of their classes as `Class.member`."""
    for node in body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            yield from map(ast.unparse, targets)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{member}" for member in definitions(node.body))


def defined_in(source: str) -> set[str]:
    return set(definitions(ast.parse((PACKAGE / source).read_text()).body))


CHANGES = [cells for cells in rows(heading_of("Where do I change …?")) if cells[0] != "to change"]
PLACED = re.compile(r"`([A-Za-z_][\w.]*)`,? in `([\w/]+\.py)`")


@pytest.mark.parametrize("cells", CHANGES, ids=lambda cells: cells[0].replace(" ", "-"))
def test_what_is_to_be_changed_is_defined_in_the_files_of_its_row(cells: list[str]) -> None:
    named = names_in(cells[1])
    sources = [name.removeprefix("src/featcache/") for name in named if name.endswith(".py")]
    known = {name for source in sources for name in defined_in(source)}
    members = {name.rpartition(".")[2] for name in known}
    words = [name for name in named if re.fullmatch(r"[A-Za-z_][\w.]*", name) and "." not in name]
    dotted = [name for name in named if re.fullmatch(r"[A-Z]\w*\.\w+", name)]
    assert words or dotted, "a row names what is changed, not files alone"
    assert set(words) <= known | members
    assert set(dotted) <= known


@pytest.mark.parametrize(
    ("name", "source"), sorted(set(PLACED.findall(prose(ROOT / "CONTRIBUTING.md"))))
)
def test_a_name_with_its_file_is_defined_there(name: str, source: str) -> None:
    assert name in defined_in(source)


def test_every_state_machine_stands_there() -> None:
    """An enum whose docstring has transitions, as a table or as a picture."""
    machines = {
        (node.name, source.relative_to(PACKAGE).as_posix())
        for source in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("Enum") for base in node.bases)
        and re.search(r"──→|\| from", ast.get_docstring(node) or "")
    }
    first = [cells[0] for cells in rows(heading_of("State machines")) if cells[0] != "enum"]
    assert {PLACED.findall(cell)[0] for cell in first} == machines


def keywords(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return sorted(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)


def test_the_calls_of_the_readme_have_their_keywords() -> None:
    calls = [cells for cells in rows((ROOT / "README.md").read_text()) if len(cells) == 4]
    for call, owner, client, _ in calls[1:]:
        for name, given in re.findall(r"`(?:await )?(\w+)\(([^)`]*)\)`", call):
            told = sorted(given.partition("*, ")[2].replace(",", "").split())
            for kind, has in (("FeatureCache", owner), ("FeatureClient", client)):
                if has == "yes":
                    assert told == keywords(getattr(getattr(featcache, kind), name)), (kind, name)


@pytest.mark.parametrize("name", ["create", "connect"])
def test_the_guide_has_the_whole_signature(name: str) -> None:
    text = (ROOT / "docs" / "guide.md").read_text()
    told = re.search(rf"^`{name}\(([^`]*)\)`", text, re.MULTILINE)
    assert told
    given = [part.strip().partition("=") for part in told[1].split(",")]
    defaults = {key: ast.literal_eval(value) for key, equal, value in given if equal}
    actual = inspect.signature(getattr(featcache, name)).parameters
    assert defaults == {key: each.default for key, each in actual.items()}


# --- links --------------------------------------------------------------------------------------


def links(path: Path) -> Iterator[str]:
    for inline, defined in LINK.findall(prose(path)):
        yield inline or defined


@page
def test_a_link_leads_somewhere(path: Path) -> None:
    for link in links(path):
        target, _, anchor = REPOSITORY.sub("", link).partition("#")
        here = bool(REPOSITORY.match(link))
        if "://" in target:
            continue  # another site's
        found = (ROOT if here else path.parent) / target if target else path
        assert found.exists(), f"{path.name} links to {link}"
        if anchor:
            assert anchor in anchors(found), f"{path.name} links to {link}"


def is_linked(path: Path, label: str) -> bool:
    """Whether the site itself knows where a name is: in the pages that are made from docstrings."""
    return path.parent.name == "reference" and label.startswith("featcache.")


@page
def test_a_label_is_defined_and_used(path: Path) -> None:
    text = prose(path)
    used = {label for label in USED_LABEL.findall(text) if not is_linked(path, label)}
    assert used == set(DEFINED_LABEL.findall(text))


def test_the_readmes_links_work_on_pypi() -> None:
    """It is shown there without the files around it."""
    assert all("://" in link or link.startswith("#") for link in links(ROOT / "README.md"))


# --- size (the blocks of code run in tests/docs) ----------------------------------------------------


def test_the_readme_stays_short() -> None:
    words = [word for word in (ROOT / "README.md").read_text().split() if re.search(r"\w", word)]
    assert len(words) <= MAX_README_WORDS


def test_the_readmes_figures_stand_in_the_results() -> None:
    """The comparison is a view of two result files: 1 MiB, 4 readers."""
    table = (ROOT / "README.md").read_text().split("| --- | ---: | ---: |\n")[1].split("\n\n")[0]
    shown = {int(figure.replace(",", "")) for figure in re.findall(r"(?<= )\d[\d,]+(?= )", table)}
    assert shown == {
        *measured("cuda-speed", "featcache-get", "featcache-borrow", "sglang-0.5.23", "torchmp"),
        *measured("host", "featcache-get", "featcache-borrow", "vllm", "torchmp-fs"),
    }


def measured(result: str, *systems: str) -> Iterator[int]:
    path = ROOT / "tests" / "bench" / "results" / f"{result}.json"
    cells = json.loads(path.read_text())["cells"]
    for system in systems:
        (cell,) = [
            cell
            for cell in cells
            if (cell["system"], cell["size"], cell["readers"]) == (system, 1 << 20, 4)
        ]
        yield round(cell["features_per_s"])
