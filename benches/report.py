"""Tables and plots from a run: `python benches/report.py target/bench.json`.

Each row's summary goes to benches/results, so a run of some rows leaves the others as they were; benches/README.md and the
plots are made of what lies there.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import plots
import tables

HERE = Path(__file__).parent
#: A quick look is nobody's result but the looker's.
LOOK = "BENCH_LOOK" in os.environ
RESULTS = HERE.parent / "target/bench-look" if LOOK else HERE / "results"
README = HERE / "README.md"


def main() -> int:
    if LOOK:
        shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for path in sys.argv[1:]:
        keep(json.loads(Path(path).read_text()))
    rows = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    if LOOK:
        print(tables.write(rows, {}))
        return 0
    drawn = plots.draw(rows, HERE / "plots")
    splice(README, "tables", tables.write(rows, drawn))
    if "growth" in rows:
        splice(README, "growth", tables.write_growth(rows["growth"], drawn))
    return 0


def keep(run: dict[str, Any]) -> None:
    """One file a row, small enough to be read. Of some rows there is nothing but why it is not there."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for case in run["benchmarks"]:
        rows.setdefault(row_of(case["group"]), []).append(summary(case["group"], case["extra_info"]))
    about = {name: run[name] for name in ("machine", "peers", "datetime")} | {"onecopy": run["commit_info"].get("id")}
    for row in rows.keys() | {row_of(one["group"]) for one in run["cannot"]}:
        absent = [one for one in run["cannot"] if row_of(one["group"]) == row]
        text = json.dumps({**about, "cases": rows.get(row, []), "cannot": absent}, indent=1)
        (RESULTS / f"{row}.json").write_text(text + "\n")


def row_of(group: str) -> str:
    """Its first word; what follows is the model."""
    return group.partition(" ")[0]


def summary(group: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Spreads of what was measured round by round; `ours` are of the same rounds."""
    facts = dict(facts)
    seconds, ours, parts = facts.pop("seconds"), facts.pop("ours", None), facts.pop("parts", None)
    kept = {"group": group, "case": facts.pop("case"), "rounds": len(seconds), "seconds": spread(seconds)}
    if ours is not None:
        kept |= beside(seconds, [round(other, 9) for other in ours])
    if parts is not None:
        kept["parts"] = {name: spread(values) for name, values in parts["peer"].items() if values}
        inferences = list(zip(parts["peer"]["first"], parts["peer"]["steady"], strict=True))
        kept["later"] = spread([first - steady for first, steady in inferences])
        kept["first_to_steady"] = spread([first / steady for first, steady in inferences])
        with_pages = [pages_too(parts[of]) for of in ("peer", "ours")]
        if all(with_pages):
            kept["with_pages"] = beside(*with_pages)
    for name, value in facts.items():
        kept[name] = spread(value) if isinstance(value, list) and name != "interval" and value else value
    return kept


def beside(values: list[float], ours: list[float]) -> dict[str, Any]:
    """How much more than ours, in each round, and how many times as much.

    What is a difference itself can be less than nothing by chance: then there is no quotient of a round, and one of all rounds
    only where both add up to something.
    """
    pairs = list(zip(values, ours, strict=True))
    found: dict[str, Any] = {"ours": spread(ours), "beyond_ours": spread([own - other for own, other in pairs])}
    if min(ours) > 0:
        found["ratio"] = spread([own / other for own, other in pairs])
    if sum(ours) > 0 and sum(values) > 0:
        found["ratio_of_sums"] = float(f"{sum(values) / sum(ours):.5g}")
    return found


def pages_too(parts: dict[str, list[float]]) -> list[float]:
    """Attaching, and what the pages cost when they are first read; nothing where they were not read."""
    return [attach + pages for attach, pages in zip(parts["attach"], parts["pages"], strict=bool(parts["pages"]))]


def spread(values: list[float]) -> list[float]:
    """Least, lower quartile, median, upper quartile, most."""
    if len(values) == 1:
        return values * 5
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [float(f"{value:.5g}") for value in (min(values), low, middle, high, max(values))]


def splice(page: Path, name: str, text: str) -> None:
    """Between the markers of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    assert after, f"{page} lacks its markers {begin}"
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
