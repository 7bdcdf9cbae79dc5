"""The transport as Ray calls it: `TensorTransportManager` over a `featcache.blocking` client.

An object is one feature (of very many tensors several), kept under a key and pinned by the session of the
actor that made it: any number of actors read it, each as often as it likes, until Ray frees it. One-sided:
the source takes no part in a transfer. The interface is the one that Ray documents for custom transports.
"""

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import ray
import torch
from ray.experimental import TensorTransportManager, register_tensor_transport
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportMetadata,
)

from featcache import FeatcacheError, KeyNotFound, SettingsError, blocking
from featcache.integrations.ray.config import NAME, Config
from featcache.memory.pack import Feature

_log: Final = logging.getLogger("featcache")
_DEVICES: Final = ["cpu", "cuda"]
_PIN_TRIES: Final = 8
"""Puts of an object that was evicted before it could be pinned, which takes a pool under pressure."""
_MAX_WARNED: Final = 1024
_TENSORS: Final = 128
"""Of one feature; an object of more is several. Settings.tensors of an owner is 256 if nothing is said."""


@dataclass(kw_only=True)
class Metadata(TensorTransportMetadata):
    """What Ray carries from the source to a receiver by its own messages."""

    endpoint: str = ""
    keys: tuple[str, ...] = ()
    """Of its features, each of `_TENSORS` tensors at most; none where the object has no tensors."""
    node: str = ""
    """Ray's id of the source's node, for the error of a receiver elsewhere."""


class Clients:
    """The sessions of this process, one for each endpoint and device. Safe in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], blocking.FeatureClient] = {}

    def get(self, endpoint: str, device: torch.device) -> blocking.FeatureClient:
        """Return the client, opened if it is the first time."""
        at = endpoint, str(device)
        with self._lock:
            client = self._open.get(at)
            if client is None:
                client = blocking.connect(endpoint, device=device, reconnect=True).open()
                self._open[at] = client
        return client


class FeatcacheTransport(TensorTransportManager):
    """One in each process, made by Ray: in sources, in receivers, and in who owns the refs.

    Ray calls it in several threads: `extract_tensor_transport_metadata` in that of the actor's method, the
    rest in one of Ray's own.
    """

    config: ClassVar[Config]

    def __init__(self) -> None:
        self._clients = Clients()
        self._prefix = f"ray-{os.getpid()}-{uuid.uuid4().hex}"  # object ids repeat between clusters
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[blocking.FeatureClient, Metadata]] = {}
        """By object id: what this process put, and Ray has not freed. As many as slots at most."""
        self._warned: set[str] = set()

    def tensor_transport_backend(self) -> str:
        """Return the name that it is registered by."""
        return NAME.upper()  # as Ray spells it

    @staticmethod
    def is_one_sided() -> bool:
        """Return that a receiver reads with no part of the source's."""
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """Return that nobody hangs in a failed transfer, so that Ray kills no actor for it."""
        return True

    def actor_has_tensor_transport(self, actor: Any) -> bool:  # noqa: ARG002 - Ray's interface
        """Return True: Ray registers it on each actor."""
        return True

    # --- the source -------------------------------------------------------------------------------

    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[torch.Tensor]
    ) -> Metadata:
        """Put the tensors of an object, and return where they are.

        Raises:
            SettingsError: tensors of several kinds of device, or of one that the transport is not for.
            PutTimeout: no room came in time.

        """
        with self._lock:
            kept = self._kept.get(obj_id)
        if kept is not None:  # a task that Ray repeats; it keeps the tensors of the first time
            return kept[1]
        device = _device_of(rdt_object)
        metadata = Metadata(
            tensor_meta=[(x.shape, x.dtype) for x in rdt_object],
            tensor_device=None if device is None else device.type,
        )
        if device is None:
            return metadata
        metadata.endpoint = self.config.endpoint
        features = _features(rdt_object)
        metadata.keys = tuple(f"{self._prefix}-{obj_id}-{at}" for at in range(len(features)))
        metadata.node = ray.get_runtime_context().get_node_id()
        client = self._clients.get(metadata.endpoint, device)
        self._put(client, metadata.keys, features)
        with self._lock:
            self._kept[obj_id] = client, metadata
        return metadata

    def _put(
        self, client: blocking.FeatureClient, keys: tuple[str, ...], features: list[Feature]
    ) -> None:
        """Put and pin all of them, or none."""
        try:
            for tries_left in reversed(range(_PIN_TRIES)):
                client.put_many(features, keys=keys, timeout=self.config.put_timeout_s)
                try:
                    for key in keys:
                        client.pin(key)
                except KeyNotFound:  # evicted before its pin
                    if not tries_left:
                        raise
                else:
                    return
        except FeatcacheError:
            _evict(client, keys)
            raise

    def garbage_collect(
        self,
        obj_id: str,
        tensor_transport_meta: TensorTransportMetadata,  # noqa: ARG002 - Ray's interface
        tensors: list[torch.Tensor],  # noqa: ARG002 - as above
    ) -> None:
        """Evict an object that nobody refers to any more. Reads in progress may finish."""
        with self._lock:
            client, metadata = self._kept.pop(obj_id, (None, None))
        if client is None or metadata is None:
            return
        _evict(client, metadata.keys)

    def send_multiple_tensors(
        self,
        tensors: list[torch.Tensor],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        """Never called: the transport is one-sided."""
        raise NotImplementedError("the transport of featcache is one-sided")

    # --- the receiver -----------------------------------------------------------------------------

    def recv_multiple_tensors(
        self,
        obj_id: str,  # noqa: ARG002 - Ray's interface
        tensor_transport_metadata: Metadata,
        communicator_metadata: CommunicatorMetadata,  # noqa: ARG002 - as above
        target_buffers: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Return copies of an object's tensors, complete, on a device of the source's kind.

        Raises:
            KeyNotFound: freed meanwhile, or evicted since the source ended, or of another host.
            SettingsError: they are on a GPU, and this process has none.

        """
        metadata = tensor_transport_metadata
        if not metadata.keys:
            return []
        device = target_buffers[0].device if target_buffers else _device_here(metadata)
        client = self._clients.get(metadata.endpoint, device)
        outs: Sequence[Feature | None] = (
            _features(target_buffers) if target_buffers else [None] * len(metadata.keys)
        )
        tensors: list[torch.Tensor] = []
        try:
            for key, out in zip(metadata.keys, outs, strict=True):
                found = client.get(key, device=device if out is None else None, out=out)
                tensors += [found] if isinstance(found, torch.Tensor) else found.values()
        except KeyNotFound as error:
            raise KeyNotFound(self._lost(metadata)) from error
        # Before Ray hands them to a method, in another thread and on a stream that is not known here.
        for cuda in {x.device for x in tensors if x.is_cuda}:
            torch.cuda.current_stream(cuda).synchronize()
        return tensors

    def _lost(self, metadata: Metadata) -> str:
        here = ray.get_runtime_context().get_node_id()
        if here != metadata.node:
            return (
                f"the object was made on node {metadata.node}, this is {here}: the owner at "
                f"{metadata.endpoint} is another here. Actors of one slab have to be on one host"
            )
        return (
            f"the object is no longer at {metadata.endpoint}: its actor ended and it was evicted, or "
            "the owner was restarted. Have it made again"
        )

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        """Do nothing: a receive is one copy, which waits for nobody."""

    # --- who owns the refs ------------------------------------------------------------------------

    def get_communicator_metadata(
        self,
        src_actor: Any,  # noqa: ARG002 - Ray's interface
        dst_actor: Any,
        backend: str | None = None,  # noqa: ARG002 - as above
    ) -> CommunicatorMetadata:
        """Return nothing of its own; warn of a receiver that could only wait.

        Ray runs the methods of an actor without ``enable_tensor_transport`` in the thread that also starts
        the receives, so a method waits 60 s for one that is behind it (Ray's issue 66264). It is no error
        here: Ray may call this in a thread of its own in which an exception ends the process.
        """
        if getattr(dst_actor, "_ray_enable_tensor_transport", True):
            return CommunicatorMetadata()
        actor = str(dst_actor)
        if actor not in self._warned:
            if len(self._warned) >= _MAX_WARNED:
                self._warned.clear()
            self._warned.add(actor)
            _log.warning(
                "%s receives tensors and was made without enable_tensor_transport=True: its methods will "
                "wait for them until Ray gives up. Make its class with "
                "@ray.remote(enable_tensor_transport=True)",
                actor,
            )
        return CommunicatorMetadata()


def register(config: Config) -> None:
    """Register the transport with Ray; one that is registered already stays."""

    class Configured(FeatcacheTransport):  # Ray pickles it by value, with its settings, for actors
        pass

    Configured.config = config
    with contextlib.suppress(ValueError):  # it is registered, by this or by the actor's creator
        register_tensor_transport(NAME, _DEVICES, Configured, torch.Tensor)


def _device_of(tensors: list[torch.Tensor]) -> torch.device | None:
    """Return where an object's tensors are: the first one's device, None where there is no tensor."""
    kinds = sorted({x.device.type for x in tensors})
    if len(kinds) > 1:
        raise SettingsError(
            f"the object has tensors on {' and '.join(kinds)}: Ray takes one kind of device an object"
        )
    if kinds and kinds[0] not in _DEVICES:
        raise SettingsError(
            f"the transport of featcache is for {' and '.join(_DEVICES)}, not {kinds[0]}"
        )
    return tensors[0].device if tensors else None


def _device_here(metadata: Metadata) -> torch.device:
    """Return the device of this process to which an object is copied."""
    if metadata.tensor_device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SettingsError(
            "the object's tensors are on a GPU and this process sees none: give the actor num_gpus, or "
            "fetch it with ray.experimental.set_target_device_for_ref(ref, 'cpu')"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _features(tensors: list[torch.Tensor]) -> list[Feature]:
    """Return an object's tensors as features, in their order."""
    if len(tensors) == 1:
        return [tensors[0]]
    return [
        {str(number): x for number, x in enumerate(tensors[start : start + _TENSORS])}
        for start in range(0, len(tensors), _TENSORS)
    ]


def _evict(client: blocking.FeatureClient, keys: tuple[str, ...]) -> None:
    """Drop what is there of an object. An owner that is gone took it along, and nobody waits for an error."""
    with contextlib.suppress(FeatcacheError):
        for key in keys:
            client.evict(key)
