"""One vLLM engine in a process of its own, and the handle by which a test asks it.

``python -m integrations.vllm.enginehost ADDRESS`` connects back to the test, is sent the engine's
arguments, and answers one question after the other.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
MODULE = "featcache.integrations.vllm"
_START_S = 180.0
_ANSWER_S = 120.0


Answer = tuple[int, ...]
"""The tokens that an engine answered one request with."""


class Engine:
    """A handle on an engine's process."""

    def __init__(
        self,
        model: Path,
        ec: dict[str, Any] | None = None,
        *,
        processes: bool = False,
        **engine: Any,
    ) -> None:
        """Start one; with `processes`, its scheduler and each of its ranks is a process, as in a server."""
        self._listener = Listener(family="AF_UNIX")
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integrations.vllm.enginehost", str(self._listener.address)],
            env=os.environ
            | ENVIRONMENT
            | {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # its ranks' processes are in it, and end with it
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._connection = self._accepted()
        self._connection.send((str(model), ec, processes, engine))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())

    def _accepted(self) -> Connection:
        done = threading.Event()

        def watch() -> None:
            self._process.wait()
            if not done.is_set():  # it died before it called: this ends the accept
                Client(self._listener.address).close()

        threading.Thread(target=watch, daemon=True).start()
        connection = self._listener.accept()
        done.set()
        return connection

    def ready(self) -> "Engine":
        """Wait for the engine to have started."""
        self._answer(_START_S)
        return self

    def call(self, what: str, *arguments: Any) -> Any:
        """Have the host do something, and return what it returns."""
        self._connection.send((what, *arguments))
        return self._answer(_ANSWER_S)

    def begin(self, what: str, *arguments: Any) -> None:
        """As `call`, without waiting: `result` returns it."""
        self._connection.send((what, *arguments))

    def result(self) -> Any:
        """Return what was begun."""
        return self._answer(_ANSWER_S)

    def ask(self, *seeds: int, tokens: int = 8) -> list[Answer]:
        """Ask about an image for each seed, all at once."""
        answers: list[Answer] = self.call("ask", list(seeds), tokens)
        return answers

    @property
    def encoded(self) -> int:
        """How many inputs the engine's encoder has run for."""
        count: int = self.call("encoded")
        return count

    def counts(self) -> dict[str, float]:
        """Return the connector's counts since the engine's start."""
        found: dict[str, float] = self.call("counts")
        return found

    def _answer(self, within_s: float) -> Any:
        try:
            if not self._connection.poll(within_s):
                raise AssertionError(f"no answer in {within_s} s:\n{self._tail()}")
            well, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.wait()
            self._reader.join()
            raise AssertionError(f"the engine's process ended:\n{self._tail()}") from None
        assert well, answer
        return answer

    def _tail(self) -> str:
        return "\n".join(self.lines[-60:])

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._listener.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(
            ProcessLookupError
        ):  # what it left behind would keep its output open
            os.killpg(self._process.pid, signal.SIGKILL)
        self._reader.join()


# --- in the engine's process ----------------------------------------------------------------------


class Host:
    """The engine, and what is counted of it."""

    def __init__(
        self, model: str, ec: dict[str, Any] | None, processes: bool, engine: dict[str, Any]
    ) -> None:
        from vllm import LLM
        from vllm.config import ECTransferConfig
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        self._encoded = 0
        self._counts: dict[str, float] = {}
        batch = GPUModelRunner._batch_mm_inputs_from_scheduler

        def counted(runner: Any, output: Any) -> Any:
            found = batch(runner, output)
            self._encoded += len(found[0])
            return found

        GPUModelRunner._batch_mm_inputs_from_scheduler = counted
        common: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 512,
            "enforce_eager": True,
            "seed": 0,
            "enable_prefix_caching": False,
            "limit_mm_per_prompt": {"image": 4},
        }
        count_here(self._counts)
        self.sizes_only = False
        """Whether requests count as bringing only the sizes of their inputs' embeddings."""
        if ec is not None and not processes:
            self._let_inputs_be_sizes_only()
        self._llm = LLM(
            model=model,
            ec_transfer_config=None if ec is None else ECTransferConfig(**ec),
            **(common | engine),
        )
        if not processes:
            self.scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        self._encoded = 0

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _let_inputs_be_sizes_only(self) -> None:
        from featcache.integrations.vllm import connector

        vars(connector)["encodable_here"] = lambda _: lambda _: not self.sizes_only

    def set_sizes_only(self, sizes_only: bool) -> None:
        self.sizes_only = sizes_only

    def ask(self, seeds: list[int], tokens: int) -> list[Answer]:
        return self.ask_of_all([[seed] for seed in seeds], tokens)

    def ask_of_all(self, requests: list[list[int]], tokens: int) -> list[Answer]:
        """Answer requests, each of the images of some seeds, all at once."""
        from vllm import SamplingParams

        prompts = [
            {
                "prompt": f"hello {'<image> ' * len(seeds)}what",
                "multi_modal_data": {"image": [image(seed) for seed in seeds]},
            }
            for seeds in requests
        ]
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        done = self._llm.generate(prompts, sampling, use_tqdm=False)
        return [tuple(one.outputs[0].token_ids) for one in done]

    def encoded(self) -> int:
        return self._encoded

    def counts(self) -> dict[str, float]:
        return dict(self._counts)

    def attached(self) -> bool:
        """Whether both of the engine's connectors are attached to an owner."""
        from vllm.distributed.ec_transfer import get_ec_transfer

        scheduler, worker = self.scheduler.ec_connector._scheduler, get_ec_transfer()._worker
        return scheduler._link.client is not None and worker._link.client is not None

    def leased(self) -> int:
        return sum(self.scheduler.ec_connector._scheduler.leased.values())

    def metrics(self) -> dict[str, float]:
        """Return the connector's counters as vLLM's Prometheus metrics have them."""
        begins = "vllm:ec_featcache_"
        return {
            metric.name.removeprefix(begins): metric.value
            for metric in self._llm.get_metrics()
            if metric.name.startswith(begins)
        }

    def ranks(self) -> list[int]:
        """Return the process ids of the engine's ranks."""
        import psutil

        return [
            child.pid
            for child in psutil.Process().children(recursive=True)
            if child.name().startswith("VLLM::Worker") or "Worker_TP" in " ".join(child.cmdline())
        ]

    def kill_when_planned(self, pid: int) -> None:
        """Kill a process between the scheduler's next plan with loads and the worker's load."""
        from vllm.distributed.ec_transfer import get_ec_transfer

        connector, link = self.scheduler.ec_connector, get_ec_transfer()._worker._link
        build = connector.build_connector_meta

        def killing(output: Any) -> Any:
            step = build(output)
            if step.loads:
                del connector.build_connector_meta
                os.kill(pid, signal.SIGKILL)
                while link.client is not None:
                    time.sleep(0.001)
            return step

        connector.build_connector_meta = killing

    def evict_what_is_planned(self, endpoint: str) -> None:
        """From now on, drop every key between the scheduler's plan and the worker's load."""
        from featcache import blocking

        connector, client = self.scheduler.ec_connector, blocking.connect(endpoint)
        client.open()
        build = connector.build_connector_meta

        def evicting(output: Any) -> Any:
            step = build(output)
            for load in step.loads:
                client.evict(load.key)
            return step

        connector.build_connector_meta = evicting

    def evict_no_more(self) -> None:
        del self.scheduler.ec_connector.build_connector_meta


def count_here(counts: dict[str, float]) -> None:
    """Have all counts of this process's connectors added up, whoever takes them."""
    from featcache.integrations.vllm.counts import Counts

    add = Counts.add

    def adding(self: Counts, name: str, amount: float = 1) -> None:
        add(self, name, amount)
        counts[name] = counts.get(name, 0) + amount

    Counts.add = adding  # type: ignore[method-assign]


def image(seed: int) -> Any:
    """Return a picture that its seed alone decides."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def main(address: str) -> None:
    """Answer until the test hangs up."""
    with Client(address, family="AF_UNIX") as connection:
        host = Host(*connection.recv())
        connection.send((True, None))
        while True:
            try:
                what, *arguments = connection.recv()
            except EOFError:
                break
            try:
                connection.send((True, getattr(host, what)(*arguments)))
            except Exception as error:  # noqa: BLE001 - the test's to see
                connection.send((False, f"{type(error).__name__}: {error}"))
    host.close()


if __name__ == "__main__":
    main(sys.argv[1])
