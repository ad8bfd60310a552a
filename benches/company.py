"""Peers side by side: each puts the model where it keeps it, then all attach, round by round, each in another order

A company is who fits into memory together. We are in each, so every figure of a peer has one of ours, of the same round.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import Child
from machine import available
from peers import OURS
from peers.ours import swept
from peers.peer import Peer
from rounds import shuffled
from shapes import MIB, Shape

#: Never used by us: the system and its caches need some.
SPARE = 6144 * MIB


@dataclass
class Cannot:
    reason: str


def lacking(needed: float, of: str = "") -> Cannot | None:
    """Why so many bytes cannot be taken now."""
    free = available() - SPARE
    return Cannot(f"needs {needed / 2**30:.1f} GiB{of}, {free / 2**30:.1f} are free") if needed > free else None


@contextmanager
def room() -> Iterator[Path]:
    """A folder in a tmpfs, and a namespace of the same name."""
    folder = Path(tempfile.mkdtemp(prefix="onecopy-peers-", dir="/dev/shm"))
    try:
        with swept(folder):
            yield folder
    finally:
        shutil.rmtree(folder)


def companies(peers: Iterable[Peer], size: int) -> tuple[list[list[Peer]], dict[Peer, Cannot]]:
    """Who can be measured together, and who not at all. Whoever needs most while it puts comes first."""
    free = available() - SPARE
    waiting = sorted((peer for peer in peers if peer is not OURS), key=lambda peer: -peer.peak)
    alone = {peer: lacking(need([peer, OURS], size), " beside ours") for peer in waiting}
    not_at_all = {peer: reason for peer, reason in alone.items() if reason}
    waiting = [peer for peer in waiting if peer not in not_at_all]
    if reason := lacking(need([OURS], size)):
        return [], {**not_at_all, OURS: reason}
    found: list[list[Peer]] = []
    while waiting:
        company: list[Peer] = []
        for peer in list(waiting):
            if need([*company, peer, OURS], size) <= free:
                company.append(peer)
                waiting.remove(peer)
        found.append([*company, OURS])
    return found or [[OURS]], not_at_all


def need(company: list[Peer], size: int) -> float:
    """The most bytes at once."""
    most, lies, stores = 0.0, 0.0, set()
    for peer in company:
        if peer.store not in stores:
            stores.add(peer.store)
            most = max(most, lies + peer.peak)
            lies += peer.lies
    return size * max(most, lies + max(peer.own for peer in company))


def putting(peer: Peer, shape: Shape, folder: Path) -> Iterator[Any]:
    """Plays in a child: the process that puts the model there, then gives tickets."""
    peer.put(shape, shape.model, folder)
    # A model whose modules know each other is a cycle, and malloc keeps what was freed.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        yield None
        while True:
            start = time.perf_counter()
            ticket = peer.ticket()
            yield ticket, time.perf_counter() - start
    finally:
        peer.close()


@dataclass
class Served:
    """A peer whose model is there."""

    peer: Peer
    putter: Child
    folder: Path

    def hatch(self, play: Callable[..., Any], shape: Shape) -> tuple[Child, float]:
        """A process that will attach, and what its ticket cost."""
        ticket, seconds = self.putter()
        parent = self.putter if self.peer.inherits else None
        return Child(play, self.peer, shape, self.folder, ticket, parent=parent), seconds


@contextmanager
def assembled(company: list[Peer], shape: Shape) -> Iterator[list[Served]]:
    with room() as folder, ExitStack() as stack:
        served = []
        for peer in company:
            child = stack.enter_context(Child(putting, peer, shape, folder))
            child()
            served.append(Served(peer, child, folder))
        yield served


def by_rounds(served: list[Served], rounds: int) -> Iterator[tuple[int, Served]]:
    """In another order each."""
    for number in range(rounds):
        for one in shuffled(served, number):
            yield number, one
