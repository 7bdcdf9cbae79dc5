"""The menu of the site, and the pages that stand for the code: errors, alerts, sizes, public names."""

import inspect
import re
from pathlib import Path

import pytest

import featcache
from docs.pages import DOCS, ROOT
from featcache import errors, events
from featcache.memory.words import owner_block_bytes, session_page_bytes

MENU = (ROOT / "mkdocs.yml").read_text()
TROUBLES = (DOCS / "how-to" / "troubleshooting.md").read_text()
ALERTS = (ROOT / "examples" / "monitoring" / "alerts.yml").read_text()
SIZING = (DOCS / "how-to" / "sizing.md").read_text()
ERRORS = [
    name
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, Exception)
]
REFERENCE = "".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.name))
def test_a_page_stands_in_the_menu_once(path: Path) -> None:
    page = re.escape(str(path).removeprefix(f"{DOCS}/"))
    assert len(re.findall(rf"^ +- (?:[^:#\n]+: )?{page}$", MENU, re.MULTILINE)) == 1


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_has_its_section_with_what_to_do(name: str) -> None:
    sections = re.split(r"^#{2,3} ", TROUBLES, flags=re.MULTILINE)
    (section,) = [each for each in sections if each.startswith(f"{name}\n")]
    assert len(section.split()) > 30, "what it is, its causes, and what to do"


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_in_the_reference(name: str) -> None:
    assert re.search(rf"^::: featcache\.errors\.{name}$", REFERENCE, re.MULTILINE)


@pytest.mark.parametrize(
    "name", [name for name, kind in vars(events).items() if inspect.isclass(kind) and name != "Any"]
)
def test_an_event_is_in_the_reference(name: str) -> None:
    kind = getattr(events, name)
    if issubclass(kind, events.Event):
        assert re.search(rf"^::: featcache\.events\.{name}$", REFERENCE, re.MULTILINE)


@pytest.mark.parametrize("name", [*featcache.__all__, *(f"blocking.{n}" for n in ("Pressure",))])
def test_a_public_name_is_in_the_reference(name: str) -> None:
    if name in ERRORS:
        name = f"errors.{name}"
    assert re.search(rf"^::: featcache\.{re.escape(name)}$", REFERENCE, re.MULTILINE)


@pytest.mark.parametrize("name", re.findall(r"^ +- alert: (\w+)$", ALERTS, re.MULTILINE))
def test_an_alert_has_what_to_do(name: str) -> None:
    pressure = (DOCS / "how-to" / "pressure.md").read_text()
    (row,) = re.findall(rf"^\| `{name}` \| (.+) \| (.+) \|$", pressure, re.MULTILINE)
    assert all(row)


def test_the_sizes_of_tables_are_the_codes() -> None:
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", SIZING, re.MULTILINE)
    found = [[int(cell.replace(",", "")) for cell in row] for row in rows]
    assert len(found) == 3
    for slots, table, page in found:
        assert (table, page) == (owner_block_bytes(slots), session_page_bytes(slots))


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.name))
def test_a_link_stays_in_the_site_or_is_an_address(path: Path) -> None:
    """The rest of the repository is linked to by its address: the site has no such file."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        found = (path.parent / link).resolve()
        assert "://" in link or (found.is_file() and found.is_relative_to(DOCS)), link
