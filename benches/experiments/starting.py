"""Start: seconds until the first prediction, and until all processes have predicted; the CPU that it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plots
import tables
from arms import ARMS
from paths import RESULTS
from plan import Planned, Progress, play
from plan import seconds as planned_seconds
from spreads import load_cpu, middle, of

#: torch alone, half a GiB: what is loaded counts, beside Beam's imports.
MODEL = "linears-512"
COUNTS = {1: 12, 2: 12, 4: 21, 8: 42}
PHASES = ((1, 4),)
COMPARED = ("shared", "mps", "onecopy")
PLAN = [Planned(arm, MODEL, count, PHASES, seconds) for arm in COMPARED for count, seconds in COUNTS.items()]
SECONDS = planned_seconds(PLAN)


def measure(progress: Progress) -> dict[str, Any]:
    return {"model": MODEL, "runs": play(PLAN, progress)}


def peaks() -> dict[tuple[str, int], int]:
    """Bytes, by arm and processes, of the last time that this was measured."""
    runs = json.loads((RESULTS / "start.json").read_text())["runs"]
    return {(run["arm"], run["processes"]): run["peak"] for run in runs}


def write(found: dict[str, Any]) -> str:
    lines = []
    for count in COUNTS:
        for arm in COMPARED:
            runs = of(found["runs"], arm=arm, processes=count)
            lines.append([
                ARMS[arm].title.removeprefix("N processes, "),
                str(count),
                *(middle((run.get(name) for run in runs), 1) for name in ("first", "all_first", "first_cpu", "start_cpu")),
                middle(map(load_cpu, runs), 1),
                middle((run["peak"] / 2**20 for run in runs if run["peak"]), 0),
                " or ".join(map(str, sorted({run["loads"] for run in runs}))),
            ])  # fmt: skip
    head = (
        found["model"], "N", "first prediction after s", "all have predicted after s", "CPU s until then",
        "CPU s until the first load (imports)", "CPU s of loading", "peak MiB", "loads",
    )  # fmt: skip
    return tables.markdown(head, lines)


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    figure, (left, right) = plots.plt.subplots(1, 2, figsize=(9, 3.6))
    for arm in COMPARED:
        for axes, name in ((left, "all_first"), (right, "first_cpu")):
            known = {count: of(found["runs"], arm=arm, processes=count) for count in COUNTS}
            points = [(count, run[name]) for count, runs in known.items() for run in runs if run.get(name)]
            plots.draw_line(axes, "onecopy" if arm == "onecopy" else ARMS[arm].title, points)
    for axes, what in ((left, "s until all have predicted"), (right, "CPU s until then")):
        axes.set(xlabel="processes", ylabel=what, ylim=(0, None))
        axes.set_xticks(list(COUNTS), list(map(str, COUNTS)))
    return [plots.save(figure, right, folder, "experiments-start")]
