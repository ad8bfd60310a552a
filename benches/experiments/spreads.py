"""What the tables say of many rounds: the middle, how far they lie apart, and ratios of arms that ran in the same round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from interval import interval

Facts = dict[str, Any]


def of(runs: Iterable[Facts], **wanted: Any) -> list[Facts]:
    """Those with these values."""
    return [run for run in runs if all(run[name] == value for name, value in wanted.items())]


def ratios(runs: Iterable[Facts], other: Iterable[Facts], value: Callable[[Facts], float | None]) -> list[float]:
    """value / value of the other arm's run in the same round."""
    beside = {run["round"]: value(run) for run in other}
    found = []
    for run in runs:
        mine, theirs = value(run), beside.get(run["round"])
        if mine is not None and theirs:
            found.append(mine / theirs)
    return found


def middle(values: Iterable[float | None], digits: int = 1) -> str:
    """Median (least to most)."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{statistics.median(known):,.{digits}f}"
    return text if len(known) == 1 else f"{text} ({min(known):,.{digits}f} to {max(known):,.{digits}f})"


def within(values: list[float]) -> str:
    """The interval in words, where there is one."""
    if len(values) < 3:
        return ""
    low, mean, high = interval(values)
    return f"{mean:.3f}, 95 % interval {low:.3f} to {high:.3f} ({len(values)} rounds)"


def steady_cpu(run: Facts) -> float | None:
    return sum(phase["cpu"] for phase in run["steady"]) if finished(run) else None


def steady_wall(run: Facts) -> float | None:
    return sum(phase["wall"] for phase in run["steady"]) if finished(run) else None


def total_cpu(run: Facts) -> float | None:
    return run["cpu"] if finished(run) else None


def load_cpu(run: Facts) -> float | None:
    """From the first load's begin until all are ready: what else they do meanwhile is in it."""
    return run["ready_cpu"] - run["start_cpu"] if "ready_cpu" in run else None


def first_cpu(run: Facts) -> float | None:
    """From all models there until all have made their first predictions."""
    return run["first_cpu"] - run["ready_cpu"] if "ready_cpu" in run and run.get("first_cpu") else None


def wall(run: Facts) -> float | None:
    return run["wall"] if finished(run) else None


def finished(run: Facts) -> bool:
    return run["rc"] == 0
