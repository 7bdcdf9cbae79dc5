"""Two vLLM engines share one pool: each picture is encoded by the first that is asked about it.

    python examples/vllm llava-hf/llava-1.5-7b-hf cat.jpg dog.jpg

Needs vLLM 0.32 or newer in the environment. The pool is in host memory unless ``--device`` says
otherwise; the engines are processes, as two `vllm serve` would be. Any pictures will do; with none,
coloured squares are made.
"""

import argparse
import multiprocessing
from pathlib import Path

from engine import answer
from featcache import blocking

QUESTION = "USER: <image>\nWhat is this? ASSISTANT:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", help="a model with an image encoder")
    parser.add_argument("pictures", nargs="*", type=Path)
    parser.add_argument("--device", default="cpu", help="where the pool is")
    parser.add_argument("--prompt", default=QUESTION)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--gpu-memory", type=float, default=0.45)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    answers: dict[str, list[str]] = {}
    with blocking.create(device=options.device, capacity="256MiB") as pool:
        for name in ("first", "second"):
            results = context.Queue()
            process = context.Process(target=answer, args=(name, pool.endpoint, options, results))
            before = pool.statistics()
            process.start()
            answers[name] = results.get()
            process.join()
            now = pool.statistics()
            print(f"{name} engine: {now.puts - before.puts} outputs saved, {now.keys} in the pool")
    for number, (first, second) in enumerate(zip(*answers.values(), strict=True)):
        same = "the same" if first == second else "NOT the same"
        print(f"picture {number}: {first!r} ({same} of both engines)")


if __name__ == "__main__":
    main()
