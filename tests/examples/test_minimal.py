import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_fresh_interpreter_runs_the_minimal_example(runtime_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "minimal.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the reader says 499,999,500,000" in done.stdout
    assert "the bytes are free again" in done.stdout
    assert list((runtime_dir / "featcache").glob("*")) == []
