from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.conftest import Start


def test_each_picture_is_encoded_once(start: Start) -> None:
    with start("shared_cache.py") as example:
        output = example.output()
        assert example.ends() == 0
    assert "4 workers asked 60 times for 5 pictures" in output
    assert "encoded 5 times; 5 features are kept" in output
