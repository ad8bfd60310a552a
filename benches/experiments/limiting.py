"""The smallest machine: the memory limit under which each arm just finishes, and what a job does under less.

It begins at the peaks that the runs without a limit had (`starting.py`, which runs first), and goes down in steps until a job is
killed, or up until one finishes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import plots
import starting
import tables
from arms import ARMS
from plan import Progress
from spreads import finished, of
from starting import COMPARED, COUNTS, MODEL, PHASES

import running

MIB = 1 << 20
#: Of the peak without a limit; and how many are tried at most, where a job takes long and where it does not.
STEP, STEPS, FEW = 0.06, 6, 1
#: What a job that is killed is given: so much of its peak, with so many processes, to see what it does then.
TOO_LITTLE, KILLED_WITH = 0.8, 2
SECONDS = 1.2 * len(COMPARED) * (2.2 * sum(COUNTS.values()) - 1.2 * max(COUNTS.values())) + 150
#: Seconds until a job whose worker was killed counts as one that has failed.
HOPELESS = 5.0


def measure(progress: Progress) -> dict[str, Any]:
    if not running.counted():
        return {"model": MODEL, "runs": [], "left out": "no memory cgroup can be made here"}
    runs: list[dict[str, Any]] = []
    cells = [(arm, count) for count in COUNTS for arm in COMPARED]
    ends = (min(COUNTS), max(COUNTS))
    weight = SECONDS / 1.2
    done = 0
    peaks = starting.peaks()
    with running.prepared(MODEL, "nothing") as files:

        def tried(arm: str, model: str, count: int, limit: int | None = None, **more: Any) -> dict[str, Any]:
            nonlocal done
            progress(
                min(1, done / weight),
                f"{arm}, {model}, N = {count}, {f'{limit / MIB:,.0f} MiB' if limit else 'no limit'}",
            )
            done += COUNTS[count]
            # What is timed here is nothing: neighbours do not matter.
            return running.once(arm, files[model], count, PHASES, limit, **more)

        without = {str(count): tried("shared", "nothing", count)["peak"] for count in ends}
        for arm, count in cells:
            runs += walked(
                peaks[arm, count],
                lambda limit, arm=arm, count=count: tried(arm, MODEL, count, limit, hopeless=HOPELESS),
                FEW if count == max(COUNTS) else STEPS,
            )
        killed = [
            tried(arm, MODEL, KILLED_WITH, int(peaks[arm, KILLED_WITH] * TOO_LITTLE), together=False)
            for arm in COMPARED
        ]
        size = files[MODEL].weights.stat().st_size
    return {"model": MODEL, "size": size, "without": without, "runs": runs, "killed": killed}


def walked(peak: int, tried: Callable[[int], dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Runs, a step of the limit apart, until one is known that is enough and one that is not."""
    runs = [tried(int(peak * (1 - STEP)))]
    direction = -1 if finished(runs[0]) else 1
    for step in range(1, steps):
        runs.append(tried(int(peak * (1 - STEP + direction * step * STEP))))
        if finished(runs[-1]) != finished(runs[0]):
            break
    return runs


def bounds(found: dict[str, Any], arm: str, count: int) -> tuple[float | None, float | None]:
    """MiB: the most under which the kernel killed, and the least that was enough."""
    runs = of(found["runs"], arm=arm, processes=count)
    too_little = [run["limit"] / MIB for run in runs if not finished(run) and run["kills"]]
    enough = [run["limit"] / MIB for run in runs if finished(run)]
    return max(too_little, default=None), min(enough, default=None)


def physics(found: dict[str, Any], count: int) -> float:
    """MiB: what the same job takes without a model, which grows with every process by as much, and the model once."""
    (least, first), (most, last) = ((int(number), peak) for number, peak in found["without"].items())
    return float(first + (last - first) * (count - least) / (most - least) + found["size"]) / MIB


def write(found: dict[str, Any]) -> str:
    if "left out" in found:
        return f"Left out: {found['left out']}."
    lines = []
    for count in COUNTS:
        row = [str(count)]
        for arm in COMPARED:
            row += [f"{limit:,.0f}" if limit else "" for limit in bounds(found, arm, count)]
        lines.append([*row, f"{physics(found, count):,.0f}"])
    head = ["N"]
    for arm in COMPARED:
        head += [f"{ARMS[arm].title.removeprefix('N processes, ')}: killed, MiB", "enough"]
    head.append("the job without a model (N between the ends: interpolated), and the model once")
    title = (
        f"{found['model']}, a file of {found['size'] / MIB:,.0f} MiB; one walk for each, in steps of {STEP:.0%} of the peak without a limit, "
        f"which is one run's: so good is the answer. A job counts as failed {HOPELESS:.0f} s after its last kill."
    )
    return "\n\n".join([title, tables.markdown(head, lines), after_a_kill(found["killed"])])


def after_a_kill(runs: list[dict[str, Any]]) -> str:
    lines = [
        [
            ARMS[run["arm"]].title, f"{run['limit'] / MIB:,.0f}", str(run["kills"]), str(run["loads"]), str(run["predicted"]),
            "ended by itself" if run["how"] == "ended by itself" else "hung, ended by the harness",
        ]
        for run in runs
    ]  # fmt: skip
    head = ("", "limit MiB", "killed", "loads begun", "workers that predicted", "the job")
    return (
        f"What a whole job does when workers of it are killed for lack of memory, N = {KILLED_WITH}, {TOO_LITTLE:.0%} of the peak "
        f"(a job that has not ended {running.AFTER_A_KILL:.0f} s after the last kill hangs). The local runner waits for a worker that is no more; "
        f"that says nothing for or against an arm.\n\n{tables.markdown(head, lines)}"
    )


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    if "left out" in found:
        return []
    figure, axes = plots.plt.subplots()
    for arm in COMPARED:
        # Where nothing that was tried was enough, the line has no point.
        points = [(count, enough) for count in COUNTS if (enough := bounds(found, arm, count)[1])]
        plots.draw_line(axes, "onecopy" if arm == "onecopy" else ARMS[arm].title, points)
    limit = [(count, physics(found, count)) for count in COUNTS]
    axes.plot(*zip(*limit, strict=True), "k:", label="the job without a model, and the model once")
    axes.set(xlabel="processes", ylabel="MiB that are enough", ylim=(0, None))
    axes.set_xticks(list(COUNTS), list(map(str, COUNTS)))
    return [plots.save(figure, axes, folder, "experiments-limit")]
