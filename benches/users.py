"""How processes get a model that nobody has put there for them: the first loads it, the others get it somehow.

What they load is a file of torch.save, in a tmpfs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from children import Child
from company import Cannot, lacking, putting, room
from peers import BY_NAME
from peers.beam import handle
from peers.files import TorchFile
from peers.ours import TAG, store
from shapes import Shape

import onecopy

#: What keeps a model, for as long as the process lives.
KEPT: list[Any] = []


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = torch.load(folder / TorchFile.store, weights_only=False)
    return model


def by_onecopy(folder: Path) -> Any:
    holder = onecopy.Holder(lambda: load(folder), TAG, store=store(folder))
    KEPT.append(holder)
    return holder.acquire()


def by_shared(folder: Path) -> Any:
    from apache_beam.utils.shared import Shared

    return Shared().acquire(lambda: load(folder))


def by_multi_process_shared(folder: Path) -> Any:
    mine = handle(lambda: load(folder), folder)
    KEPT.append(mine)
    return mine.acquire()


def by_mapping(folder: Path) -> Any:
    return torch.load(folder / TorchFile.store, mmap=True, weights_only=False)


USERS: dict[str, Callable[[Path], Any]] = {
    "onecopy": by_onecopy,
    "Beam Shared": by_shared,
    "Beam MultiProcessShared": by_multi_process_shared,
    "torch.load(mmap)": by_mapping,
}


def lacking_for(arm: str, count: int, size: int) -> Cannot | None:
    """Why so many processes have no room for it. Whoever shares needs the model and its copy meanwhile."""
    return lacking(size * (count if arm == "Beam Shared" else 2))


@contextmanager
def file(shape: Shape) -> Iterator[Path]:
    """The room in which it lies."""
    with room() as folder:
        with Child(putting, BY_NAME["torch.load"], shape, folder) as child:
            child()
        yield folder


@contextmanager
def namespace_in(folder: Path) -> Iterator[Path]:
    """A room of its own beside the same file."""
    with room() as mine:
        (mine / TorchFile.store).symlink_to(folder / TorchFile.store)
        yield mine
