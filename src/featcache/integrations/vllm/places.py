"""Where a connector stands among its engine's processes: rank, device, and what its ranks agree on."""

import os
import re
from collections.abc import Callable
from typing import Any

import attrs
import torch
from vllm.distributed import parallel_state


@attrs.frozen
class Place:
    """One process of an engine."""

    name: str
    """Of its session, as `featcache stat` shows it."""
    ranks: int
    """Processes that load each output: the tensor-parallel ranks of the first pipeline stage."""
    saves: bool
    """Whether this one saves: all ranks have the same outputs."""
    device: torch.device
    rank: int = 0
    """Its number among all of the engine; those that load are the first `ranks`."""


def place_of(vllm_config: Any, *, scheduler: bool) -> Place:
    """Return where this process stands."""
    parallel = getattr(vllm_config, "parallel_config", None)
    ranks = _count(parallel, "tensor_parallel_size") * _count(
        parallel, "prefill_context_parallel_size"
    )
    engine = re.sub(r"[^A-Za-z0-9_.-]", "-", str(vllm_config.ec_transfer_config.engine_id))[:24]
    replica = getattr(parallel, "data_parallel_rank", 0)
    begins = f"vllm-{engine}" + (f"-dp{replica}" if isinstance(replica, int) and replica else "")
    if scheduler:
        return Place(f"{begins}-scheduler-{os.getpid()}", ranks, False, torch.device("cpu"))
    rank, saves = _own_rank()
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        device = torch.device("cuda", torch.cuda.current_device())
    return Place(f"{begins}-rank{rank}-{os.getpid()}", ranks, saves, device, rank)


def _count(parallel: Any, name: str) -> int:
    value = getattr(parallel, name, 1)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1


def _own_rank() -> tuple[int, bool]:
    """Return this worker's rank in the world, and whether it is the first of those that load alike."""
    if not parallel_state.model_parallel_is_initialized():
        return 0, True
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    context = getattr(parallel_state, "_PCP", None)
    if context is not None:
        first = first and context.rank_in_group == 0
    return int(parallel_state.get_world_group().rank), first


def agree_on_loads(well: list[bool]) -> list[bool]:
    """Return which loads went well on all tensor-parallel ranks: one small reduction on the CPU."""
    if not parallel_state.model_parallel_is_initialized():
        return well
    flags = torch.tensor(well, dtype=torch.int32)
    for group in (parallel_state.get_tp_group(), getattr(parallel_state, "_PCP", None)):
        if group is not None and group.world_size > 1:
            torch.distributed.all_reduce(
                flags, torch.distributed.ReduceOp.MIN, group=group.cpu_group
            )
    return [bool(flag) for flag in flags.tolist()]


def passes_by(vllm_config: Any) -> bool:
    """Whether an engine's encoder outputs are not to be shared.

    Of encoder-decoder models, whose encoder vLLM does not run through a connector; and with LoRA in the
    encoder, where identifiers have an adapter's name, by which another engine may mean another adapter.
    """
    lora = getattr(vllm_config, "lora_config", None)
    return (
        getattr(vllm_config.model_config, "is_encoder_decoder", False) is True
        or getattr(lora, "enable_tower_connector_lora", False) is True
    )


def encodable_here(vllm_config: Any) -> Callable[[Any], bool] | None:
    """Return what tells whether a feature of a request brings more than the sizes of its output.

    None of an engine where all do.

    vLLM lets requests to a consumer leave the embeddings out, and bring what sizes their place in the
    prompt: such an input is in the pool, or can't be answered.
    """
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    if getattr(multimodal, "allow_missing_mm_embeddings", False) is not True:
        return None
    sizes = _sizes_by_modality(vllm_config.model_config)

    def encodable(feature: Any) -> bool:
        known = sizes.get(getattr(feature, "modality", ""))
        data = getattr(feature, "data", None)
        return not known or not data or not set(data) <= known

    return encodable if any(sizes.values()) else None


def _sizes_by_modality(model_config: Any) -> dict[str, set[str]]:
    try:
        from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: PLC0415 - of consumers alone

        parser = MULTIMODAL_REGISTRY.create_processor(model_config).info.data_parser
        return {
            modality: set(parser.placeholder_metadata_fields(modality))
            for modality in parser.embedding_fields
        }
    except Exception:  # noqa: BLE001 - a model's own code: without its word all is taken to be encodable
        return {}
