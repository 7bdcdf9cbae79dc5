"""Only where ray is installed, which is too large to be one of the dev extra."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("ray", reason="ray is not installed")

if TYPE_CHECKING:
    from examples.conftest import Start

pytestmark = pytest.mark.timeout(240)  # Ray starts its daemons, and each actor imports torch


def test_every_model_sees_what_the_encoder_returned(start: Start) -> None:
    with start("ray_transport.py", "--rounds", 50) as example:
        output = example.output()
        assert example.ends(60) == 0, output + example.errors()
    assert output.splitlines()[-2:] == ["50 rounds, 2 models each, all alike", "50 puts"]
