from __future__ import annotations

import importlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from examples.conftest import Start

DEMO = Path(__file__).parents[2] / "examples" / "demo"


def fact(output: str, name: str) -> str:
    """What the summary says under a name."""
    found = re.search(rf"^{name}  +(.*)$", output, re.MULTILINE)
    assert found, f"no {name!r} in {output}"
    return found[1]


def run(start: Start, *arguments: object) -> tuple[int, str, str]:
    """The exit code of the demo, what it printed, and what it said on the way."""
    with start("demo", *arguments) as example:
        output = example.output()
        return example.ends(), output, example.errors()


def test_demo_shares_every_picture_and_leaves_nothing(start: Start, pictures: list[Path]) -> None:
    arguments = ("--device", "cpu", "--capacity", "5MiB", "--repeat", 5)
    code, output, progress = run(start, "--images", *pictures, *arguments)
    assert code == 0, output + progress
    assert fact(output, "result") == "right"
    assert fact(output, "images") == "3, 15 puts with 4 named readers each"
    assert fact(output, "reads paid") == "60 of 60"
    assert fact(output, "bytes left") == "0"
    assert int(fact(output, "puts waited")) > 0
    assert fact(output, "pressure").startswith("exhausted")
    assert float(fact(output, "max abs error").split()[0]) < 1e-4
    for picture in pictures:
        assert re.search(rf"^{picture.name} .*1x\d+x\d+", output, re.MULTILINE)
    assert "prepared 3/3" in progress
    assert "multiplied 15/15" in progress


def test_demo_names_a_file_that_is_no_picture(start: Start) -> None:
    code, output, message = run(start, "--images", __file__)
    assert code == 2
    assert output == ""
    assert f"cannot read {__file__}" in message
    assert "Traceback" not in message


def test_demo_ends_when_a_rank_is_killed(start: Start, pictures: list[Path]) -> None:
    arguments = ("--images", *pictures, "--capacity", "5MiB", "--repeat", 100_000)
    with start("demo", *arguments) as example:
        while "multiplied" not in example.errors():
            assert example.code() is None
            time.sleep(0.05)
        ranks = example.children()
        assert len(ranks) == 4
        ranks[2].kill()
        assert example.ends() == 1
        said = example.errors()
    assert re.search(r"^demo: tp\d ended with exit code -9$", said, re.MULTILINE)
    assert "Traceback" not in said


Importer = Callable[[str], ModuleType]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Importer]:
    """Import a module of the demo."""
    for path in DEMO.glob("*.py"):  # tests of a room of this name may be loaded
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    before = set(sys.modules)
    monkeypatch.syspath_prepend(DEMO)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(DEMO)):
            del sys.modules[name]


def test_a_wrong_shard_is_seen(demo: Importer) -> None:
    owner, rank, report = demo("owner"), demo("rank"), demo("report")
    expected = torch.randn(6, rank.OUTPUTS)
    row = report.Row(name="", size="", grid=(1, 2, 3), bytes=0)
    sample = owner.Sample({}, expected, row)

    def shards(product: Tensor, grid: tuple[int, int, int] = (1, 2, 3)) -> dict[int, Any]:
        parts = product.chunk(rank.RANKS, dim=1)
        return {
            number: rank.Shard(0, "get", 0.0, grid, part.contiguous().numpy().data.cast("B"))
            for number, part in enumerate(parts)
        }

    owner.check(sample, shards(expected))
    assert (row.wrong, row.error) == (0, 0.0)
    wrong = expected.clone()
    wrong[5, -1] += 0.01
    owner.check(sample, shards(wrong))
    assert row.wrong == 1
    assert row.error == pytest.approx(0.01, abs=1e-5)
    owner.check(sample, shards(expected, grid=(1, 3, 2)))
    assert row.wrong == 2
    assert report.Outcome([row]).faults() == ["wrong product: 2"]


def test_the_outcome_tells_each_fault(demo: Importer) -> None:
    report = demo("report")
    row = report.Row(name="", size="", grid=(1, 2, 2), bytes=1, puts=[0.1], waits=[0.1])
    outcome = report.Outcome([row], recycled=2, reads_owed=8, reads_paid=8)
    assert outcome.faults() == []
    outcome.reads_paid, outcome.recycled, outcome.left = 7, 1, 256
    assert outcome.faults() == [
        "read not paid: 1",
        "put not recycled: 1",
        "byte left in the pool: 256",
    ]
