"""The dashboard and the alert rules, against what the collector tells; by promtool where there is one."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featcache.integrations.metrics.peers import PEERS
from featcache.integrations.metrics.table import COUNTERS, GAUGES, HISTOGRAMS

MONITORING = Path(__file__).resolve().parents[2] / "examples" / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
RULES = (MONITORING / "alerts.yml").read_text()
CASES = Path(__file__).with_name("alerts.test.yml")
NAME = re.compile(r"\bfeatcache_\w+")
UNITS = {"bytes", "Bps", "s", "percentunit", "short", "ops"}
TOLD = {row.name for row in GAUGES} | {f"{row.name}_total" for row in COUNTERS}
TOLD |= {f"{row.name}{end}" for row in HISTOGRAMS for end in ("_bucket", "_sum", "_count")}
TOLD |= {row.name if row.kind == "gauge" else f"{row.name}_total" for row in PEERS}
promtool = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(promtool is None, reason="needs promtool (of prometheus)")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])


def alert_expressions() -> list[str]:
    return re.findall(r"^ +expr: (.+)$", RULES, re.MULTILINE)


def test_every_metric_of_the_dashboard_is_told() -> None:
    expressions = list(dashboard_expressions())
    named = {name for expression in expressions for name in NAME.findall(expression)}
    assert named <= TOLD
    variables = json.dumps(DASHBOARD["templating"])
    assert set(NAME.findall(variables)) <= TOLD
    # Nothing that is told is missing there.
    shown = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in named}
    assert {row.name for row in (*GAUGES, *COUNTERS, *HISTOGRAMS, *PEERS)} == shown


def test_every_metric_of_the_alerts_is_told_and_each_alert_says_what_to_do() -> None:
    expressions = alert_expressions()
    alerts = re.findall(r"^ +- alert: (\w+)$", RULES, re.MULTILINE)
    assert len(alerts) == len(expressions) == len(set(alerts))
    assert {name for each in expressions for name in NAME.findall(each)} <= TOLD
    for field in ("severity: ", "summary: ", "description: "):
        assert RULES.count(field) == len(alerts)
    for metric in ("waiters", "oldest_unpaid_age", "readers_lost", "hosts_lost", "hits"):
        assert any(f"featcache_{metric}" in each for each in expressions)


def test_the_dashboard_can_be_imported() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert DASHBOARD["schemaVersion"] >= 36
    assert (DASHBOARD["title"], DASHBOARD["uid"]) == ("featcache", "featcache")
    assert "id" not in DASHBOARD  # the importer gives it one
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == (
        "datasource",
        "prometheus",
    )
    assert variables["pool"]["datasource"]["uid"] == "${datasource}"
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters)) > 0
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert '{pool=~"$pool"}' in target["expr"]


def test_panels_neither_overlap_nor_leave_the_page() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def run(*arguments: str) -> None:
    assert promtool is not None
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    run("check", "rules", str(MONITORING / "alerts.yml"))


@needs_promtool
def test_promtool_takes_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{n}", "expr": re.sub(r"\$__\w+", "5m", expression)}
        for n, expression in enumerate(dashboard_expressions())
    ]
    rules_file = tmp_path / "dashboard.yml"  # JSON is YAML
    rules_file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    run("check", "rules", str(rules_file))


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    cases = tmp_path / "cases.yml"
    cases.write_text(CASES.read_text().replace("RULES", str(MONITORING / "alerts.yml")))
    run("test", "rules", str(cases))


def test_the_page_has_a_row_for_every_metric() -> None:
    page = (MONITORING.parents[1] / "docs" / "metrics.md").read_text()
    table = page.split("| metric | kind | of | meaning |\n")[1].split("\n\n")[0]
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in table.splitlines()
    ]
    told = {name: (kind, of) for name, kind, of, _ in rows[1:]}
    both = {True: "owner, client", False: "owner"}
    wanted = {row.name: ("gauge", both[row.field != "sessions"]) for row in GAUGES}
    wanted |= {f"{row.name}_total": ("counter", both[row.by_clients]) for row in COUNTERS}
    wanted |= {row.name: ("histogram", both[row.by_clients]) for row in HISTOGRAMS}
    wanted |= {
        row.name if row.kind == "gauge" else f"{row.name}_total": (row.kind, "owner, by host")
        for row in PEERS
    }
    assert told == wanted
