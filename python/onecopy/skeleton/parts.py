"""What an object is taken apart into, and where its bytes lie in the data area.

Frameworks report every stretch of memory they meet as an :class:`Extent`. Extents that overlap belong to
one *region*, which is copied once: so tied weights, overlapping views and NumPy arrays over torch's memory
still share memory after the object has been put together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

#: TensorFlow aborts and JAX copies where memory is aligned less.
ALIGNMENT = 64


class Unshareable(Exception):  # noqa: N818 (an outcome that callers decide on, not an error of theirs)
    """The object cannot be shared. ``silent``: nobody would want to, so no warning is due."""

    def __init__(self, reason: str, *, silent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.silent = silent


@dataclass
class Buffer:
    """One contiguous piece of memory, to be copied to ``data_start + offset``."""

    offset: int  #: bytes from the start of the data area, a multiple of 64; no two buffers overlap
    nbytes: int
    source: object  #: exports `nbytes` contiguous bytes; the only reference here that keeps the old memory alive
    #: ``repoint(mapping, absolute_offset)``: the torch tensors over this memory look at the mapping from then on.
    #: None: something else looks at it too, so the memory stays in use as long as the object lives.
    repoint: Callable[[object, int], None] | None
    #: Whether memory that nobody looks at any more goes back to the system; if not, its allocator keeps it.
    returned: bool = True


@dataclass
class Parts:
    skeleton: bytes  #: what :func:`put_together` needs beside the data area
    buffers: list[Buffer]  #: in the order of the data area
    data_bytes: int  #: size of the data area
    shared_bytes: int  #: payload in buffers of 1 KiB and more


class Mover(Protocol):
    """Re-points everything that looks at one extent. Must hold no reference to its memory."""

    #: Whether the framework gives the memory back, where nobody looks at it any more.
    returns_memory: bool

    def alive(self) -> bool:
        """Whether somebody other than the pickler still looks at the extent."""

    def move(self, mapping: object, offset: int) -> None: ...


@dataclass(eq=False)
class Extent:
    """Memory of one storage or array."""

    start: int  #: address
    nbytes: int
    keep: object  #: keeps the memory alive
    mover: Mover | None = None  #: None: cannot be re-pointed
    region: _Region | None = None

    @property
    def offset(self) -> int:
        """Bytes from the start of the data area; known after :meth:`Extents.place`."""
        if self.region is None:  # no bytes
            return 0
        return self.region.offset + self.start - self.region.start

    @property
    def alone(self) -> bool:
        """Whether no other extent overlaps this one; known after :meth:`Extents.merge`."""
        return self.region is None or len(self.region.extents) == 1

    def replace(self, copy: np.ndarray[Any, Any]) -> None:
        """Let a compact copy of an array that is alone in its region stand in for it."""
        self.start, self.nbytes, self.keep = address(copy), copy.nbytes, copy
        if self.region is not None:
            self.region.start, self.region.stop = self.start, self.start + self.nbytes


@dataclass(eq=False)
class _Region:
    start: int
    stop: int
    extents: list[Extent]
    offset: int = 0


class _Export:
    """Bytes at an address, for NumPy's array interface, and what keeps them alive."""

    def __init__(self, start: int, nbytes: int, keep: list[object]) -> None:
        self.keep = keep
        self.__array_interface__ = {"data": (start, True), "shape": (nbytes,), "typestr": "|u1", "version": 3}


class Extents:
    """All memory of one object: first met, then merged, then placed, then made into buffers."""

    def __init__(self) -> None:
        self._extents: list[Extent] = []
        self._regions: list[_Region] = []

    def add(self, start: int, nbytes: int, keep: object) -> Extent:
        extent = Extent(start, nbytes, keep)
        if nbytes:
            self._extents.append(extent)
        return extent

    def merge(self) -> None:
        region = _Region(0, 0, [])
        for extent in sorted(self._extents, key=lambda e: e.start):
            if extent.start >= region.stop:
                region = _Region(extent.start, extent.start + extent.nbytes, [])
            region.stop = max(region.stop, extent.start + extent.nbytes)
            region.extents.append(extent)
            extent.region = region
        # In the order in which pickle met them: about the order in which inference walks the memory.
        self._regions = list(dict.fromkeys(e.region for e in self._extents if e.region is not None))

    def place(self) -> int:
        """Give every region its offset. Returns the size of the data area in bytes."""
        end = 0
        for region in self._regions:
            region.offset = -(-end // ALIGNMENT) * ALIGNMENT
            end = region.offset + region.stop - region.start
        return end

    def buffers(self) -> list[Buffer]:
        """The buffers to copy. Call it when the pickler is gone: it asks who is left."""
        return [_buffer(region) for region in self._regions]


def in_mapping(data_start: int, offsets: list[int]) -> list[int]:
    """Offsets from the start of the mapping. numpy checks the end of an array over a buffer, and not its start."""
    places = [data_start + offset for offset in offsets]
    if places and min(places) < data_start:
        raise ValueError(f"a buffer {data_start - min(places)} bytes before the data area")
    return places


def address(array: np.ndarray[Any, Any]) -> int:
    """Address of the first element."""
    start: int = array.__array_interface__["data"][0]
    return start


def _buffer(region: _Region) -> Buffer:
    nbytes = region.stop - region.start
    movers = [
        (extent.start - region.start, extent.mover)
        for extent in region.extents
        if extent.mover is not None and extent.mover.alive()
    ]

    def repoint(mapping: object, offset: int) -> None:
        for inside, mover in movers:
            mover.move(mapping, offset + inside)

    source = np.asarray(_Export(region.start, nbytes, [extent.keep for extent in region.extents]))
    movable = len(movers) == len(region.extents)
    returned = all(mover.returns_memory for _, mover in movers)
    region.extents.clear()  # region and extents refer to each other: left so, only a collection would free the memory
    return Buffer(region.offset, nbytes, source, repoint if movable else None, returned)
