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
from machine import meminfo, rollup
from shapes import Shape

import onecopy
from onecopy import _acquire, _publish, _verbs, process  # noqa: F401 (what a first use imports)
from peers.peer import Peer

TAG = "model"
#: The line of smaps that counts what a process maps of shared memory by huge pages, and the bytes of one.
HUGE, HUGE_PAGE = "ShmemPmdMapped", 2 << 20


class OneCopy(Peer):
    name = "onecopy"
    packages = ("onecopy",)
    settings = "Store.publish in one process, Store.attach in another; after the collapse into huge pages"
    store = "onecopy"
    peak = 1.1

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        self.hand_over(shape, make, folder)
        wait_for_collapse(shape.size, "self")

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
        "waits in Holder.acquire while another process loads and publishes; from the moment before that one makes it "
        "READY, by its clock, until acquire returns"
    )
    store = "woken"
    peak = 0.0
    lies = 0.0
    own = 1.1

    def cannot(self, shape: Shape) -> str | None:
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
        self.returned = time.perf_counter()
        return model

    def took(self, seconds: float) -> float:
        assert self.loader is not None
        assert self.holder.info is not None
        assert self.holder.info.role == "attacher", self.holder.info
        return self.returned - self.loader.hear()

    def let_go(self) -> None:
        self.holder.release()

    def left(self) -> None:
        assert self.loader is not None
        self.holder.release()
        self.loader.end()


def loading(shape: Shape, folder: Path) -> Iterator[Any]:
    """Plays in a child: loads, says that it does so, and when it was about to make it READY (all processes have one clock)."""
    stamps: list[float] = []
    rebuild = _publish.rebuild

    def last_before_ready(attached: Any) -> Any:
        rebuilt = rebuild(attached)
        stamps.append(time.perf_counter())
        return rebuilt

    _publish.rebuild = last_before_ready

    def load() -> torch.nn.Module:
        (folder / "loads").touch()
        # Time enough to be waited for.
        time.sleep(0.3)
        return shape.model()

    holder = onecopy.Holder(load, TAG, store=store(folder))
    holder.acquire()
    yield stamps[0]


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


def wait_for_collapse(size: int, pid: int | str = "self", quiet: float = 1.5, most: float = 30.0) -> None:
    """The publisher collapses after it has published: until all that process `pid` maps is huge, or no more pages become so.

    They do not where the kernel has none to give: each attacher says how much of its mapping is huge. That no more become so
    is known of the whole machine only: where others make huge pages meanwhile, there is an end to waiting.
    """
    all_huge = size // HUGE_PAGE * HUGE_PAGE
    seen = huge_pages()
    began = since = time.monotonic()
    while rollup(HUGE, pid) < all_huge and time.monotonic() - since < quiet and time.monotonic() - began < most:
        time.sleep(0.05)
        if (now := huge_pages()) != seen:
            seen, since = now, time.monotonic()
