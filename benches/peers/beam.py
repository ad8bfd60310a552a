"""What Beam itself has: `shared.Shared`, a model a process, and `MultiProcessShared`, one behind a proxy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import Shape

from peers.files import TorchFile
from peers.peer import Peer


class Shared(TorchFile):
    name = "Beam Shared"
    packages = ("apache-beam", "torch")
    settings = "shared.Shared().acquire(torch.load of the whole model)"
    own = 1.0

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        from apache_beam.utils.shared import Shared as Handle

        return Handle().acquire(lambda: torch.load(folder / self.store, weights_only=False))

    def let_go(self) -> None:
        """Beam keeps what was asked for last, until something else is asked for."""
        from apache_beam.utils.shared import Shared as Handle

        Handle().acquire(torch.nn.Module)


class Served(Peer):
    name = "Beam MultiProcessShared"
    packages = ("apache-beam", "torch")
    settings = (
        "always_proxy=True, as RunInference does with large_model=True; each inference goes to the process that loaded"
    )
    store = "served"
    peak = 1.0
    maps = False

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        self.mine = handle(make, folder)
        self.proxy = self.mine.acquire()

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        self.mine = handle(None, folder)
        return self.mine.acquire()


def handle(make: Callable[[], torch.nn.Module] | None, folder: Path) -> Any:
    from apache_beam.utils.multi_process_shared import MultiProcessShared

    return MultiProcessShared(make, "model", path=str(folder), always_proxy=True)
