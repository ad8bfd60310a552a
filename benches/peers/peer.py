"""What a peer is: a way to get a model that is there already into another process."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import Shape


class Peer:
    """Lives in two processes: one that puts the model there, and stays; one that attaches.

    What the second one needs to know travels as a ticket.
    """

    #: In the tables.
    name: str
    #: Whose versions matter.
    packages: tuple[str, ...] = ("torch",)
    #: How it is used, and what of its settings is not the default.
    settings: str
    #: Where the model lies; peers with the same one share it.
    store: str
    #: The model's size many times: while it is put there (the source included), as it lies there, what an attacher has for itself.
    peak: float = 2.0
    lies: float = 1.0
    own: float = 0.0
    #: Whether the weights are in the attacher's own memory, to be looked at there.
    maps = True
    #: Whether attachers are children of the process which has put it there.
    inherits = False

    def version(self) -> str:
        return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in self.packages)

    def cannot(self, shape: Shape) -> str | None:
        """Why it cannot be attached to that one."""
        return None

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        """Once. `folder` is in a tmpfs."""
        raise NotImplementedError

    def begin(self, shape: Shape) -> None:
        """Before it is put there: what a process that works with this peer has done long before."""

    def hand_over(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        """As `put`, and nothing besides; timed."""
        self.put(shape, make, folder)

    def ticket(self) -> Any:
        """For one attacher."""
        return None

    def ready(self, ticket: Any) -> None:
        """In the attacher: what a process that works with this peer has done long before."""

    def took(self, seconds: float) -> float:
        """What attaching took, where it is not what `attach` took. Asked for when nothing is timed any more."""
        return seconds

    def prepare(self, shape: Shape, folder: Path) -> None:
        """In the attacher: what must have happened just before; not timed."""

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        """The model; timed."""
        raise NotImplementedError

    def close(self) -> None:
        """Where it was put."""

    def let_go(self) -> None:
        """In the attacher: what else keeps the model, besides the reference that `attach` gave."""

    def left(self) -> None:
        """In the attacher, at its end."""
