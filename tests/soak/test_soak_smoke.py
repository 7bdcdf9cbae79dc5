"""The soak runs end to end: a few seconds of it, in an interpreter of its own, as it is started by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_short_storm(tmp_path: Path) -> None:
    result = tmp_path / "soak.json"
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0.05", "--seed", "1"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--limits", "0", "--out", str(result)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(result.read_text())
    assert figures["storm"]["kills"] > 0
    assert figures["operations"]["all"] > 0
    assert not any([*figures["wrong"].values(), *figures["lost"].values()])
    assert "nothing wrong, nothing lost" in done.stdout
