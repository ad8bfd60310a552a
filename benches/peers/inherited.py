"""Peers that work between a process and its children."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import children
import torch
import torch.multiprocessing
from shapes import Shape

from peers.peer import Peer


class SharedMemory(Peer):
    name = "share_memory_ + spawn"
    settings = (
        "Module.share_memory(), strategy file_descriptor; pickled for and unpickled in a spawned process, "
        "without what starting its interpreter takes"
    )
    store = "torch_shm"

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        import resource

        # A descriptor a tensor, and a shell's usual limit is 1,024.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.model = make().share_memory()

    def ticket(self) -> Any:
        return bytes(ForkingPickler.dumps(self.model))

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        return ForkingPickler.loads(ticket)


class Forked(Peer):
    name = "fork after load"
    settings = "os.fork() of a process that has loaded it; only its children can have the model, and only this one"
    store = "forked"
    peak = 1.0
    inherits = True

    #: By inheritance.
    model: torch.nn.Module

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        Forked.model = make()
        # Used once: a parent that serves has touched its weights.
        shape.predict(Forked.model)

    def took(self, seconds: float) -> float:
        return children.alive_at - children.forked_at

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        return Forked.model
