"""Lets torchvision's CUDA build be imported where there is no CUDA: its operators do not load there.

Imported by a ``.pth`` file of the environment, so in subprocesses too; it does nothing until
torchvision is imported.
"""

import importlib.abc
import sys
from typing import Any

_kept: list[Any] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Defines the two operators whose absence fails the import, as torchvision is looked for."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        try:
            library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # a build whose operators are there
            return
        _kept.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
