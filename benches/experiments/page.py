"""docs/experiments.md: its prose stands there; what was measured is put between its markers."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from report import splice

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "experiments.md"
PLOTS = DOCS / "plots"


def write(experiments: dict[str, ModuleType], results: Path) -> None:
    PLOTS.mkdir(exist_ok=True)
    for name, module in experiments.items():
        path = results / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            drawn = module.draw(found, PLOTS)
            images = "".join(f"![{Path(file).stem}](plots/{file})\n\n" for file in drawn)
            splice(PAGE, name, f"{machine(name, found)}\n\n{module.write(found)}\n\n{images}")


def machine(name: str, found: dict[str, Any]) -> str:
    facts, versions = found["machine"], found["versions"]
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    dropped = sum(run.get("dropped", 0) for run in found.get("runs", []))
    noisy = sum(run.get("noisy", False) for run in found.get("runs", []))
    beside = f"; {dropped} runs dropped for busy neighbours" if dropped else ""
    beside += f", {noisy} kept for want of a quiet one" if noisy else ""
    return (
        f"`make experiments EXPERIMENTS={name}`, {found['seconds'] / 60:.0f} minutes on {found['date']}: {facts['cpus']} CPUs "
        f"({facts['cpu']}), {facts['memory'] / 2**30:.1f} GiB, Linux {facts['kernel']}; {packages}; commit {found['commit'][:10]}{beside}."
    )
