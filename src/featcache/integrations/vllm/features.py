"""An encoder output as a feature: one tensor, or levels of it as named tensors."""

from typing import Any, Final

import torch

_LEVEL: Final = "level"


def packed(output: Any) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return an encoder output as `put` takes it: a tensor, or a list or tuple of them as named levels."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    if isinstance(output, dict):
        return {name: tensor.detach() for name, tensor in output.items()}
    return {f"{_LEVEL}{at}": tensor.detach() for at, tensor in enumerate(output)}


def unpacked(feature: torch.Tensor | dict[str, torch.Tensor]) -> Any:
    """Return a feature as vLLM's encoder cache has it: the reverse of `packed`, lists for tuples."""
    if isinstance(feature, dict) and all(
        name == f"{_LEVEL}{at}" for at, name in enumerate(feature)
    ):
        return list(feature.values())
    return feature


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Return the tensors of an encoder output."""
    packed_output = packed(output)
    return (
        [packed_output] if isinstance(packed_output, torch.Tensor) else list(packed_output.values())
    )


def bytes_of(output: Any) -> int:
    """Return the bytes of an encoder output."""
    return sum(tensor.nbytes for tensor in tensors_of(output))


def fits(output: Any, rows: int | None) -> bool:
    """Whether an output has as many embeddings as a request expects, as far as both can be told."""
    if rows is None or not isinstance(output, torch.Tensor) or output.dim() != 2:  # noqa: PLR2004 - rows, width
        return True
    return output.shape[0] == rows
