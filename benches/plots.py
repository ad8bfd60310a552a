"""Plots of the results: SVG, small, the same bytes for the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

mpl.rcParams.update({
    "svg.hashsalt": "onecopy", "svg.fonttype": "none", "font.size": 9, "figure.figsize": (7.5, 4.2), "axes.grid": True,
    "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8,
})  # fmt: skip
OURS = "onecopy"


def draw(rows: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """The files' names, by row."""
    folder.mkdir(exist_ok=True)
    found: dict[str, list[str]] = {}
    if "attach" in rows:
        found["attach"] = [attach_by_size(rows["attach"], folder), *inferences(rows["attach"], folder)]
    for name, plot in (("memory", memory), ("throughput", throughput)):
        if name in rows:
            found[name] = [plot(rows[name], folder)]
    for name, table in rows.get("growth", {}).get("tables", {}).items():
        found[f"growth {name}"] = [growth(name, table, folder)]
    return found


def attach_by_size(row: Any, folder: Path) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    limit = {}
    for case in row["cases"]:
        if case["group"].endswith("MiB"):
            mib = case["size"] / 2**20
            # What chance has made less than nothing has no place on this scale; the table has it.
            if case["seconds"][2] > 0:
                lines.setdefault(case["case"], []).append((mib, case["seconds"][2] * 1000))
            if case["limit"]:
                limit[mib] = case["limit"][2] * 1000
    figure, axes = plt.subplots()
    for name, points in lines.items():
        draw_line(axes, name, sorted(points))
    axes.plot(*zip(*sorted(limit.items()), strict=True), "k:", label="limit: mapping, touching") if limit else None
    axes.set(xscale="log", yscale="log", xlabel="MiB of weights", ylabel="ms until inference is steady")
    return save(figure, axes, folder, "attach-by-size")


def inferences(row: Any, folder: Path) -> list[str]:
    names = []
    for group in dict.fromkeys(case["group"] for case in row["cases"] if not case["group"].endswith("MiB")):
        cases = sorted((case for case in row["cases"] if case["group"] == group), key=lambda case: case["seconds"][2])
        figure, axes = plt.subplots()
        for at, (part, label) in enumerate(
            (("attach", "attach"), ("first", "first inference"), ("steady", "a later one"))
        ):
            places = [number + (at - 1) * 0.27 for number in range(len(cases))]
            axes.barh(places, [case["parts"][part][2] * 1000 for case in cases], 0.25, label=label)
        axes.set_yticks(range(len(cases)), [case["case"] for case in cases])
        axes.invert_yaxis()
        axes.set(xscale="log", xlabel="ms", title=group.removeprefix("attach "))
        names.append(save(figure, axes, folder, f"first-{group.removeprefix('attach ')}".lower()))
    return names


def memory(row: Any, folder: Path) -> str:
    figure, axes = plt.subplots()
    for name, points in by_count(row, lambda case: case["memory"][2] / 2**20).items():
        draw_line(axes, name, points)
    axes.axhline(row["cases"][0]["size"] / 2**20, color="k", linestyle=":", label="the weights once")
    axes.set(xscale="log", yscale="log", xlabel="processes", ylabel="MiB in all")
    counts(axes, row)
    return save(figure, axes, folder, "memory")


def throughput(row: Any, folder: Path) -> str:
    figure, axes = plt.subplots()
    for name, points in by_count(row, lambda case: 1 / case["seconds"][2]).items():
        draw_line(axes, name, points)
    axes.set(xlabel="processes", ylabel="inferences a second, all together", ylim=(0, None))
    counts(axes, row)
    return save(figure, axes, folder, "throughput")


def growth(name: str, table: Any, folder: Path) -> str:
    figure, axes = plt.subplots()
    for at in table["drawn"]:
        draw_line(axes, table["columns"][at], [(row[0], row[at]) for row in table["rows"]], ours=False)
    axes.set(xscale="log", yscale="log", xlabel=table["columns"][0], ylabel="ms")
    return save(figure, axes, folder, f"growth-{name}")


def by_count(row: Any, value: Any) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for case in row["cases"]:
        name, _, count = case["case"].rpartition(", ")
        found.setdefault(name, []).append((int(count), value(case)))
    return {name: sorted(points) for name, points in found.items()}


def counts(axes: Any, row: Any) -> None:
    ticks = sorted({int(case["case"].rpartition(", ")[2]) for case in row["cases"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def draw_line(axes: Any, name: str, points: list[tuple[float, float]], *, ours: bool = True) -> None:
    thick = {"linewidth": 2.6, "color": "C3", "zorder": 5} if ours and name == OURS else {"linewidth": 1.2}
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **thick)


def save(figure: Any, axes: Any, folder: Path, name: str) -> str:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    file = f"{name.replace(' ', '-')}.svg"
    figure.savefig(folder / file, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return file
