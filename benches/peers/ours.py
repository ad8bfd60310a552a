"""onecopy itself, by the same rules."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from children import Child
from machine import meminfo
from shapes import Shape

import onecopy
from onecopy import _acquire, _publish, _verbs, process  # noqa: F401 (what a first use imports)
from peers.peer import Peer

TAG = "model"


class OneCopy(Peer):
    name = "onecopy"
    packages = ("onecopy",)
    settings = "Store.publish in one process, Store.attach in another; after the collapse into huge pages"
    store = "onecopy"
    peak = 1.1

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        self.hand_over(shape, make, folder)
        wait_for_collapse(shape.size)

    def hand_over(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        self.published = store(folder).publish(TAG, make())

    def ready(self, ticket: Any) -> None:
        self.leases: list[onecopy.Lease] = []

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        lease = store(folder).attach(TAG)
        self.leases.append(lease)
        return lease.object

    def let_go(self) -> None:
        self.leases.pop().release()

    def close(self) -> None:
        self.published.release()


class Woken(OneCopy):
    """Another process loads meanwhile, for each attacher anew."""

    name = "onecopy, at READY"
    settings = (
        "waits in Holder.acquire while another process loads and publishes; from its wake-up on, before any collapse"
    )
    store = "woken"
    peak = 0.0
    lies = 0.0
    own = 1.1

    def cannot(self, row: str, shape: Shape) -> str | None:
        return "one for a large model, one for a middle one is enough" if shape.name.endswith("MiB") else None

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        pass

    def close(self) -> None:
        pass

    def ready(self, ticket: Any) -> None:
        self.loader: Child | None = None

    def prepare(self, shape: Shape, folder: Path) -> None:
        self.mine = folder / f"onecopy-peers-{uuid.uuid4().hex[:12]}"
        self.mine.mkdir()
        self.loader = Child(loading, shape, self.mine)
        self.loader.tell()
        while not (self.mine / "loads").exists():
            time.sleep(0.001)

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        self.holder = onecopy.Holder(never, TAG, store=store(self.mine))
        model = self.holder.acquire()
        info = self.holder.info
        assert info is not None
        assert info.role == "attacher", info
        self.seconds = info.seconds - info.wait_seconds
        return model

    def took(self, seconds: float) -> float:
        return self.seconds

    def let_go(self) -> None:
        self.holder.release()

    def left(self) -> None:
        assert self.loader is not None
        self.holder.release()
        self.loader.end()


def loading(shape: Shape, folder: Path) -> Iterator[Any]:
    """Plays in a child: loads, and says that it does so."""

    def load() -> torch.nn.Module:
        (folder / "loads").touch()
        # Time enough to be waited for.
        time.sleep(0.3)
        return shape.model()

    holder = onecopy.Holder(load, TAG, store=store(folder))
    holder.acquire()
    yield None


def never() -> torch.nn.Module:
    raise AssertionError("another process loads")


def store(folder: Path) -> onecopy.Store:
    """Of this run alone: the folder's name is nobody else's."""
    return onecopy.Store(f"bench-{folder.name}")


@contextmanager
def swept(folder: Path) -> Iterator[None]:
    """Nothing stays of its namespace, nor of those of the folders in it."""
    try:
        yield
    finally:
        for one in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            mine = store(one)
            mine.sweep()
            assert process.core_store(mine.place).remove_registry_if_unused()


def huge_pages() -> int:
    """Bytes of shared memory on this machine that are huge pages."""
    return meminfo("ShmemHugePages")


def wait_for_collapse(size: int, quiet: float = 1.5, most: float = 30.0) -> None:
    """The publisher collapses after it has published: until all is huge, or no more pages became so for a while.

    The kernel counts for the whole machine: where others make huge pages meanwhile, there is an end to waiting.
    """
    chunk = 2 << 20
    start = seen = huge_pages()
    began = since = time.monotonic()
    while seen - start < size // chunk * chunk and time.monotonic() - since < quiet and time.monotonic() - began < most:
        time.sleep(0.05)
        if (now := huge_pages()) != seen:
            seen, since = now, time.monotonic()
