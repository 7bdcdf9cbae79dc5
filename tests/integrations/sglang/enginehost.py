"""One SGLang engine on the CPU, in a process of its own: answers a few prompts, and writes the tokens.

    python enginehost.py MODEL_FOLDER TRANSPORT FILE

Its ranks are processes that import this file again, as `multiprocessing` has it.
"""

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

from integrations.sglang.cpu_standins import declare_torchvision_operators
from integrations.sglang.tiny_qwen3_vl import IMAGE

declare_torchvision_operators()

RANKS = 2


def picture(colour: tuple[int, int, int]) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def main() -> None:
    import sglang

    folder, transport, answers_to = sys.argv[1:]
    engine: Any = sglang.Engine(
        model_path=folder,
        mm_feature_transport=transport,
        tp_size=RANKS,
        device="cpu",
        dtype="float32",
        load_format="dummy",
        random_seed=0,
        attention_backend="torch_native",
        mm_attention_backend="sdpa",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_cuda_graph=True,
        disable_radix_cache=True,
        mem_fraction_static=0.1,
        max_total_tokens=2048,
        context_length=512,
        skip_server_warmup=True,
        log_level="info",
    )
    red, blue = picture((200, 10, 30)), picture((10, 30, 200))
    prompts = {
        f"a {IMAGE} is": [red],
        f"a {IMAGE} is not": [blue],
        f"{IMAGE} or {IMAGE}": [blue, red],
    }
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    answers = [
        engine.generate(prompt, sampling, image_data=images)["output_ids"]
        for prompt, images in prompts.items()
    ]
    Path(answers_to).write_text(json.dumps(answers))
    engine.shutdown()


if __name__ == "__main__":
    main()
