"""The look at the built site: what it finds in small sites, each with one fault."""

from pathlib import Path

import pytest

from docs import browser
from docs.built import faults


def site(folder: Path, body: str, head: str = "") -> Path:
    (folder / "sub").mkdir()
    (folder / "style.css").touch()
    (folder / "index.html").write_text(f"<head>{head}</head><h1 id='top'>A</h1>{body}")
    (folder / "sub" / "page.html").write_text("<h1 id='there'>B</h1><a href='../index.html#top'>")
    return folder


@pytest.mark.parametrize(
    "body",
    [
        "<a href='sub/page.html'>",
        "<a href='sub/page.html#there'>",
        "<a href='#top'>",
        "<a href='https://elsewhere.org/x#y'>",
        "<img src='style.css'>",
        "<img src='data:image/svg+xml,x'>",
    ],
)
def test_a_good_link_is_none(tmp_path: Path, body: str) -> None:
    head = "<link rel='stylesheet' href='style.css'><link rel='canonical' href='https://a.org/'>"
    assert list(faults(site(tmp_path, body, head))) == []


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("<a href='sub/none.html'>", "sub/none.html, which is not there"),
        ("<a href='sub/page.html#none'>", "no such anchor"),
        ("<a href='#none'>", "no such anchor"),
        ("<a href='sub'>", "which is not there"),
        ("<img src='none.png'>", "which is not there"),
        ("<script src='https://elsewhere.org/x.js'></script>", "from a network"),
        ("<img src='//elsewhere.org/x.png'>", "from a network"),
        ("<link rel='stylesheet' href='https://elsewhere.org/x.css'>", "from a network"),
    ],
)
def test_a_fault_is_told(tmp_path: Path, body: str, why: str) -> None:
    (found,) = faults(site(tmp_path, body))
    assert found.startswith("index.html ")
    assert why in found


def test_a_site_that_was_not_built_is_a_fault(tmp_path: Path) -> None:
    (found,) = faults(tmp_path)
    assert "make docs" in found


def test_without_a_browser_the_look_is_skipped_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert browser.check(site(tmp_path, ""), shots=None) == []
    assert capsys.readouterr().out.startswith("skipped in a browser: needs chromium")
