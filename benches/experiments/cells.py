"""The cells of gil.py's grid, and how one of them is found again in what was measured."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

COUNTS = (1, 2, 4)
#: In the place of a count, under large_model=True: one client that is not in the server's process.
APART = 0
NOWHERE, AROUND, INSIDE = "no Python", "Python in pre- and postprocessing", "Python in the model's forward"
SMALL, LARGE = 4096, 4_194_304
BATCHES = (1, 16, 64)


@dataclass(frozen=True)
class Cell:
    where: str
    #: So many times as long as the inference.
    times: int
    #: Bytes of a batch's input, all elements together.
    payload: int
    batch: int

    @property
    def size(self) -> str:
        return "4 kB" if self.payload == SMALL else "4 MB"

    @property
    def name(self) -> str:
        return f"{self.where}{f' {self.times} x' if self.times else ''}, {self.size}, batch {self.batch}"


CELLS = (
    *(Cell(NOWHERE, 0, payload, batch) for payload in (SMALL, LARGE) for batch in BATCHES),
    *(Cell(AROUND, times, payload, batch) for payload in (SMALL, LARGE) for batch in BATCHES for times in (1, 5)),
    *(Cell(INSIDE, times, SMALL, batch) for batch in BATCHES for times in (1, 5)),
)


def inference(known: dict[str, Any], cell: Cell) -> dict[str, float]:
    """CPU seconds of the whole of it, and of the model alone."""
    return next(one for one in known["inferences"] if (one["payload"], one["batch"]) == (cell.payload, cell.batch))


def iterations(known: dict[str, Any], cell: Cell) -> int:
    each: float = known["iteration"]
    return round(cell.times * inference(known, cell)["cpu"] / each)


def find(found: dict[str, Any], cell: Cell, arm: str, count: int) -> dict[str, Any]:
    wanted = {**asdict(cell), "arm": arm, "count": count}
    return next(one for one in found["runs"] if wanted.items() <= one.items())


def middle(found: dict[str, Any], cell: Cell, arm: str, count: int, what: str = "rate") -> float:
    values: list[float] = find(found, cell, arm, count)[what]
    return statistics.median(values)
