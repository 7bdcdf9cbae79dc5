"""The site that ``make docs`` built: every link leads somewhere, and nothing comes from a network.

``python -m docs.built site``, with `tests` in PYTHONPATH, checks the files; with ``--check`` it opens the
site in Chromium as well (`browser.py`), or says why it can't. The files need the standard library alone.
"""

import argparse
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

_LOADED: Final = {"img": "src", "script": "src", "iframe": "src", "source": "src", "object": "data"}
_LINKED: Final = {"stylesheet", "icon", "preload", "modulepreload", "manifest"}
"""What a ``link`` element has the browser load; one that is, for example, canonical only names."""


class Page(NamedTuple):
    """What stands in one file of HTML."""

    links: list[str]
    loads: list[str]
    anchors: set[str]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page([], [], set())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        for name in ("id", "name"):
            if given.get(name):
                self.page.anchors.add(given[name])
        if tag == "a" and "href" in given:
            self.page.links.append(given["href"])
        if tag in _LOADED and _LOADED[tag] in given:
            self.page.loads.append(given[_LOADED[tag]])
        if tag == "link" and _LINKED & set(given.get("rel", "").split()):
            self.page.loads.append(given["href"])


def read(path: Path) -> Page:
    """Return what stands in a page."""
    reader = _Reader()
    reader.feed(path.read_text())
    return reader.page


def faults(site: Path) -> Iterator[str]:
    """Yield each link that leads nowhere, and each thing that another host would be asked for."""
    pages = {path: read(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no pages: build it with make docs"
    for path, page in pages.items():
        where = path.relative_to(site)
        for load in page.loads:
            parts = urlsplit(load)
            if parts.scheme not in {"", "data"} or parts.netloc:
                yield f"{where} loads {load} from a network"
            elif not parts.scheme and not _target(site, path, parts.path).exists():
                yield f"{where} loads {load}, which is not there"
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue  # another site's, or mailto
            target = _target(site, path, parts.path)
            if not target.is_file():
                yield f"{where} links to {link}, which is not there"
            elif parts.fragment and target in pages and not _has(pages[target], parts.fragment):
                yield f"{where} links to {link}, which has no such anchor"


def _has(page: Page, fragment: str) -> bool:
    return unquote(fragment) in page.anchors or fragment.startswith("__")  # the theme's own


def _target(site: Path, page: Path, link: str) -> Path:
    if not link:
        return page
    found = (site / link.lstrip("/")) if link.startswith("/") else page.parent / unquote(link)
    found = found.resolve()
    return found / "index.html" if found.is_dir() else found


def main() -> int:
    """Check the site; return how the program ends."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--check", action="store_true", help="open it in Chromium too")
    parser.add_argument("--shots", type=Path, help="a folder for pictures of each page")
    options = parser.parse_args()
    site = options.site.resolve()
    found = list(faults(site))
    print(*found, sep="\n", end="\n" if found else "")
    count = len(list(site.rglob("*.html")))
    print(f"{count} pages, {len(found)} dead links or things from a network")
    if options.check and not found:
        from docs import browser

        found = browser.check(site, options.shots)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
