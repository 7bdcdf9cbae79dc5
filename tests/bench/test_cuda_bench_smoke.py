"""The CUDA benchmark runs, on host memory: one tiny fleet. Nothing is timed here."""

from __future__ import annotations

import json
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import cuda_steps, keyed_ray, keyed_speed, plot
from bench.cuda_fleet import run_plan, short
from bench.cuda_ports import Plan
from bench.cuda_report import goals, report, summary
from bench.cuda_wire import SAMPLE_EVERY, Sampler, make_sources, source_of
from bench.peers.unpack_sglang import POOLS, unpack
from bench.stopwatch import find

SIZE = 4096


def tiny(system: str, **changes: object) -> Plan:
    arguments = {"pool": 1 << 20, "device": "cpu", "readers": 1, "sizes": (SIZE,)} | changes
    return Plan(system=system, seconds=0.02, rounds=1, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("system", ["featcache-get", "featcache-borrow", "featcache-async"])
def test_a_tiny_fleet_counts_every_feature_and_finds_the_right_bytes(system: str) -> None:
    outcome = run_plan(tiny(system), time.monotonic() + 60)[SIZE]
    assert "error" not in outcome
    assert "wrong" not in outcome
    cell = summary(outcome)
    assert cell["features"] > 0
    assert cell["sampled"] > 0
    assert {"put_us_p50", "get_us_p50", "trip_us_p90", "put_alone_us_p50"} <= cell.keys()


def test_a_fleet_that_fails_says_why_and_the_other_sizes_are_run() -> None:
    outcomes = run_plan(tiny("featcache-get", sizes=(1 << 22, SIZE)), time.monotonic() + 60)
    assert "FeatureTooLarge" in outcomes[1 << 22]["error"]
    assert "pipes" in outcomes[SIZE]


def test_what_cannot_run_here_is_skipped_and_what_has_no_time_is_an_error() -> None:
    ends_at_s = time.monotonic() - 1
    assert run_plan(tiny("torchmp"), ends_at_s) == {SIZE: {"skipped": "needs a GPU"}}
    assert "error" in run_plan(tiny("featcache-get"), ends_at_s)[SIZE]


def test_samples_show_bytes_that_are_another_features() -> None:
    sources = make_sources(SIZE, torch.device("cpu"))
    sampler = Sampler(sources)
    for at in range(3):
        sampler.take(sources[source_of(at * SAMPLE_EVERY)])
    assert sampler.wrong() == 0
    stale = sources[(source_of(3 * SAMPLE_EVERY) + 1) % len(sources)]
    sampler.take(stale)
    assert sampler.wrong() == 1


def test_an_error_has_no_path_in_it() -> None:
    assert short(OSError("no such file: '/some/where/else.sock'")) == (
        "OSError: no such file: 'else.sock'"
    )


def test_only_the_pool_is_taken_out_of_a_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "sglang-0.0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*POOLS["one file"], "sglang/other.py"):
            archive.writestr(name, "pass\n")
    folder = unpack(wheel, tmp_path)
    assert folder == tmp_path / "sglang-0.0.1"
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.py")]
    assert files == list(POOLS["one file"])


def made_up() -> dict[str, object]:
    def cell(system: str, size: int, rate: float, us: float) -> dict[str, object]:
        figures = {
            f"{name}_us_{part}": us
            for name in ("put", "get", "put_alone", "get_alone", "trip")
            for part in ("p50", "p90")
        }
        return {"system": system, "readers": 1, "size": size, "features_per_s": rate, **figures}

    result: dict[str, object] = {
        "machine": {"gpus": [], "cpu": "a", "cores_usable": 2},
        "versions": {"python": "3.11"},
        "date": "today",
        "command": "cuda_speed.py",
        "rounds": 2,
        "seconds": 1.0,
        "cells": [
            cell("featcache-get", 1 << 20, 900.0, 10.0),
            cell("featcache-get", 16 << 20, 500.0, 30.0),
            cell("featcache-borrow", 1 << 20, 900.0, 10.0),
            cell("sglang-0.5.23", 1 << 20, 100.0, 50.0) | {"wrong": "pipe: 1 of 2"},
            {"system": "torchmp", "readers": 1, "size": 1 << 20, "error": "it hung"},
        ],
    }
    return result | {"goals": goals(result)}


def test_the_report_has_every_figure_every_goal_and_what_went_wrong() -> None:
    text = report(made_up())
    assert "| featcache-get | 900 | 10.0 / 10.0 |" in text
    assert "| sglang-0.5.23 | 100 ! | 50.0 / 50.0 |" in text
    assert "- torchmp: error: it hung (1 x 1 MiB)" in text
    assert "features/s ≥ | 9.00 / 5.00 pass | - / 10.0 ? |" in text
    assert "put µs, pipelined ≤ | 10.0 / 20.0 pass | 30.0 / 20.0 FAIL |" in text


def test_the_plot_is_skipped_where_matplotlib_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = tmp_path / "result.json"
    result.write_text(json.dumps(made_up()))
    assert plot.main([str(result), "--svg", str(tmp_path / "plot.svg")]) == 0
    assert "| featcache-get | 900 | 500 |" in capsys.readouterr().out
    assert not (tmp_path / "plot.svg").exists()


def test_on_a_gpu_the_benchmark_of_keys_tells_when_a_call_returns_from_when_its_bytes_are_there() -> (
    None
):
    def cell(us: float, returned_us: float) -> dict[str, list[float]]:
        figures = {"us": us, "returned_us": returned_us, "hits_per_s": 1e6 / us}
        return {name: [value, value] for name, value in figures.items()}

    owner = {"owner_cpu_us": [9.0, 9.0], "owner_cpu_alone_us": [31.0, 31.0]}
    cells = {
        str(1 << 20): {
            "echo": cell(30.0, 30.0),
            "copy": cell(20.0, 5.0),
            "featcache-get": cell(66.0, 40.0) | owner,
            "featcache-borrow": cell(96.0, 45.0),
        }
    }
    puts = {str(1 << 20): {"owner_us": [20.0], "client_us": [70.0], "echo_us": [30.0]}}
    goals = keyed_speed.goals(cells, puts)
    result = {
        "clients": 4,
        "cells": keyed_speed.summary(cells),
        "puts": {size: {name: us[0] for name, us in put.items()} for size, put in puts.items()},
        "goals": goals,
        "not_run": {"Redis": "its memory is the host's"},
    }
    text = keyed_speed.report(result)
    assert "| featcache-get | 66.0 |" in text.split("The same, until the call returns")[0]
    assert "| featcache-get | 40.0 |" in text.split("The same, until the call returns")[1]
    assert "one get at a time, over 1.6 echoes and the copy | 1 MiB | 0.97 | 1 | reached |" in text
    assert "one borrow at a time, over 1.6 echoes | 1 MiB | 2.00 | 1 | MISSED |" in text
    assert "lookup, pipelined, µs | 1 MiB | 9.00 | 30 | reached |" in text
    assert "- Redis: not run: its memory is the host's" in text


def test_ray_is_not_beside_a_slab_on_a_gpu() -> None:
    assert keyed_ray.missing("cuda:0") == "its object store is host memory"


def test_each_step_that_is_timed_is_there() -> None:
    paths = [*cuda_steps.PUT_STEPS, *cuda_steps.GET_STEPS, *cuda_steps.MAPPING_STEPS]
    assert [path for path in paths if find(path) is None] == []
