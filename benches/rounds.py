"""How often everything is measured: BENCH_ROUNDS; and in which order."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import TypeVar

Thing = TypeVar("Thing")

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))


def shuffled(things: Iterable[Thing], number: int) -> list[Thing]:
    """Their order in that round: what one leaves behind shall not meet the same one always."""
    order = list(things)
    random.Random(number).shuffle(order)  # noqa: S311 (to be repeated)
    return order


def in_common(one: dict[int, Thing], other: dict[int, Thing]) -> tuple[list[Thing], list[Thing]]:
    """What both have of the same rounds: memory may have lacked for one of them in some."""
    rounds = sorted(one.keys() & other.keys())
    return [one[number] for number in rounds], [other[number] for number in rounds]
