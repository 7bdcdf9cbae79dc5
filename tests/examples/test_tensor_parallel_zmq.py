from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from examples.waiting import until

if TYPE_CHECKING:
    from examples.conftest import Start

SCRIPT = "tensor_parallel_zmq.py"


def test_ranks_add_up_to_the_product_of_one_process(start: Start, pictures: list[Path]) -> None:
    with start(SCRIPT, "--ranks", 2, "--rounds", 2, "--images", *pictures) as example:
        output = example.output()
        assert example.ends() == 0, output + example.errors()
    assert re.search(r"^round 1: 3 pictures, largest error \d\.\de-0[5-9]$", output, re.MULTILINE)
    assert output.endswith("ranks restarted 0 times, 0 bytes left\n")


def test_it_goes_on_when_a_rank_is_killed(start: Start, pictures: list[Path]) -> None:
    # A slab for two pictures: puts wait for the ranks, and so for the dead one's reads to be paid.
    options = ("--rounds", 1_000_000, "--capacity", "1.3MiB", "--images", *pictures)
    with start(SCRIPT, *options) as example:
        example.line("round 0: 3 pictures")
        ranks = example.children()
        assert len(ranks) == 2
        ranks[0].kill()
        until(lambda: re.search(r"tp\d ended with exit code -9: starting", example.errors()))
        until(lambda: len(example.children()) == 2)
        done = int(example.line("round ").split(":")[0])
        while int(example.line("round ").split(":")[0]) < done + 20:  # what was in the pipe is read
            pass
        example.signal(signal.SIGTERM)
        assert example.ends() == 128 + signal.SIGTERM, example.errors()
        assert "Traceback" not in example.errors()


def test_no_rank_outlives_a_killed_scheduler(start: Start, pictures: list[Path]) -> None:
    with start(SCRIPT, "--rounds", 1_000_000, "--images", *pictures) as example:
        example.line("round 0: 3 pictures")
        assert len(example.children()) == 2
        example.signal(signal.SIGKILL)
        example.assert_no_children()
