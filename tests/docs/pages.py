"""The pages of the documentation, and their fenced blocks."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
DOCS: Final = ROOT / "docs"
PAGES: Final = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

_FENCE: Final = re.compile(r"^```(\w*)([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE: Final = re.compile(r'title="([^"]+)"')


class Block(NamedTuple):
    """One fenced block."""

    page: Path
    number: int
    """Its place among the blocks of its page, counted from 0."""
    language: str
    title: str | None
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}-{self.number}"


def blocks_of(page: Path) -> Iterator[Block]:
    for number, (language, info, text) in enumerate(_FENCE.findall(page.read_text())):
        title = _TITLE.search(info)
        yield Block(page, number, language, title[1] if title else None, text)


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in these languages."""
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]
