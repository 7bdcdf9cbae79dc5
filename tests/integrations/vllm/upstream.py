"""Runs vLLM's own tests of encoder-cache connectors against `FeatcacheECConnector`.

    .venv-vllm/bin/pip download --no-deps --no-binary vllm --no-build-isolation --no-clean vllm==0.32.0
    PYTHONPATH=tests .venv-vllm/bin/python -m integrations.vllm.upstream CHECKOUT [pytest's arguments]

CHECKOUT is a vLLM source tree of the installed version. vLLM's tests are written for `ECExampleConnector`:
its scheduler's tests take it by name from the config, its own by class. Here both give a facade of ours, over
an owner of this process, with the few things those tests look at beside the interface: what is to be loaded,
as ``mm_datas``, and saves that have ended when `save_caches` returns. Nothing of vLLM's is copied.
"""

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from featcache import blocking
from integrations.vllm import tiny_llava

CONNECTOR: Final = "ECExampleConnector"
TESTS: Final = (
    "tests/v1/ec_connector/unit/test_ec_example_connector.py",
    "tests/v1/ec_connector/unit/test_ec_connector_metrics.py",
    "tests/v1/ec_connector/unit/test_ec_output_aggregator.py",
    "tests/v1/ec_connector/unit/test_ec_transfer_params.py",
    "tests/v1/ec_connector/unit/test_worker_ec_connector.py",
    "tests/v1/core/test_scheduler.py",
)
NOT_OF_OTHERS: Final = {
    "test_initialization_producer": "looks at its folder",
    "test_initialization_consumer": "looks at its folder",
    "test_save_caches_producer_3_items": "reads its files",
    "test_generate_foldername": "of its file names",
    "test_generate_filename": "of its file names",
    "test_generate_filename_consistency": "of its file names",
    "test_start_load_caches_pins_device_to_current_rank": "of how it reads a file",
    "test_start_load_caches_non_cuda_platform_uses_device_type": "of how it reads a file",
    "test_load_nonexistent_cache": "that it raises for what is gone; ours has the step encode it",
    "test_connector_hooks_default_to_none": "that it has no statistics; ours has",
}
"""vLLM's tests of what that connector alone does."""


def settings(role: str, endpoint: str) -> Any:
    """Return as much of a VllmConfig as connectors look at."""
    from vllm.config import ECTransferConfig

    return SimpleNamespace(
        model_config=SimpleNamespace(model="upstream", dtype="float32", multimodal_config=None),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        ec_transfer_config=ECTransferConfig(
            ec_connector=CONNECTOR,
            ec_role=role,
            ec_connector_extra_config={
                "endpoint": endpoint,
                "peer_wait": 0,  # those tests plan an input at its first pass
                "connect_wait": 30,
            },
        ),
    )


class Upstream:
    """The plugin: an owner, and the connectors of the test that runs."""

    def __init__(self, folder: Path) -> None:
        self.models = tiny_llava.write(folder / "llava"), text_model(folder / "opt")
        self.owner = blocking.create(capacity="64MiB")
        self.made: list[Any] = []

    def pytest_sessionstart(self) -> None:
        from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

        self.owner.open()
        ECConnectorFactory.create_connector = self.create

    def pytest_sessionfinish(self) -> None:
        self.owner.close()

    def create(self, config: Any, role: Any) -> Any:
        """Make ours in the place of the one that a scheduler's config names."""
        transfer = config.ec_transfer_config
        return self.facade(transfer.ec_role, role)

    def facade(self, ec_role: str, role: Any) -> Any:
        made = facade_class()(settings(ec_role, self.owner.endpoint), role)
        self.made.append(made)
        return made

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if with_connector(item)]
        for item in items:
            reason = NOT_OF_OTHERS.get(item.originalname)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=f"of {CONNECTOR} alone: {reason}"))
            if hasattr(item.module, "ECExampleConnectorMetadata"):
                self._replace(item.module)
            self._give_models(item.module)

    def _give_models(self, module: Any) -> None:
        """Have schedulers made for models of this machine, in the place of a hub's: only sizes matter."""
        for maker in (module, sys.modules.get("tests.v1.core.utils")):
            original = getattr(maker, "ModelConfig", None)
            if original is not None and isinstance(original, type):
                maker.ModelConfig = partial(_local, original, self.models)  # type: ignore[union-attr]

    def _replace(self, module: Any) -> None:
        def example(vllm_config: Any, role: Any) -> Any:
            produces = vllm_config.ec_transfer_config.is_ec_producer
            # Its producers plan loads as well.
            return self.facade("ec_both" if produces else "ec_consumer", role)

        module.ECExampleConnector = example
        module.ECExampleConnectorMetadata = metadata_class()

    def pytest_runtest_teardown(self) -> None:
        made, self.made = self.made, []
        for one in made:
            one.shutdown()
        with blocking.connect(self.owner.endpoint) as client:
            while page := self._keys():
                for view in page:
                    client.evict(view.key)

    def _keys(self) -> Any:
        with blocking.observe(self.owner.endpoint) as observer:
            return observer.keys().keys


def text_model(folder: Path) -> Path:
    """Write the config and tokenizer of an OPT, and return their folder."""
    tiny_llava.write(folder)
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "word_embed_proj_dim": 768,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _local(original: Any, models: tuple[Path, Path], *given: Any, **how: Any) -> Any:
    llava, text = models
    how["model"] = str(llava if "llava" in str(how.get("model", "")) else text)
    return original(*given, **how)


def with_connector(item: Any) -> bool:
    """Whether one of the scheduler's tests is with a connector, as all of the others are."""
    if item.path.name != "test_scheduler.py":
        return True
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return bool(given.get("use_ec_connector", "ec_connector" in item.name))


_classes: dict[str, Any] = {}
"""Made when vLLM is there."""


def metadata_class() -> Any:
    """Return our metadata with what vLLM's tests of that connector say and read."""
    if "metadata" not in _classes:
        from featcache.integrations.vllm.metadata import Load, StepMetadata

        def mm_datas(step: Any) -> list[Any]:
            return [
                SimpleNamespace(mm_hash=load.identifier, num_token=load.rows) for load in step.loads
            ]

        def add(step: Any, data: Any) -> None:
            key = _classes["keys"].key(data.mm_hash)
            step.loads.append(Load(data.mm_hash, key, "r", 0, None))

        StepMetadata.mm_datas = property(mm_datas)
        StepMetadata.add_mm_data = add
        _classes["metadata"] = StepMetadata
    return _classes["metadata"]


def facade_class() -> Any:
    """Return our connector, one object with a scheduler's side and a worker's, whose saves are awaited."""
    if "facade" in _classes:
        return _classes["facade"]
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

    from featcache.integrations.vllm.connector import FeatcacheECConnector

    class Facade(FeatcacheECConnector):
        def __init__(self, config: Any, role: Any) -> None:
            super().__init__(config, role)
            metadata_class()
            scheduler = role is ECConnectorRole.SCHEDULER
            other = ECConnectorRole.WORKER if scheduler else ECConnectorRole.SCHEDULER
            self._other = FeatcacheECConnector(config, other)
            side = self if scheduler else self._other
            assert side._scheduler is not None
            self.side = self._scheduler = side._scheduler
            _classes["keys"] = self.side._keys
            self._worker = self._worker or self._other._worker

        @property
        def _mm_datas_need_loads(self) -> dict[str, Any]:
            return {name: load.rows for name, load in self.side._planned.items()}

        def save_caches(self, encoder_cache: Any, mm_hash: str, **how: Any) -> None:
            super().save_caches(encoder_cache, mm_hash, **how)
            if not self.is_producer:
                return
            give_up_s = time.monotonic() + 20
            while (told := self.build_connector_worker_meta()) is None or mm_hash not in told.saved:
                assert time.monotonic() < give_up_s

        def update_state_after_alloc(self, request: Any, index: int) -> None:
            # Those tests have `has_cache_item` say that it is there: ours loads what it found itself.
            name = request.mm_features[index].identifier
            if self.has_cache_item(name):
                self.side._seen[name] = True
            super().update_state_after_alloc(request, index)

        def shutdown(self) -> None:
            super().shutdown()
            self._other.shutdown()

    _classes["facade"] = Facade
    return Facade


def main(arguments: list[str]) -> int:
    checkout = Path(arguments[0]).resolve()
    with tempfile.TemporaryDirectory(prefix="fc-") as folder:
        # The tests of the checkout, with the vLLM that is installed.
        (Path(folder) / "tests").symlink_to(checkout / "tests")
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.chdir(folder)
        sys.path.insert(0, folder)
        alone = ["-p", "no:cacheprovider", "--noconftest", "-c", os.devnull, "--rootdir", folder]
        return int(
            pytest.main(
                ["-q", "-rs", *alone, *arguments[1:], *TESTS], plugins=[Upstream(Path(folder))]
            )
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
