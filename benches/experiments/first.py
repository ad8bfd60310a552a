"""Experiment 1: small models, where one copy per machine saves little and every call through a proxy costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plots
import tables
from arms import ARMS
from plan import ROUNDS, Planned, Progress, play
from plan import seconds as planned_seconds
from spreads import Facts, finished, first_cpu, load_cpu, middle, of, ratios, steady_cpu, steady_wall, total_cpu, within

#: vCPU hours of the document's Experiment 1 (100,000 images on Dataflow, mean of three), by our arm.
PUBLISHED = {"one": 4.491, "containers": 4.052, "shared": 3.907, "mps": 4.749}
N = 2
IMAGES = ((1, 16), (4, 8), (16, 3))
SENTENCES = ((1, 50), (16, 6))
CALLS = ((1, 1500),)
#: (model, processes, phases)
SETS = [("MobileNetV2", N, IMAGES), ("MiniLM", N, SENTENCES), ("tiny", N, CALLS), ("MiniLM", 1, SENTENCES)]
LOCKED, UNSHAREABLE = "tiny, with a lock", "tiny, with a generator"

PLAN = [
    *(Planned(arm, *SETS[0], 21, ROUNDS) for arm in ("shared", "onecopy")),
    Planned("mps", *SETS[0], 22, 2),
    *(Planned(arm, *SETS[0], 20) for arm in ("one", "threads", "containers", "containers-onecopy")),
    *(Planned(arm, *SETS[1], 17, ROUNDS) for arm in ("shared", "onecopy")),
    Planned("mps", *SETS[1], 17),
    *(Planned(arm, *SETS[2], 12, ROUNDS) for arm in ("shared", "onecopy")),
    Planned("mps", *SETS[2], 16, 2),
    Planned("off", *SETS[2], 12),
    *(Planned(arm, model, N, CALLS, 12) for model in (LOCKED, UNSHAREABLE) for arm in ("shared", "onecopy")),
    Planned("shared", "nothing", N, CALLS, 11),
    *(Planned(arm, *SETS[3], 13, ROUNDS) for arm in ("shared", "onecopy")),
]
SECONDS = planned_seconds(PLAN)


def measure(progress: Progress) -> dict[str, Any]:
    return {"runs": play(PLAN, progress)}


def write(found: dict[str, Any]) -> str:
    runs = found["runs"]
    text = [published(of(runs, model="MobileNetV2"))]
    for model, processes, _ in SETS:
        mine = of(runs, model=model, processes=processes)
        if mine:
            text.append(details(model, processes, mine))
    return "\n\n".join([*text, controls(runs)])


def published(runs: list[Facts]) -> str:
    """The document's table, ours beside it."""
    shared = of(runs, arm="shared")
    lines = []
    for arm, known in ARMS.items():
        mine = of(runs, arm=arm)
        if not mine:
            continue
        hours = PUBLISHED.get(arm)
        lines.append([
            known.title,
            str(len(mine)),
            f"{hours:.3f}" if hours else "",
            f"{hours / PUBLISHED['shared']:.2f}" if hours else "",
            middle((total_cpu(run) for run in mine), 1),
            middle(ratios(mine, shared, total_cpu), 2),
            middle((run.get("start_cpu") for run in mine), 1),
            middle(map(load_cpu, mine), 1),
            middle(map(first_cpu, mine), 1),
            middle(map(steady_cpu, mine), 1),
            middle(ratios(mine, shared, steady_cpu), 2),
            middle(ratios(mine, shared, steady_wall), 2),
            middle((run.get("first") for run in mine), 1),
            middle((run["peak"] / 2**20 for run in mine if run["peak"]), 0),
            loads(mine),
        ])  # fmt: skip
    head = (
        "", "rounds", "published vCPU hours", "its ratio to shared.py", "here: CPU s of the whole job", "ratio", "until the first load",
        "load", "first predictions", "steady CPU s", "ratio", "steady wall, ratio", "first prediction after s", "peak MiB", "loads",
    )  # fmt: skip
    return (
        f"MobileNetV2 (Keras) through `TFModelHandlerTensor`, N = {N}; each figure is the median of its rounds (least to most); a ratio is of runs of the same round.\n\n"
        f"{tables.markdown(head, lines)}\n\n{equal(runs)}"
    )


def details(model: str, processes: int, runs: list[Facts]) -> str:
    """CPU of a call, by batch."""
    shared = of(runs, arm="shared")
    phases = runs[0]["phases"]
    lines = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = of(runs, arm=arm)
        line = [ARMS[arm].title.replace("N processes", f"{processes} process" + "es" * (processes > 1))]
        for at in range(len(phases)):
            line += [middle(map(per_call(at), mine), 2), middle(ratios(mine, shared, per_call(at)), 3)]
        line += [middle(ratios(mine, shared, steady_cpu), 3), middle(ratios(mine, shared, total_cpu), 3), loads(mine)]
        lines.append(line)
    head = ["CPU ms a call"]
    for batch, _ in phases:
        head += [f"batch {batch}", "to shared.py"]
    text = tables.markdown([*head, "all steady ones", "start and load too", "loads"], lines)
    ours = of(runs, arm="onecopy")
    title = (
        f"**{model}, N = {processes}.** onecopy / shared.py: steady CPU {within(ratios(ours, shared, steady_cpu))}; "
        f"total CPU {within(ratios(ours, shared, total_cpu))}."
    )
    return "\n\n".join([title, text, equal(runs)])


def controls(runs: list[Facts]) -> str:
    """What says whether the harness itself, or the wrapper where it does not share, costs anything."""
    rows = (
        ("no model: the job alone", "nothing", "shared", "nothing"),
        ("tiny, onecopy switched off, to shared.py", "tiny", "off", "tiny"),
        (
            "tiny with a lock in it (Beam's pickler makes it anew: shared), onecopy, to shared.py",
            LOCKED,
            "onecopy",
            LOCKED,
        ),
        ("tiny with a generator in it (cannot be shared), onecopy, to shared.py", UNSHAREABLE, "onecopy", UNSHAREABLE),
    )
    lines = []
    for title, model, arm, beside in rows:
        mine = of(runs, model=model, arm=arm)
        if mine:  # results of an earlier plan may lack one
            against = ratios(mine, of(runs, model=beside, arm="shared"), steady_cpu)
            lines.append([
                title, middle(map(total_cpu, mine), 1), middle(against, 3) if model != "nothing" else "",
                middle((run["wall"] for run in mine), 1), loads(mine),
            ])  # fmt: skip
    return "**Controls.**\n\n" + tables.markdown(["", "CPU s, all", "steady CPU, ratio", "wall s", "loads"], lines)


def per_call(phase: int) -> Callable[[Facts], float | None]:
    """CPU milliseconds."""

    def value(run: Facts) -> float | None:
        if len(run["steady"]) <= phase:
            return None
        one = run["steady"][phase]
        return 1000 * float(one["cpu"]) / float(one["calls"])

    return value


def loads(runs: list[Facts]) -> str:
    return " or ".join(map(str, sorted({run["loads"] for run in runs})))


def equal(runs: list[Facts]) -> str:
    """Only where two arms at least have finished is anything compared."""
    digests = {run["digest"] for run in runs if finished(run)}
    arms = len({run["arm"] for run in runs if finished(run)})
    if len(digests) == 1 and arms > 1 and digests != {0}:
        return f"The outputs of the {arms} arms that finished are equal, bit by bit."
    return f"THE OUTPUTS ARE NOT EQUAL, or there is nothing to compare: {len(digests)} digests in {arms} arms."


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    """CPU of a call of each arm, in calls of shared.py."""
    figure, axes = plots.plt.subplots()
    sets = [(model, processes) for model, processes, _ in SETS if of(found["runs"], model=model, processes=processes)]
    arms = ("shared", "mps", "onecopy")
    for at, arm in enumerate(arms):
        for place, (model, processes) in enumerate(sets):
            runs = of(found["runs"], model=model, processes=processes)
            values = ratios(of(runs, arm=arm), of(runs, arm="shared"), steady_cpu)
            if values:
                label = ARMS[arm].title if place == 0 else None
                axes.barh(place + (at - 1) * 0.27, statistics.median(values), 0.25, color=f"C{at}", label=label)
                axes.plot(values, [place + (at - 1) * 0.27] * len(values), "k.", markersize=3)
    axes.axvline(1, color="k", linestyle=":")
    axes.set_yticks(range(len(sets)), [f"{model}, N = {processes}" for model, processes in sets])
    axes.invert_yaxis()
    axes.set(xlabel="steady CPU, shared.py = 1 (points: rounds)")
    return [plots.save(figure, axes, folder, "experiment-1")]
