"""The benchmark runs: one tiny cell of the floor and one of featcache. Nothing is timed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import (
    hit_rate,
    hit_rate_policies,
    keyed_hits,
    keyed_redis,
    keyed_scale,
    keyed_speed,
    paths,
    resultfile,
)
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


def test_the_benchmark_of_keys_compares_every_byte_and_says_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    small = ["--sizes", "4KiB", "--keys", "3", "--clients", "2", "--flight", "3", "--rounds", "2"]
    few = ["--count", "4", "--pipe-rounds", "1", "--seconds", "0.02"]
    without = ["--redis", "none", "--no-ray"]
    assert keyed_speed.main([*small, *few, *without, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["not_run"]) == {"Redis", "Ray"}
    cell = result["cells"]["4096"]
    assert all(cell[name]["us"] > 0 and cell[name]["hits_per_s"] > 0 for name in cell)
    assert cell["featcache-get"]["owner_cpu_us"] > 0
    assert result["puts"]["4096"]["client_us"] > 0
    # A goal beside Redis needs Redis.
    assert not any("redis" in one["goal"] for one in result["goals"])
    assert any("over 1.6 echoes and the copy" in one["goal"] for one in result["goals"])
    assert "- Ray: not run: left out" in capsys.readouterr().out


def test_the_benchmark_of_hits_times_every_call_by_key_and_by_ref(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    small = ["--sizes", "4KiB", "--keys", "3", "--clients", "2", "--flight", "3", "--rounds", "2"]
    few = ["--pipe-rounds", "1", "--seconds", "0.02", "--hits", "50", "--loops", "asyncio"]
    assert keyed_hits.main([*small, *few, "--redis", "none", "--no-ray", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["loops"]["asyncio"]
    alone, piped = found["alone"]["4096"], found["pipelined"]["4096"]
    assert {"get(key)", "get(ref)", "borrow(key)", "a miss", "echo", "copy"} < set(alone)
    assert all(cell["us"] >= cell["best_us"] > 0 for cell in alone.values())
    assert set(piped) == {"get(key)", "borrow(key)", "copy"}
    # A goal beside Redis needs Redis.
    assert not any("Redis" in one["goal"] for one in found["goals"])
    assert "get(key) over get(ref)" in capsys.readouterr().out


def test_redis_that_is_not_there_is_said_not_failed_for(tmp_path: Path) -> None:
    with (
        pytest.raises(keyed_redis.NoRedis, match="no redis-server"),
        keyed_redis.serve("no-such-program", tmp_path),
    ):
        pass
    assert keyed_redis.request(b"GET", b"key") == b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n"


def test_the_table_of_growth_has_every_figure_and_every_goal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    few = ["--features", "64,80", "--sessions", "1,2", "--among", "64", "--rounds", "1"]
    assert keyed_scale.main([*few, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert all(set(figures) == set(keyed_scale.FIGURES) for figures in result["features"].values())
    assert len(result["goals"]) == 7
    assert "| recycle, nothing paid |" in capsys.readouterr().out


def test_the_trace_finds_the_right_bytes_and_the_ideal_is_a_plain_lru(tmp_path: Path) -> None:
    lru = hit_rate.IdealLru(10)
    assert [lru.ask(*one) for one in [(1, 4), (2, 4), (1, 4), (3, 4), (2, 4), (3, 4)]] == [
        *(False, False, True, False, False, True)
    ]
    out = tmp_path / "result.json"
    small = ["--images", "200", "--requests", "600", "--warm", "200", "--shrink", "16"]
    assert hit_rate.main([*small, "--pool", "4MiB", "--segment", "1MiB", "--out", str(out)]) == 0
    grow, evict = json.loads(out.read_text())["runs"]
    assert grow["committed_bytes"] == 4 << 20
    assert evict["committed_bytes"] == 2 << 20
    assert all(one["hit_rate"] > 0 and one["evicted"] > 0 for one in (grow, evict))


def test_the_policies_are_measured_between_nothing_and_the_optimum(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    small = ["--objects", "100", "--requests", "800", "--out", str(out)]
    assert hit_rate_policies.main(small) == 0
    result = json.loads(out.read_text())
    assert set(result["traces"]) == set(hit_rate_policies.TRACES)
    for trace in result["traces"].values():
        for found in trace.values():
            assert 0 < found["lru"] <= found["optimum"] + 0.05
            assert 0 < found["sieve"] <= found["optimum"] + 0.05


def test_the_optimum_knows_the_future_and_the_store_is_an_lru_of_one_size() -> None:
    trace = hit_rate_policies.Trace([0, 1, 2, 0, 1, 2, 0, 1, 2], [256] * 3)
    assert list(hit_rate_policies.by_future(trace, 512)) == [0, 0, 0, 1, 1, 0, 1, 1, 0]
    assert sum(hit_rate_policies.by_lru(trace, 512)) == 0
    trace = hit_rate_policies.plain(50, 500, 0.9)
    trace = hit_rate_policies.Trace(trace.asked, [256] * 50)
    ideal = hit_rate_policies.by_lru(trace, 2560)
    assert sum(ideal) > 0
    # Hits between two puts are in no order, so a few may differ.
    assert abs(sum(hit_rate_policies.by_store(trace, 2560, "lru", {})) - sum(ideal)) < 25


def test_the_calls_of_each_path_are_those_of_that_path_alone() -> None:
    found = paths.measure(runs=1)
    assert len(found) == 17
    hit = found.pop("client.get(key), a hit: owner")
    assert not any(hit[name] for name in ("calls", "crossings", "rooms"))  # it needs no owner
    assert all(row["calls"] >= row["crossings"] >= row["rooms"] > 0 for row in found.values())
    # One call costs more frames than another only for more work; an idle tick is in none of them.
    assert found["client.get_nowait(ref)"]["calls"] < found["client.get(ref)"]["calls"]
    assert found["client.release(ref)"]["calls"] < found["recycle of that ref"]["calls"]
    assert found["cache.put(x)"]["resumes"] == 0
    assert "| cache.put(x) |" in paths.report({"here": found, "beside": found})


@pytest.mark.parametrize("path", sorted(resultfile.FOLDER.iterdir()), ids=lambda path: path.name)
def test_a_result_file_has_a_line_for_each_cell(path: Path) -> None:
    text = path.read_text()
    assert path.suffix == ".json"
    assert text == resultfile.dumps(json.loads(text)), "tests/bench/resultfile.py puts it in form"


def test_what_is_written_as_a_result_is_what_is_read() -> None:
    result = {
        "date": "today",
        "rounds": 2,
        "empty": [],
        "cells": [{"size": 1, "us_rounds": [1.0, None]}, {"size": 2, "steps": [{"step": "put"}]}],
        "sizes": {"1": {"get": {"us": [[1.5], []]}}},
    }
    text = resultfile.dumps(result)
    assert json.loads(text) == result
    assert text.splitlines()[1:5] == [
        ' "date": "today", "rounds": 2,',
        ' "empty": [],',
        ' "cells": [',
        '  {"size": 1, "us_rounds": [1.0, null]},',
    ]
