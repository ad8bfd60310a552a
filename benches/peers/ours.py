"""onecopy itself, by the same rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peers.peer import Peer
from shapes import Shape

import onecopy
from onecopy import _acquire, _publish, _verbs, process  # noqa: F401 (what a first use imports)

TAG = "model"


class OneCopy(Peer):
    name = "onecopy"
    packages = ("onecopy",)
    settings = "Store.publish in one process, Store.attach in another; after the collapse into huge pages"
    store = "onecopy"
    peak = 1.1

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        self.published = store(folder).publish(TAG, make())
        self.collapsed = wait_for_collapse()

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


def store(folder: Path) -> onecopy.Store:
    """Of this run alone: the folder's name is nobody else's."""
    return onecopy.Store(f"bench-{folder.name}")


@contextmanager
def swept(folder: Path) -> Iterator[None]:
    """Nothing of the namespace stays."""
    try:
        yield
    finally:
        mine = store(folder)
        mine.sweep()
        assert process.core_store(mine.place).remove_registry_if_unused()


def huge_pages() -> int:
    """Bytes of shared memory on this machine that are huge pages."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("ShmemHugePages:"):
            return int(line.split()[1]) << 10
    return 0


def wait_for_collapse(quiet: float = 1.5) -> int:
    """Until no more pages became huge for a while: how many bytes did. The publisher does it after it has published."""
    start = seen = huge_pages()
    since = time.monotonic()
    while time.monotonic() - since < quiet:
        time.sleep(0.05)
        now = huge_pages()
        if now != seen:
            seen, since = now, time.monotonic()
    return seen - start
