from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.conftest import Start


def test_minimal_says_what_happened(start: Start) -> None:
    with start("minimal.py") as example:
        output = example.output()
        assert example.ends() == 0
    assert "the reader says 499,999,500,000" in output
    assert "the bytes are free again" in output
