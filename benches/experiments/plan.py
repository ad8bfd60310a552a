"""Which jobs an experiment runs, how often, and in which order: round by round, in another order each."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import running

#: progress(part that is done, what comes now)
Progress = Callable[[float, str], None]
#: A difference of less than 5 % wants five.
ROUNDS = int(os.environ.get("EXPERIMENTS_ROUNDS", "5"))


@dataclass(frozen=True)
class Planned:
    arm: str
    model: str
    processes: int
    #: (batch, batches of one process)
    phases: tuple[tuple[int, int], ...]
    #: About so long, on two CPUs.
    seconds: float
    rounds: int = 1
    limit: int | None = None


def seconds(planned: Iterable[Planned]) -> float:
    return sum(one.seconds * min(one.rounds, ROUNDS) for one in planned)


def play(
    planned: list[Planned], progress: Progress, before: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """The facts of every job (`running.run`), with its round; `before` is called before each."""
    whole, done, found = seconds(planned), 0.0, []
    with running.prepared(*dict.fromkeys(one.model for one in planned)) as files:
        for number in range(min(ROUNDS, max(one.rounds for one in planned))):
            turn = [one for one in planned if number in spread_out(min(one.rounds, ROUNDS))]
            random.Random(number).shuffle(turn)  # noqa: S311 (to be repeated)
            for one in turn:
                progress(done / whole, f"round {number + 1}: {one.arm}, {one.model}, N = {one.processes}")
                before()
                facts = running.run(one.arm, files[one.model], one.processes, one.phases, one.limit)
                found.append({"round": number, "date": time.time(), **facts})
                done += one.seconds
    return found


def spread_out(rounds: int) -> set[int]:
    """Which of all rounds: those of one that is run less often lie apart."""
    return {round(at * (ROUNDS - 1) / max(1, rounds - 1)) for at in range(rounds)}
