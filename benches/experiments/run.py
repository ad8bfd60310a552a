"""`make experiments`: all of them, or those named: `python benches/experiments/run.py 1 limit`.

Results go to benches/results/experiments, tables and plots from there to docs/experiments.md.
"""

from __future__ import annotations

from paths import LOOK, RESULTS  # isort: skip (before what lies elsewhere)

import argparse
import importlib
import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import page
from ending import end_well
from machine import described

import running

HERE = Path(__file__).parent
EXPERIMENTS = {
    "1": "first",
    "pairs": "pairs",
    "2": "second",
    "start": "starting",
    "limit": "limiting",
    "death": "death",
    "gil": "gil",
}
PACKAGES = ("apache-beam", "torch", "transformers", "tensorflow-cpu", "keras", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(EXPERIMENTS), metavar="|".join(EXPERIMENTS))
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page anew from the results")
    options = parser.parse_args()
    if unknown := set(options.names) - set(EXPERIMENTS):
        parser.error(f"there is no experiment {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    end_well()
    modules = {name: importlib.import_module(module) for name, module in EXPERIMENTS.items()}
    if not options.page:
        measure({name: modules[name] for name in options.names})
    if LOOK:
        print(*(page.section(name, modules[name], RESULTS) for name in options.names), sep="\n\n")
    else:
        page.write(modules, RESULTS)


def measure(chosen: dict[str, ModuleType]) -> None:
    if not running.counted():
        print("No cgroups can be made here: memory limits and peaks are left out, and CPU is what the processes say.")
    RESULTS.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    left = sum(module.SECONDS for module in chosen.values())
    for name, module in chosen.items():

        def progress(done: float, what: str, name: str = name, left: float = left, module: ModuleType = module) -> None:
            gone, rest = time.monotonic() - began, left - done * module.SECONDS
            print(f"{clock(gone)} gone, about {clock(rest)} left. {name}: {what}", flush=True)

        start = time.monotonic()
        before = about()
        found = module.measure(progress)
        left -= module.SECONDS
        facts = {"seconds": time.monotonic() - start, **before, **found}
        (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
    print(f"{clock(time.monotonic() - began)} in all.")


def clock(seconds: float) -> str:
    return f"{int(max(0, seconds)) // 60}:{int(max(0, seconds)) % 60:02}"


def about() -> dict[str, Any]:
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=10"]
    commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True, check=False).stdout
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "machine": {**described(), "cpu": next((line.split(": ")[1] for line in lines if "model name" in line), "?")},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "commit": commit.strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


if __name__ == "__main__":
    main()
