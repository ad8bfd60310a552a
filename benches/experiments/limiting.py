"""The smallest machine: the memory limit under which each arm just finishes, found by bisection.

It begins where a run without a limit had its peak.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plots
import tables
from arms import ARMS
from plan import Progress
from spreads import finished, of
from starting import COMPARED, COUNTS, MODEL

import running

MIB = 1 << 20
#: Halvings of what lies between this much below the peak and this much above.
BELOW, ABOVE, STEPS = 0.16, 0.08, 2
PHASES = ((1, 4),)
#: A killed job is one that may hang for a while.
SECONDS = 1.15 * len(COMPARED) * sum(seconds * (1.4 + STEPS) for seconds in COUNTS.values())


def measure(progress: Progress) -> dict[str, Any]:
    if not running.counted():
        return {"model": MODEL, "runs": [], "size": 0, "left out": "no memory cgroup can be made here"}
    runs: list[dict[str, Any]] = []
    cells = [(arm, count) for count in COUNTS for arm in COMPARED]
    weight = sum(COUNTS[count] for _, count in cells) + sum(COUNTS.values())
    done = 0.0
    with running.prepared(MODEL, "nothing") as files:

        def tried(arm: str, model: str, count: int, limit: int | None = None) -> dict[str, Any]:
            progress(
                done / weight, f"{arm}, {model}, N = {count}, {f'{limit / MIB:,.0f} MiB' if limit else 'no limit'}"
            )
            # What is timed here is nothing: neighbours do not matter.
            return running.run(arm, files[model], count, PHASES, limit, repeats=0)

        size = files[MODEL].weights.stat().st_size
        without = {}
        for count in COUNTS:
            without[str(count)] = tried("shared", "nothing", count)["peak"]
            done += COUNTS[count]
        for arm, count in cells:
            runs.append(tried(arm, MODEL, count))
            peak = runs[-1]["peak"]
            low, high = int(peak * (1 - BELOW)), int(peak * (1 + ABOVE))
            for _ in range(STEPS):
                middle = (low + high) // 2
                runs.append(tried(arm, MODEL, count, middle))
                if finished(runs[-1]):
                    high = middle
                else:
                    low = middle
            done += COUNTS[count]
    return {"model": MODEL, "runs": runs, "size": size, "without": without}


def bounds(found: dict[str, Any], arm: str, count: int) -> tuple[float | None, float | None, float]:
    """MiB: the most that was too little, the least that was enough, and the peak without a limit."""
    runs = of(found["runs"], arm=arm, processes=count)
    peak = next(run["peak"] for run in runs if run["limit"] is None) / MIB
    limited = [run for run in runs if run["limit"] is not None]
    too_little = [run["limit"] / MIB for run in limited if not finished(run)]
    enough = [run["limit"] / MIB for run in limited if finished(run)]
    return max(too_little, default=None), min(enough, default=None), peak


def physics(found: dict[str, Any], count: int) -> float:
    """MiB: what the same job takes without a model, and the model once."""
    return float(found["without"][str(count)] + found["size"]) / MIB


def write(found: dict[str, Any]) -> str:
    if not found["runs"]:
        return f"Left out: {found['left out']}."
    lines = []
    for count in COUNTS:
        row = [str(count)]
        for arm in COMPARED:
            too_little, enough, peak = bounds(found, arm, count)
            row += [
                f"{enough:,.0f}" if enough else "more",
                f"{too_little:,.0f}" if too_little else "",
                f"{peak:,.0f}",
            ]
        lines.append([*row, f"{physics(found, count):,.0f}"])
    head = ["N"]
    for arm in COMPARED:
        head += [f"{ARMS[arm].title.removeprefix('N processes, ')}: MiB enough", "too little", "peak without a limit"]
    head.append("what physics allows: the job without a model, and the model once")
    return f"{found['model']}, a file of {found['size'] / MIB:,.0f} MiB.\n\n{tables.markdown(head, lines)}"


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    if not found["runs"]:
        return []
    figure, axes = plots.plt.subplots()
    for arm in COMPARED:
        points = []
        for count in COUNTS:
            _, enough, peak = bounds(found, arm, count)
            points.append((count, enough or peak))
        plots.draw_line(axes, "onecopy" if arm == "onecopy" else ARMS[arm].title, points)
    limit = [(count, physics(found, count)) for count in COUNTS]
    axes.plot(*zip(*limit, strict=True), "k:", label="the job without a model, and the model once")
    axes.set(xlabel="processes", ylabel="MiB that are enough", ylim=(0, None))
    return [plots.save(figure, axes, folder, "experiments-limit")]
