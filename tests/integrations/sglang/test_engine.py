"""A whole SGLang on the CPU, two tensor-parallel ranks: its tokens with the plugin and without it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integrations.sglang import cpu_standins, tiny_qwen3_vl
from integrations.sglang.real import needs_sglang

pytestmark = [
    needs_sglang,
    pytest.mark.skipif(
        importlib.util.find_spec("xgrammar") is None, reason="SGLang's engine imports xgrammar"
    ),
]
_TESTS = Path(__file__).resolve().parents[2]
_PATIENCE_S = 280.0
"""An engine takes some 30 s on two processors, most of it imports."""


def answers_of(folder: Path, transport: str, *plugins: str) -> tuple[list[list[int]], str]:
    """Run an engine of its own; return its tokens, and its log."""
    answers, log = folder / f"{transport}.json", folder / f"{transport}.log"
    path = [folder / "plugins", _TESTS, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "SGLANG_PLUGINS": ",".join((*plugins, cpu_standins.NAME)),
        "SGLANG_CPU_OMP_THREADS_BIND": "0|0",  # a rank binds itself to these processors
        "HF_HUB_OFFLINE": "1",
    }
    host = [sys.executable, str(_TESTS / "integrations/sglang/enginehost.py")]
    with log.open("w") as to:
        # A session of its own: SGLang kills its whole process group when a part of it fails.
        subprocess.run(
            [*host, str(folder / "model"), transport, str(answers)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=to,
            stderr=to,
            timeout=_PATIENCE_S,
            check=False,
            start_new_session=True,
        )
    told = log.read_text()
    assert answers.exists(), told[-4000:]
    return json.loads(answers.read_text()), told


@pytest.mark.timeout(2 * _PATIENCE_S)
def test_the_tokens_are_those_of_an_engine_without_the_plugin(tmp_path: Path) -> None:
    cpu_standins.install(tmp_path / "plugins")
    tiny_qwen3_vl.write(tmp_path / "model")

    own, _ = answers_of(tmp_path, "cpu")
    through_featcache, log = answers_of(tmp_path, "cuda_vmm", "featcache")

    assert through_featcache == own
    assert len({tuple(tokens) for tokens in own}) > 1  # the pictures and words count
    assert "2 reader(s) each" in log
    assert "unpaid_refs=0" in log  # each rank read each feature: the pool closed with none owed
