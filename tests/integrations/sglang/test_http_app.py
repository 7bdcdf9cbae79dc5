"""The application of several tokenizer workers, imported as SGLang's worker processes import it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integrations.sglang.real import needs_sglang

pytestmark = needs_sglang

WORKER = """
import asyncio, json, os, sys, types
from integrations.sglang.cpu_standins import declare_torchvision_operators
declare_torchvision_operators()
import uvicorn

config = uvicorn.Config(os.environ["SGLANG_HTTP_SERVER_APP_PATH"], lifespan="off", log_config=None)
config.load()  # as each of uvicorn's workers does
from sglang.srt.entrypoints import http_server
from sglang.srt.multimodal.processors import base_processor

manager = types.SimpleNamespace(is_ready=lambda: True)
http_server.set_global_state(types.SimpleNamespace(tokenizer_manager=manager))
told = []

async def send(message):
    told.append(message)

async def receive():
    return {"type": "http.request", "body": b""}

asyncio.run(config.loaded_app({
    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": "/ready",
    "raw_path": b"/ready", "query_string": b"", "headers": [], "scheme": "http",
    "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "root_path": "",
}, receive, send))
sys.stdout.write("\\n" + json.dumps({
    "status": told[0]["status"],
    "pool": base_processor.MmItemMemoryPool.__module__,
    "routes": len(http_server.app.routes),
    "is_sglangs": sys.modules["featcache.integrations.sglang.http_app"].app is http_server.app,
}))
"""


@pytest.mark.timeout(240)  # the import of SGLang's server takes 20 s of a processor
def test_a_worker_process_serves_sglangs_application_with_the_plugin() -> None:
    """The path is the one that the plugin left in the launcher's environment, which workers inherit."""
    assert os.environ["SGLANG_HTTP_SERVER_APP_PATH"].startswith("featcache.")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])

    worker = subprocess.run(
        [sys.executable, "-c", WORKER],
        env=os.environ | {"PYTHONPATH": path, "SGLANG_PLUGINS": "featcache"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert worker.returncode == 0, worker.stderr
    told = json.loads(worker.stdout.splitlines()[-1])
    assert told["status"] == 200
    assert told["pool"] == "featcache.integrations.sglang.ipc"
    assert told["is_sglangs"]
    assert told["routes"] > 50
