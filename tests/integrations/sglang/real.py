"""SGLang's own modules, imported once in a process: preloaded where ranks are forked from.

Nothing of SGLang is replaced. What a machine without a GPU lacks is given here: torchvision's CUDA build
can't load its operators, of which two must be declared before it is imported.
"""

import contextlib
import importlib.util
import os
import warnings
from typing import Any

import pytest
import torch

needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="needs SGLang: make test-sglang runs it"
)
_operators: list[Any] = []


def declare_torchvision_operators() -> None:
    """Declare what torchvision's import looks for, where its own library does not load."""
    with contextlib.suppress(
        RuntimeError
    ):  # declared already: it loads, or this is the second call
        library: Any = torch.library.Library  # torch has no types for it
        operators = library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.append(operators)


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
