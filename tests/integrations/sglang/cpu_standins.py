"""What SGLang 0.5.23 lacks on a machine without a GPU: a plugin of its own, for the tests' engines.

torchvision's CUDA build can't load its operators, of which two must be declared before it is imported. The
rest is the plugin's, three things: the check that keeps ``--mm-feature-transport`` to NVIDIA's platforms,
the number of the current GPU, and one kernel. The rotation of queries and keys comes from vLLM there; it is
written out here.
"""

import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "featcache-cpu-standins"
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


def install(folder: Path) -> None:
    """Make a folder that, on the path of modules, has this as a plugin of SGLang's."""
    info = folder / f"{NAME.replace('-', '_')}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{NAME} = {__name__}:register\n")


def register() -> None:
    """Put the three in their places."""
    kernels: Any = ModuleType("vllm._custom_ops")
    kernels.rotary_embedding = rotate
    sys.modules.setdefault("vllm", ModuleType("vllm"))
    sys.modules[kernels.__name__] = kernels
    torch.cuda.current_device = lambda: 0

    from sglang.srt.arg_groups import serving_hook

    serving_hook.handle_multimodal_feature_transport = lambda arguments: None


def rotate(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin: torch.Tensor,
    is_neox: bool,
) -> None:
    """Rotate queries and keys in place, by the angles of their positions."""
    cos, sin = cos_sin[positions.flatten()].float()[:, None].chunk(2, dim=-1)
    for each in (query, key):
        if each is None:
            continue
        heads = each.view(each.shape[0], -1, head_size)[..., : 2 * cos.shape[-1]]
        part = heads.float()
        first, second = part.chunk(2, dim=-1) if is_neox else (part[..., ::2], part[..., 1::2])
        turned = first * cos - second * sin, second * cos + first * sin
        joined = torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2)
        heads.copy_(joined.to(each.dtype))
