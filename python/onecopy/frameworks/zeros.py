"""Memory for variables that will look at other memory in a moment: zeros of any size, which cost none."""

from __future__ import annotations

import mmap

import numpy as np

from onecopy.skeleton.parts import address

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python since 3.12


class Zeros:
    """Pages that nobody writes to are one page of the kernel, however many there are."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def buffer(self, nbytes: int) -> mmap.mmap:
        if not self._maps or len(self._maps[-1]) < nbytes:
            size = max(nbytes, 1 << 20)
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            self._maps.append(mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE))
        return self._maps[-1]

    def has(self, where: int) -> bool:
        """Whether an address is in one of them."""
        starts = [(address(np.frombuffer(one, np.uint8)), len(one)) for one in self._maps]
        return any(start <= where < start + size for start, size in starts)
