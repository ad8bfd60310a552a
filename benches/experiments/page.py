"""docs/experiments.md: its prose stands there; what was measured is put between its markers."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from report import splice

import running

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "experiments.md"
PLOTS = DOCS / "plots"


def write(experiments: dict[str, ModuleType], results: Path) -> None:
    """All that have been measured."""
    PLOTS.mkdir(exist_ok=True)
    for name, module in experiments.items():
        if (results / f"{name}.json").exists():
            drawn = module.draw(read(name, results), PLOTS)
            images = "".join(f"![{Path(file).stem}](plots/{file})\n\n" for file in drawn)
            splice(PAGE, name, f"{section(name, module, results)}\n\n{images}")


def section(name: str, module: ModuleType, results: Path) -> str:
    found = read(name, results)
    return f"{machine(name, found)}\n\n{module.write(found)}"


def read(name: str, results: Path) -> Any:
    return json.loads((results / f"{name}.json").read_text())


def machine(name: str, found: dict[str, Any]) -> str:
    facts, versions = found["machine"], found["versions"]
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    return (
        f"`make experiments EXPERIMENTS={name}`, {found['seconds'] / 60:.0f} minutes on {found['date']}: {facts['cpus']} CPUs "
        f"({facts['cpu']}), {facts['memory'] / 2**30:.1f} GiB, Linux {facts['kernel']}; {packages}; commit {found['commit']}."
        f"{neighbours([run for run in found.get('runs', []) if 'dropped' in run])}"
    )


def neighbours(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return ""
    most = max(run["neighbours"] / run["cpu"] for run in runs)
    stolen = max(run["stolen"] / run["cpu"] for run in runs)
    loud = sum(not running.quiet(run) for run in runs)
    return (
        f" {len(runs)} runs; {sum(run['dropped'] for run in runs)} more were dropped for their neighbours, {loud} kept though every repetition "
        f"had some; neighbours took at most {most:.1%} of a run's CPU time, the host (steal) {stolen:.1%}."
    )
