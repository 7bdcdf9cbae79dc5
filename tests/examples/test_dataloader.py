from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from examples.conftest import Start
    from support.programs import Program

SCRIPT = "dataloader.py"
SMALL = ("--batch", 8, "--length", 48)


def workers_of(example: Program, kind: str) -> list[psutil.Process]:
    # Those that the script forked itself, or those that are forked for it as it spawns them.
    return psutil.Process(example.pid).children() if kind == "fork" else example.children()


@pytest.mark.parametrize("kind", ["fork", "spawn"])
def test_the_trainer_reads_every_batch_that_workers_put(
    start: Start, pictures: list[Path], kind: str
) -> None:
    arguments = ("--start", kind, "--epochs", 2, "--images", *pictures)
    with start(SCRIPT, *SMALL, *arguments) as example:
        output = example.output()
        assert example.ends() == 0, output + example.errors()
        said = example.errors()
    assert "epoch 1: loss " in output
    assert output.endswith("12 batches put, 12 recycled, 0 bytes left\n")
    assert "lost" not in said  # every worker said goodbye


@pytest.mark.parametrize("kind", ["spawn"])
def test_a_killed_worker_ends_the_epoch_with_one_line(
    start: Start, pictures: list[Path], kind: str
) -> None:
    arguments = ("--start", kind, "--epochs", 100_000, "--images", *pictures)
    with start(SCRIPT, *SMALL, *arguments) as example:
        example.line("epoch 0: ")
        workers = workers_of(example, kind)
        assert len(workers) == 2
        workers[0].kill()
        assert example.ends() == 1, example.errors()
        assert "DataLoader worker (pid" in example.errors()
        assert "Traceback" not in example.errors()
        assert not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize("kind", ["fork"])
def test_sigterm_in_an_epoch_leaves_nothing(start: Start, pictures: list[Path], kind: str) -> None:
    arguments = ("--start", kind, "--epochs", 100_000, "--images", *pictures)
    with start(SCRIPT, *SMALL, *arguments) as example:
        example.line("epoch 0: ")
        workers = workers_of(example, kind)
        example.signal(signal.SIGTERM)
        assert example.ends() == 128 + signal.SIGTERM, example.errors()
        assert "Traceback" not in example.errors()
        assert not any(worker.is_running() for worker in workers)
