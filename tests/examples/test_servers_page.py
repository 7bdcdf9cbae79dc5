"""What the page on servers shows of the examples is what they are."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "servers.md").read_text()
SOURCES = [path.read_text() for path in sorted((ROOT / "examples").rglob("*.py"))]
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def definitions(source: str) -> set[str]:
    """Functions, classes and assignments, at any depth, as they are written."""
    lines = source.splitlines(keepends=True)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    texts = ["".join(lines[node.lineno - 1 : node.end_lineno]) for node in found]
    return {textwrap.dedent(text).strip() for text in texts}


KNOWN = set().union(*map(definitions, SOURCES))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_is_taken_from_an_example(snippet: str) -> None:
    shown = [
        node
        for node in ast.parse(snippet).body
        if not isinstance(node, ast.Import | ast.ImportFrom)
    ]
    lines = snippet.splitlines(keepends=True)
    texts = {"".join(lines[node.lineno - 1 : node.end_lineno]).strip() for node in shown}
    assert texts
    assert texts <= KNOWN


def test_every_example_of_a_server_stands_there() -> None:
    rows = re.findall(r"^\| .*? \| (`examples/.*?) \|", PAGE, re.MULTILINE)
    assert len(rows) == 7
    for row in rows:
        paths = re.findall(r"`(examples/[\w./]+)`", row)
        assert paths
        assert all((ROOT / path).exists() for path in paths)


def test_what_is_said_of_containers_stands_in_their_file() -> None:
    compose = (ROOT / "examples" / "containers" / "compose.yaml").read_text()
    for said in ('user: "10001:10001"', "no-new-privileges", "stop_grace_period", "65536"):
        assert said in PAGE
        assert said in compose
