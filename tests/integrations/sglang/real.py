"""SGLang's own modules, imported once in a process: preloaded where ranks are forked from.

Nothing of SGLang is replaced. What a machine without a GPU lacks is given by `cpu_standins`.
"""

import importlib.util
import os
import warnings

import pytest

from integrations.sglang.cpu_standins import declare_torchvision_operators

needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="needs SGLang: make test-sglang runs it"
)


def import_sglang() -> None:
    """Import the modules that the tests use, with the plugin as SGLang loads it for a user. Idempotent."""
    if importlib.util.find_spec("sglang") is None:
        return
    os.environ["SGLANG_PLUGINS"] = "featcache"
    declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it finds no GPU for
        from sglang.srt.plugins import load_plugins

        load_plugins()


import_sglang()
