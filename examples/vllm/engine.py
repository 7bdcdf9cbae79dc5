"""One engine of the example, in a process of its own."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def answer(name: str, endpoint: str, options: argparse.Namespace, results: Any) -> None:
    """Ask one engine about every picture; report its words and what its connector counted."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - in the engine's process alone
    from vllm.config import ECTransferConfig  # noqa: PLC0415

    llm = LLM(
        model=options.model,
        load_format=options.load_format,
        max_model_len=options.max_model_len,
        enforce_eager=True,
        gpu_memory_utilization=options.gpu_memory,
        disable_log_stats=False,
        ec_transfer_config=ECTransferConfig(
            ec_connector="FeatcacheECConnector",
            ec_connector_module_path="featcache.integrations.vllm",
            ec_role="ec_both",
            engine_id=name,
            ec_connector_extra_config={"endpoint": endpoint},
        ),
    )
    prompts = [
        {"prompt": options.prompt, "multi_modal_data": {"image": picture}}
        for picture in pictures(options.pictures)
    ]
    answers = llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0))
    results.put([answer.outputs[0].text for answer in answers])


def pictures(paths: Sequence[Path]) -> list[Any]:
    """Return the pictures, or three squares."""
    from PIL import Image  # noqa: PLC0415 - comes with vLLM

    if paths:
        return [Image.open(path).convert("RGB") for path in paths]
    return [Image.new("RGB", (336, 336), colour) for colour in ("red", "green", "blue")]
