"""Experiment 2: a large model, of which one copy per process does not fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import plots
import tables
from arms import ARMS
from first import equal, loads
from plan import Planned, Progress, play
from plan import seconds as planned_seconds
from spreads import (
    Facts,
    finished,
    first_cpu,
    load_cpu,
    middle,
    of,
    ratios,
    steady_cpu,
    steady_wall,
    total_cpu,
    wall,
    within,
)

GIB = 1 << 30
#: vCPU hours of the document's Experiment 2 (5,000 records, t5-large, n1-highmem-64), and who was out of memory.
PUBLISHED: dict[str, float] = {"one": 4123.431, "mps": 3466.0}
RAN_OUT = ("containers", "shared")
MODEL = os.environ.get("EXPERIMENTS_LARGE", "t5-large")
LIMIT = int(float(os.environ.get("EXPERIMENTS_LIMIT_GIB", "10")) * GIB)
N = 4
GENERATING = ((4, 2),)

PLAN = [
    *(
        Planned(arm, MODEL, N, GENERATING, seconds, 3, LIMIT)
        for arm, seconds in (("onecopy", 60), ("threads", 45), ("mps", 78))
    ),
    *(
        Planned(arm, MODEL, N, GENERATING, 58, 1, LIMIT)
        for arm in ("shared", "containers", "containers-onecopy", "one", "by-hand")
    ),
]
SECONDS = planned_seconds(PLAN) + 15


def measure(progress: Progress) -> dict[str, Any]:
    return {"model": MODEL, "runs": play(PLAN, progress)}


def write(found: dict[str, Any]) -> str:
    runs = found["runs"]
    limit, batch, calls = runs[0]["limit"] / GIB, *runs[0]["phases"][0]
    lines = []
    for arm, known in ARMS.items():
        mine = of(runs, arm=arm)
        if mine:
            lines.append(row(arm, known.title, mine, published=found["model"] == "t5-large"))
    head = (
        "", "published vCPU hours", "outcome here", "rounds", "steady wall s", "steady CPU s", "CPU s of the whole job",
        "in the kernel", "until the first load", "load", "first predictions", "wall s of the whole job", "first prediction after s",
        "peak GiB", "loads", "OOM kills", "steal, of its CPU",
    )  # fmt: skip
    ours, mps, threads = (of(runs, arm=arm) for arm in ("onecopy", "mps", "threads"))
    title = (
        f"{found['model']} through `PytorchModelHandlerTensor` and `generate`, N = {N}, {N * calls} batches of {batch}, "
        f"at most {limit:.0f} GiB."
    )
    beside = ratios(ours, threads, steady_cpu)
    one = of(runs, arm="one")
    compared = (
        f"onecopy / large_model=True: steady CPU {middle(ratios(ours, mps, steady_cpu), 2)}, steady wall {middle(ratios(ours, mps, steady_wall), 2)}, "
        f"whole job CPU {middle(ratios(ours, mps, total_cpu), 2)}, wall {middle(ratios(ours, mps, wall), 2)}. "
        f"onecopy / one process with {N} threads, steady CPU: {within(beside) or middle(beside, 3)}. "
        f"One process / large_model=True, steady wall: {middle(ratios(one, mps, steady_wall), 2)}"
    )
    compared += (
        f" (published vCPU hours: {PUBLISHED['one'] / PUBLISHED['mps']:.2f})." if found["model"] == "t5-large" else "."
    )
    return "\n\n".join([title, tables.markdown(head, lines), compared, equal(runs)])


def row(arm: str, title: str, runs: list[Facts], *, published: bool) -> list[str]:
    ended = (
        "finished" if all(map(finished, runs)) else "out of memory" if any(run["kills"] for run in runs) else "failed"
    )
    return [
        title,
        known(arm) if published else "",
        ended,
        str(len(runs)),
        middle(map(steady_wall, runs), 1),
        middle(map(steady_cpu, runs), 1),
        middle((run["cpu"] for run in runs), 1),
        middle((run["system"] for run in runs), 1),
        middle((run.get("start_cpu") for run in runs), 1),
        middle(map(load_cpu, runs), 1),
        middle(map(first_cpu, runs), 1),
        middle((run["wall"] for run in runs), 1),
        middle((run.get("first") for run in runs), 1),
        middle((run["peak"] / GIB for run in runs if run["peak"]), 2),
        loads(runs),
        " or ".join(map(str, sorted({run["kills"] or 0 for run in runs}))),
        f"{max(run['stolen'] / run['cpu'] for run in runs):.0%}",
    ]


def known(arm: str) -> str:
    if arm in RAN_OUT:
        return "out of memory"
    return f"{PUBLISHED[arm]:,.0f}" if arm in PUBLISHED else ""


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    """CPU and peak of each arm."""
    figure, (left, right) = plots.plt.subplots(1, 2, sharey=True, figsize=(9, 3.6))
    arms = [arm for arm in ARMS if of(found["runs"], arm=arm)]
    for place, arm in enumerate(arms):
        runs = of(found["runs"], arm=arm)
        colour = "C3" if arm == "onecopy" else "C0" if all(map(finished, runs)) else "0.7"
        left.barh(place, sum(run["cpu"] for run in runs) / len(runs), color=colour)
        left.plot([run["cpu"] for run in runs], [place] * len(runs), "k.", markersize=3)
        right.barh(place, max(run["peak"] or 0 for run in runs) / GIB, color=colour)
    left.set_yticks(range(len(arms)), [ARMS[arm].title for arm in arms])
    left.invert_yaxis()
    left.set(xlabel="CPU s, all (grey: killed)")
    right.axvline(found["runs"][0]["limit"] / GIB, color="k", linestyle=":", label="limit")
    right.set(xlabel="peak GiB")
    return [plots.save(figure, right, folder, "experiment-2")]
