"""Only where ray is installed, which is too large to be one of the dev extra."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from examples.waiting import until

pytest.importorskip("ray", reason="ray is not installed")

if TYPE_CHECKING:
    from examples.conftest import Start

SCRIPT = "ray_actors.py"
pytestmark = pytest.mark.timeout(240)  # Ray starts its daemons, and each actor imports torch


def test_models_read_what_encoders_put_also_after_one_was_killed(
    start: Start, pictures: list[Path]
) -> None:
    with start(SCRIPT, "--rounds", 300, "--images", *pictures) as example:
        models = [int(pid) for pid in example.line("models ").split()]
        assert len(models) == 2
        example.line("round 0: 3 pictures, alike: True")
        os.kill(models[0], signal.SIGKILL)
        until(lambda: ": once more" in example.errors())
        output = example.output()
        assert example.ends(60) == 0, output + example.errors()
    assert output.splitlines()[-2] == "round 299: 3 pictures, alike: True"
    retries = re.fullmatch(r"(\d+) retries, 0 bytes left", output.splitlines()[-1])
    assert retries is not None
    assert int(retries[1]) >= 1


def test_sigterm_closes_the_slab_and_ends_ray(start: Start, pictures: list[Path]) -> None:
    with start(SCRIPT, "--rounds", 1_000_000, "--images", *pictures) as example:
        example.line("round 0: 3 pictures, alike: True")
        example.signal(signal.SIGTERM)
        example.output()
        assert example.ends(60) == 128 + signal.SIGTERM, example.errors()
