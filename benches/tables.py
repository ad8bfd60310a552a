"""Markdown of the results.

Every number is a median; in brackets stands what its middle half spans, or, of fewer than five rounds, the least and the most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
#: Rounds from which there is a middle half.
HALVES = 5
TITLES = {
    "attach": "Attaching in a fresh process, until inference is steady",
    "warm": "Attaching once more in a process that had it before",
    "held": "Asking for what this process has",
    "registry": "The registry's part of an attach: lock, descriptor, lease row and mapping, no skeleton",
    "publish": "Putting a model where others get it",
    "memory": "What N processes take together",
    "steady": "Steady inference, attached and private",
    "throughput": "Inferences a second, by processes",
    "together": "Eight fresh interpreters start at once",
}


#: Who else could be in the row, and why not.
OTHERS = {
    "warm": "The other peers keep nothing from one time to the next: the row above is theirs.",
    "publish": "from_pretrained and torch.load(mmap) read the files of others here; Beam and fork have nothing to put anywhere.",
    "memory": "Every other peer that maps a file or a store has one copy, as torch.load(mmap) has.",
    "throughput": "What RunInference can be switched between, and a mapped file: how weights were mapped is no matter once they are.",
    "together": "What RunInference can be switched between, and a mapped file.",
}


def write(rows: dict[str, Row], drawn: dict[str, list[str]]) -> str:
    text = []
    for name, title in TITLES.items():
        if name in rows:
            row = rows[name]
            text.append(f"### {title}\n\n{machine(row)}\n")
            text += [f"![{title}](plots/{plot})\n" for plot in drawn.get(name, [])]
            for group in dict.fromkeys(one["group"] for one in (*row["cases"], *row["cannot"])):
                cases = [case for case in row["cases"] if case["group"] == group]
                text.append(f"**{group.removeprefix(name).strip() or title}**\n")
                text += [f"{WRITERS.get(name, plain)(cases)}\n"] if cases else []
                text += absences([one for one in row["cannot"] if one["group"] == group])
                text.append("")
            text += [f"{OTHERS[name]}\n"] if name in OTHERS else []
    text.append(f"### Who was measured\n\n{peers(rows)}\n")
    return "\n".join(text)


def absences(absent: list[Row]) -> list[str]:
    """A line for each reason."""
    by: dict[str, list[str]] = {}
    for one in absent:
        by.setdefault(one["reason"], []).append(one["case"])
    return [f"* not measured: {'; '.join(cases)}: {reason}" for reason, cases in by.items()]


def machine(row: Row) -> str:
    facts = row["machine"]
    return (
        f"{facts['cpus']} CPUs, {facts['memory'] / 2**30:.1f} GiB, Linux {facts['kernel']}, shmem_enabled "
        f"`{facts.get('shmem_enabled', '?')}`; commit {str(row['onecopy'])[:10]}, {row['datetime'][:10]}."
    )


def attach(cases: list[Row]) -> str:
    head = (
        "peer", "n", "attach ms", "first inference longer than a steady one by ms", "both, more than ours by ms",
        "both, times ours (of sums)", "the pages' first touch ms", "attach and pages, times ours", "letting go ms", "own MiB",
        "page tables KiB",
    )  # fmt: skip
    lines = []
    for case in ordered(cases):
        n, parts, total = case["rounds"], case["parts"], case.get("ratio_of_sums")
        lines.append([
            case["case"], str(n), ms(parts["attach"], n), ms(case.get("later"), n), ms(case.get("beyond_ours"), n),
            "-" if total is None else f"{total:,.2f}", ms(parts.get("pages"), n),
            times(case.get("with_pages", {}).get("ratio"), n), ms(parts.get("release"), n),
            f"{max(0, case['anonymous'][2]) / 2**20:,.1f}", f"{max(0, case['page_tables'][2]) / 1024:,.0f}",
        ])  # fmt: skip
    return "\n\n".join([markdown(head, lines), *remarks(cases)])


def remarks(cases: list[Row]) -> list[str]:
    """On all of one model, each where there is something to say."""
    text = []
    inexact = [case["case"] for case in cases if not case["exact"]]
    text.append(
        f"All outputs are equal bit by bit, but for the last bits of {', '.join(inexact)} (weights at odd addresses)."
        if inexact
        else "All outputs are equal bit by bit."
    )
    if any("ours" in case and "ratio_of_sums" not in case for case in cases):
        text.append(
            "-: theirs or ours add up to less than nothing, by the noise of the inferences; the differences are what to read."
        )
    for case in cases:
        if case["case"] != "onecopy":
            continue
        if "first_to_steady" in case:
            first = of(case["first_to_steady"], case["rounds"], lambda ratio: f"{ratio:.3f}")
            text.append(f"onecopy's first inference is {first} times a steady one.")
        if case["limit"]:
            limit = ms(case["limit"], case["rounds"])
            text.append(f"The limit, this memory opened, mapped and touched and nothing else: {limit} ms.")
    huge = [
        f"{case['case']} {of([min(1, size / case['size']) for size in case['huge']], case['rounds'], '{:.0%}'.format)}"
        for case in cases
        if case.get("huge", [0])[-1]
    ]
    if huge:
        text.append(f"Mapped by huge pages after the inferences: {', '.join(huge)}.")
    companies = {case["company"]: (case["ours"], case["rounds"]) for case in cases if case.get("company")}
    if len(companies) > 1:
        each = "; ".join(f"{ms(*ours)} ms beside {names}" for names, ours in companies.items())
        text.append(
            f"Memory did not hold all at once. onecopy, attaching and what the first inference took longer: {each}."
        )
    return text


def publish(cases: list[Row]) -> str:
    lines = [
        [
            case["case"], str(case["rounds"]), ms(case["seconds"], case["rounds"]),
            f"{case['size'] / case['seconds'][2] / 1e9:.2f}", times(case.get("ratio"), case["rounds"]),
            models(case["peak"], case), models(case["left"], case),
        ]
        for case in ordered(cases)
    ]  # fmt: skip
    head = (
        "what",
        "n",
        "ms",
        "GB/s",
        "times ours",
        "most memory, in models (of a run of its own)",
        "private memory left in the process, in models",
    )
    return markdown(head, lines)


def models(found: Any, case: Row) -> str:
    """Bytes, as so many times the model."""
    if found is None:
        return ""
    return f"{(found[2] if isinstance(found, list) else found) / case['size']:.2f}"


def by_count(cases: list[Row]) -> tuple[list[int], dict[str, list[Row | None]]]:
    """The numbers of processes, and each arm's cases by them."""
    counts = sorted({int(case["case"].rpartition(", ")[2]) for case in cases})
    arms = dict.fromkeys(case["case"].rpartition(", ")[0] for case in cases)
    by = {case["case"]: case for case in cases}
    return counts, {arm: [by.get(f"{arm}, {count}") for count in counts] for arm in arms}


def memory(cases: list[Row]) -> str:
    counts, arms = by_count(cases)
    lines = []
    for arm, found in arms.items():
        totals = [
            of(case["memory"], case["rounds"], lambda size: f"{size / 2**20:,.0f}") if case else "" for case in found
        ]
        tables = next((f"{case['page_tables'][2] / 1024:,.0f}" for case in reversed(found) if case), "")
        lines.append([arm, rounds(found), *totals, tables])
    head = ("MiB of", "n", *(f"{count} processes" for count in counts), "page tables of one that attaches, KiB")
    return markdown(head, lines)


def rounds(found: list[Row | None]) -> str:
    """Of all, where they differ."""
    return ", ".join(dict.fromkeys(str(case["rounds"]) for case in found if case))


def steady(cases: list[Row]) -> str:
    attached, private = sorted(cases, key=lambda case: case["case"])
    low, middle, high = attached["interval"]
    within = "within" if low > 0.99 and high < 1.01 else "not within"
    return (
        f"attached {ms(attached['seconds'], attached['rounds'])} ms, private {ms(private['seconds'], private['rounds'])} ms; the ratio is {middle:.4f}, its 95 % "
        f"interval {low:.4f} to {high:.4f} ({attached['pairs']:,} pairs of calls in {attached['processes']} processes): "
        f"{within} 1 % of equal; {'not ' if high >= 1.01 else ''}shown to be at most 1 % slower."
    )


def throughput(cases: list[Row]) -> str:
    counts, arms = by_count(cases)
    lines = []
    for arm, found in arms.items():
        rates = [
            of([1 / one for one in reversed(case["seconds"])], case["rounds"], "{:,.1f}".format) if case else ""
            for case in found
        ]
        ratios = [f"{1 / case['ratio'][2]:.2f}" if case and "ratio" in case else "" for case in found]
        lines.append([arm, rounds(found), *rates, ", ".join(ratios)])
    return markdown(("inferences a second of", "n", *(f"{count} processes" for count in counts), "times ours"), lines)


def held(cases: list[Row]) -> str:
    lines = []
    for case in cases:
        n = case["rounds"]
        microseconds = of(case["seconds"], n, lambda one: f"{one * 1e6:,.3f}")
        lines.append([case["case"], str(n), microseconds, times(case.get("ratio"), n)])
    return markdown(("call", "n", "microseconds", "times ours"), lines)


def registry(cases: list[Row]) -> str:
    lines = []
    for case in cases:
        n = case["rounds"]
        microseconds = of(case["seconds"], n, lambda one: f"{one * 1e6:,.1f}")
        lines.append([case["case"], str(n), microseconds, against(case)])
    return markdown(("what", "n", "microseconds", "goal"), lines)


def against(case: Row) -> str:
    """Its goal, where it has one, and whether it is there."""
    if "goal" not in case:
        return ""
    return f"{case['goal'] * 1e6:,.0f}" + (": **not reached**" if case["seconds"][2] > case["goal"] else "")


def plain(cases: list[Row]) -> str:
    lines = []
    for case in ordered(cases):
        n = case["rounds"]
        lines.append([case["case"], str(n), ms(case["seconds"], n), times(case.get("ratio"), n)])
    return markdown(("", "n", "ms", "times ours"), lines)


WRITERS = {
    "attach": attach,
    "publish": publish,
    "memory": memory,
    "steady": steady,
    "throughput": throughput,
    "held": held,
    "registry": registry,
}


def peers(rows: dict[str, Row]) -> str:
    seen = {name: about for row in rows.values() for name, about in row.get("peers", {}).items()}
    return markdown(
        ("peer", "versions", "how it is used"),
        [[name, about["version"], about["settings"]] for name, about in seen.items()],
    )


def write_growth(growth: Row, drawn: dict[str, list[str]]) -> str:
    text = []
    for name, table in growth["tables"].items():
        text.append(f"### {table['title']}\n")
        text += [f"{machine(table)}\n"] if "machine" in table else []
        text += [f"![{table['title']}](plots/{plot})\n" for plot in drawn.get(f"growth {name}", [])]
        text.append(
            markdown(
                table["columns"], [[f"{row[0]:,.0f}", *(f"{one:,.2f}" for one in row[1:])] for row in table["rows"]]
            )
        )
        text += ["", table["words"], ""]
    return "\n".join(text)


def ordered(cases: list[Row]) -> list[Row]:
    return sorted(cases, key=lambda case: case["seconds"][2])


def of(spread: list[float], n: int, text: Callable[[float], str]) -> str:
    """The median and, of `n` rounds, how far they lie apart."""
    least, low, middle, high, most = spread
    if n == 1:
        return text(middle)
    low, high = (low, high) if n >= HALVES else (least, most)
    return f"{text(middle)} ({text(low)} to {text(high)})"


def ms(values: list[float] | None, n: int) -> str:
    if values is None:
        return ""
    digits = 3 if abs(values[2]) < 0.001 else 2 if abs(values[2]) < 0.01 else 1 if abs(values[2]) < 1 else 0
    return of(values, n, lambda one: f"{one * 1000:,.{digits}f}")


def times(values: list[float] | None, n: int) -> str:
    return "" if values is None else of(values, n, lambda one: f"{one:,.2f}")


def markdown(head: tuple[str, ...] | list[str], lines: list[list[str]]) -> str:
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])
