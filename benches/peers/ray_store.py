"""Ray's object store, and IBM's zerocopy, which lays torch models onto it."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import Shape

from peers.peer import Peer


class RayStore(Peer):
    name = "Ray + zerocopy"
    packages = ("ray", "zerocopy")
    settings = "ray.put(extract_tensors(model)); ray.get, replace_tensors in a process that is connected to Ray already"
    store = "ray"
    peak = 4.0

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        self.begin(shape)
        self.hand_over(shape, make, folder)

    def begin(self, shape: Shape) -> None:
        start(shape.size * 2 + (256 << 20))

    def hand_over(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        import ray
        import zerocopy

        self.address = ray.get_runtime_context().gcs_address
        self.reference = ray.put(zerocopy.extract_tensors(make()))

    def ticket(self) -> Any:
        from ray import cloudpickle

        return self.address, cloudpickle.dumps(self.reference)

    def ready(self, ticket: Any) -> None:
        from ray import cloudpickle

        address, reference = ticket
        connect(address)
        self.reference = cloudpickle.loads(reference)

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        import ray
        import zerocopy

        model, tensors = ray.get(self.reference)
        with warnings.catch_warnings():
            # Of read-only arrays, which torch cannot tell.
            warnings.simplefilter("ignore")
            zerocopy.replace_tensors(model, tensors)
        return model

    def left(self) -> None:
        import ray

        ray.shutdown()

    def close(self) -> None:
        import ray

        ray.shutdown()


QUIET = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}


def start(store: int) -> None:
    import ray

    # Its sockets lie below this folder, and their names may have 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-", dir=os.environ["BENCH_TMP"])
    ray.init(num_cpus=1, object_store_memory=max(store, 128 << 20), _temp_dir=folder, **QUIET)


def connect(address: str) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
