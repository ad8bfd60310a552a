"""Which jobs an experiment runs, how often, and in which order: round by round, in another order each."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from arms import ARMS, containers

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


def play(planned: list[Planned], progress: Progress) -> list[dict[str, Any]]:
    """The facts of every job (`running.run`), with its round."""
    if not containers():
        print("unshare(1) may not make namespaces here: arms of one process per container are left out.")
        planned = [one for one in planned if ARMS[one.arm].workers != "containers"]
    whole, done, found = seconds(planned), 0.0, []
    with running.prepared(*dict.fromkeys(one.model for one in planned)) as files:
        rounds = min(ROUNDS, max(one.rounds for one in planned))
        for number in range(rounds):
            for one in in_turn([one for one in planned if number in spread_out(one.rounds, rounds)], number):
                progress(done / whole, f"round {number + 1}: {one.arm}, {one.model}, N = {one.processes}")
                facts = running.run(one.arm, files[one.model], one.processes, one.phases, one.limit)
                found.append({"round": number, "date": time.time(), **facts})
                done += one.seconds
    return found


def in_turn(those: list[Planned], number: int) -> list[Planned]:
    """In another order each round; the arms of one model lie side by side, because the machine changes with time."""
    chance = random.Random(number)  # noqa: S311 (to be repeated)
    groups: dict[tuple[str, int], list[Planned]] = {}
    for one in those:
        groups.setdefault((one.model, one.processes), []).append(one)
    shuffled = list(groups.values())
    chance.shuffle(shuffled)
    for group in shuffled:
        chance.shuffle(group)
    return [one for group in shuffled for one in group]


def spread_out(wanted: int, rounds: int) -> set[int]:
    """Which of all rounds: those of one that is run less often lie apart."""
    wanted = min(wanted, rounds)
    return {round(at * (rounds - 1) / max(1, wanted - 1)) for at in range(wanted)}
