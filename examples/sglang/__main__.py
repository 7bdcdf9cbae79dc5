"""SGLang's offline engine with featcache as its transport: one picture, one question.

SGLANG_PLUGINS=featcache python examples/sglang --model-path Qwen/Qwen3-VL-2B-Instruct --image cat.jpg

It needs a GPU: without one SGLang ends with "No accelerator (CUDA, ...) is available", before the plugin
has anything to do. What of it was tried, and where, is told in docs/sglang.md.
"""

import argparse
import os
from typing import Any

QUESTION = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--image", required=True, help="a path or a URL")
    parser.add_argument("--tp", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("SGLANG_PLUGINS", "featcache")  # before SGLang is imported
    import sglang  # noqa: PLC0415 - as above

    engine: Any = sglang.Engine(
        model_path=options.model_path,
        tp_size=options.tp,
        mm_feature_transport="cuda_ipc",
        log_level="info",  # says that features go through featcache's slab
    )
    try:
        answer = engine.generate(
            QUESTION, {"max_new_tokens": 48, "temperature": 0}, image_data=options.image
        )
        print(answer["text"])
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
