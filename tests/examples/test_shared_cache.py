from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from examples.conftest import Start


def test_each_picture_is_encoded_once(start: Start) -> None:
    with start("shared_cache.py") as example:
        output = example.output()
        assert example.ends() == 0
    assert "4 workers asked 60 times for 5 pictures" in output
    assert "encoded 5 times; 5 features are kept" in output


@pytest.mark.parametrize("script", ["minimal.py", "shared_cache.py"])
def test_sigterm_leaves_no_socket(script: str, start: Start) -> None:
    with start(script) as example:
        listens = example.runtime / "featcache"
        while not list(listens.glob("*.sock")):
            assert example.code() is None, example.errors()
        example.signal(signal.SIGTERM)
        assert example.ends() in {0, 128 + signal.SIGTERM}
