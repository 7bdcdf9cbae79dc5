"""Under gevent's monkey patching, as the guide says that it works. Needs gevent, or is skipped."""

import importlib.util
import subprocess
import sys

import pytest

PROGRAM = """
from gevent import monkey
monkey.patch_all(thread=False, queue=False, select=False)
import gevent
import torch
from featcache import blocking

with blocking.create(capacity="1MiB", segment="64KiB") as owner:
    with blocking.connect(owner.endpoint) as client:
        run = gevent.get_hub().threadpool.apply
        waiting = gevent.spawn(run, client.get, ("key",), {"timeout": 30})
        gevent.sleep(0)
        owner.put(torch.full((4,), 7.0), key="key")
        waiting.join(timeout=30)
        print(waiting.value.sum().item())
"""


@pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="needs gevent")
def test_several_blocking_objects_and_a_call_that_waits() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, timeout=50, check=True
    )
    assert b"28.0" in done.stdout
