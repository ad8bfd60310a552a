"""Markdown of the results. Every number is a median; behind a ratio stands what its middle half spans."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
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


def write(rows: dict[str, Row], drawn: dict[str, list[str]]) -> str:
    text = []
    for name, title in TITLES.items():
        if name in rows:
            row = rows[name]
            text.append(f"### {title}\n\n{machine(row)}\n")
            text += [f"![{title}](plots/{plot})\n" for plot in drawn.get(name, [])]
            for group in dict.fromkeys(case["group"] for case in row["cases"]):
                cases = [case for case in row["cases"] if case["group"] == group]
                text.append(f"**{group.removeprefix(name).strip() or title}**\n\n{WRITERS.get(name, plain)(cases)}\n")
                absent = [one for one in row["cannot"] if one["group"] == group]
                text += [f"* not measured: {one['case']}: {one['reason']}" for one in absent]
                text.append("")
    text.append(f"### Who was measured\n\n{peers(rows)}\n")
    return "\n".join(text)


def machine(row: Row) -> str:
    facts = row["machine"]
    return (
        f"{facts['cpus']} CPUs, {facts['memory'] / 2**30:.1f} GiB, Linux {facts['kernel']}, shmem_enabled "
        f"`{facts.get('shmem_enabled', '?')}`; commit {str(row['onecopy'])[:10]}, {row['datetime'][:10]}."
    )


def attach(cases: list[Row]) -> str:
    head = (
        "peer", "attach ms", "first inference longer than a steady one by ms", "both, times ours",
        "the pages' first touch ms", "attach and pages, times ours", "letting go ms", "own MiB", "page tables KiB", "outputs",
    )  # fmt: skip
    lines = []
    for case in ordered(cases):
        parts = case["parts"]
        later = parts["first"][2] - parts["steady"][2]
        lines.append([
            case["case"], ms(parts["attach"]), f"{later * 1000:,.1f}", times(case.get("ratio")), ms(parts.get("pages")),
            times(case.get("ratio_with_pages")), ms(parts.get("release")), f"{max(0, case['anonymous'][2]) / 2**20:,.1f}",
            f"{max(0, case['page_tables'][2]) / 1024:,.0f}",
            "equal" if case["exact"] else "equal but for the last bits (weights at odd addresses)",
        ])  # fmt: skip
    limit = f"\n\nThe limit, this memory opened, mapped and touched and nothing else: {ms(cases[0]['limit'])} ms."
    return markdown(head, lines) + (limit if cases[0]["limit"] else "")


def publish(cases: list[Row]) -> str:
    lines = [
        [
            case["case"], ms(case["seconds"]), f"{case['size'] / case['seconds'][2] / 1e9:.2f}", times(case.get("ratio")),
            f"{case['peak'][2] / case['size']:.2f}", f"{case['left'][2] / case['size']:.2f}",
        ]
        for case in ordered(cases)
    ]  # fmt: skip
    head = (
        "what",
        "ms",
        "GB/s",
        "times ours",
        "most memory, in models",
        "private memory left in the process, in models",
    )
    return markdown(head, lines)


def memory(cases: list[Row]) -> str:
    counts = list(dict.fromkeys(int(case["case"].rpartition(", ")[2]) for case in cases))
    arms = list(dict.fromkeys(case["case"].rpartition(", ")[0] for case in cases))
    by = {case["case"]: case for case in cases}
    lines = []
    for arm in arms:
        of_arm = [by.get(f"{arm}, {count}") for count in counts]
        totals = [f"{case['memory'][2] / 2**20:,.0f}" if case else "" for case in of_arm]
        tables = next((f"{case['page_tables'][2] / 1024:,.0f}" for case in reversed(of_arm) if case), "")
        lines.append([arm, *totals, tables])
    return markdown(("MiB of", *(f"{count} processes" for count in counts), "page tables of one, KiB"), lines)


def steady(cases: list[Row]) -> str:
    attached, private = sorted(cases, key=lambda case: case["case"])
    low, middle, high = attached["interval"]
    within = "within" if low > 0.99 and high < 1.01 else "not within"
    return (
        f"attached {ms(attached['seconds'])} ms, private {ms(private['seconds'])} ms; the ratio is {middle:.4f}, its 95 % "
        f"interval {low:.4f} to {high:.4f} ({attached['pairs']:,} pairs of calls in {attached['processes']} processes): "
        f"{within} 1 % of equal; {'not ' if high >= 1.01 else ''}shown to be at most 1 % slower."
    )


def throughput(cases: list[Row]) -> str:
    counts = list(dict.fromkeys(int(case["case"].rpartition(", ")[2]) for case in cases))
    by = {case["case"]: case for case in cases}
    arms = list(dict.fromkeys(case["case"].rpartition(", ")[0] for case in cases))
    lines = []
    for arm in arms:
        found = [by.get(f"{arm}, {count}") for count in counts]
        lines.append([arm, *(f"{1 / case['seconds'][2]:,.1f}" if case else "" for case in found)])
    return markdown(("inferences a second of", *(f"{count} processes" for count in counts)), lines)


def held(cases: list[Row]) -> str:
    return markdown(
        ("call", "microseconds", "times ours"),
        [[case["case"], f"{case['seconds'][2] * 1e6:,.3f}", times(case.get("ratio"))] for case in cases],
    )


def registry(cases: list[Row]) -> str:
    lines = [[case["case"], f"{case['seconds'][2] * 1e6:,.1f}", against(case)] for case in cases]
    return markdown(("what", "microseconds", "goal"), lines)


def against(case: Row) -> str:
    """Its goal, where it has one, and whether it is there."""
    if "goal" not in case:
        return ""
    return f"{case['goal'] * 1e6:,.0f}" + (": **not reached**" if case["seconds"][2] > case["goal"] else "")


def plain(cases: list[Row]) -> str:
    lines = [[case["case"], ms(case["seconds"]), times(case.get("ratio"))] for case in ordered(cases)]
    return markdown(("", "ms", "times ours"), lines)


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


def ms(values: list[float] | None) -> str:
    if values is None:
        return ""
    digits = 3 if values[2] < 0.001 else 2 if values[2] < 0.01 else 1 if values[2] < 1 else 0
    return f"{values[2] * 1000:,.{digits}f}"


def times(values: list[float] | None) -> str:
    return "" if values is None else f"{values[2]:,.2f} ({values[1]:,.2f} to {values[3]:,.2f})"


def markdown(head: tuple[str, ...] | list[str], lines: list[list[str]]) -> str:
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])
