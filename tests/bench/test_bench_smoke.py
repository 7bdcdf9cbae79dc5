"""The benchmark runs: one tiny cell of the floor and one of featcache. Nothing is timed here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import run_cells
from bench.host import summary
from bench.peers import Cell
from bench.report import FIGURES, report
from bench.wire import WrongContent, confirm, expected, make_sources


def test_a_tiny_cell_counts_every_feature_and_finds_the_right_bytes() -> None:
    systems = ("byhand-views", "featcache-borrow")
    cells = [
        Cell(system=system, size=4096, readers=1, window=4, seconds=0.02) for system in systems
    ]
    for outcome in run_cells(cells, patience=30):
        assert "error" not in outcome, outcome["error"]
        # Counts, checksums and sums were compared in the owner: a wrong one would be an error.
        assert outcome["features"] > 0
        assert outcome["trips"] > 0
        assert summary([outcome]).keys() >= FIGURES.keys()


def test_a_reader_that_saw_other_bytes_fails_the_cell() -> None:
    sources = make_sources(64)
    right = expected(sources, 9, checked=True)
    confirm([right.pack()] * 2, right, "verify")
    seen = expected(sources[1:], 9, checked=True)
    with pytest.raises(WrongContent, match="verify: reader 1"):
        confirm([right.pack(), seen.pack()], right, "verify")


def test_a_system_that_cannot_run_is_skipped_with_a_reason() -> None:
    cell = Cell(system="vllm", size=4096, readers=1, window=4, seconds=0.02)
    assert run_cells([cell]) == [{"skipped": "no --vllm-file"}]


def test_the_report_has_every_system_and_a_ratio_of_each_pair() -> None:
    def cell(system: str, rates: list[float | None]) -> dict[str, object]:
        figures = {
            f"{name}_rounds": [1.0, 2.0] for name in ("cpu_us", "trip_us", "put_us", "read_us")
        }
        return {
            "system": system,
            "size": 1 << 20,
            "readers": 4,
            "features_per_s_rounds": rates,
            **figures,
        }

    text = report(
        {
            "machine": {"cpu": "a", "cores": 2, "memory": "b", "kernel": "c"},
            "versions": {"python": "3.11"},
            "date": "today",
            "command": "host.py",
            "rounds": 2,
            "seconds": 1.0,
            "cells": [
                cell("featcache-get", [900.0, None, 1200.0]),
                cell("byhand-copies", [1000.0, 1000.0, 1000.0]),
                {"system": "vllm", "size": 1 << 20, "readers": 4, "skipped": "no --vllm-file"},
            ],
        }
    )
    assert "| readers x size | 4 x 1 MiB |" in text
    assert "| featcache-get | 1,050 |" in text
    assert "| byhand-copies | 1.05 |" in text
    assert "- vllm: skipped: no --vllm-file" in text
