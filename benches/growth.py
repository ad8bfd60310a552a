"""What grows with what: leases, tags, tensors, bytes. `make growth` prints the tables that benches/README.md shows.

Each table doubles one number, in one run, and tells the cost for one of what was doubled beside the first row's: 1.0 and
less is linear or better. Medians; of how many, stands under each table.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from children import Child, as_if_never_forked, have_free_pages
from ending import end_well
from machine import described, meminfo

import onecopy

# What a first use imports is not what is measured.
from onecopy import _acquire, _publish, _verbs, process  # noqa: F401

MIB = 1 << 20
REPEATS = 15
#: Where one takes seconds.
FEW = 5
PUBLICATIONS = 3
#: An even number: each of two comes first as often.
FILLS = 4


def main() -> int:
    end_well()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each model takes a descriptor, and a shell's usual limit is 1,024.
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(f"{os.cpu_count()} CPUs, {meminfo('MemTotal') / 2**30:.1f} GiB; onecopy {onecopy.__version__}")
    arguments = sys.argv[1:]
    kept = Path(arguments.pop(0).removeprefix("--json=")) if arguments and arguments[0].startswith("--json=") else None
    for name in arguments or [name for name in TABLES if name != "sizes"]:
        rows = TABLES[name].print()
        if kept is not None:
            keep(kept, name, TABLES[name], rows)
    return 0


def keep(path: Path, name: str, table: Table, rows: list[tuple[float, ...]]) -> None:
    """For benches/report.py; the tables that were not measured stay as they were."""
    known = json.loads(path.read_text()) if path.exists() else {"tables": {}}
    known["tables"][name] = {
        **about(),
        "title": table.title,
        "columns": table.columns,
        "drawn": table.drawn,
        "rows": [[float(f"{value:.5g}") for value in row] for row in rows],
        "words": f"{table.words(rows)} {table.medians}",
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")


def about() -> dict[str, Any]:
    """As benches/report.py keeps it of the other rows."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return {
        "machine": described(),
        "onecopy": commit.strip() or "?",
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
    }


@dataclass
class Table:
    """Markdown. For some columns how the cost of one compares with the first row's."""

    title: str
    columns: tuple[str, ...]
    counts: tuple[int, ...]
    measure: Callable[[onecopy.Store, Children, int], tuple[float, ...]]
    #: The columns that may grow with the count.
    growing: tuple[int, ...]
    #: Those in milliseconds.
    drawn: tuple[int, ...]
    #: How often each was measured.
    medians: str

    def print(self) -> list[tuple[float, ...]]:
        names = [*self.columns, *(f"{self.columns[at]} for one, against the first row" for at in self.growing)]
        print(f"\n{self.title}\n\n| " + " | ".join(names) + " |\n|" + "---:|" * len(names))
        rows: list[tuple[float, ...]] = []
        for count in self.counts:
            with namespace() as store, children() as child:
                row = (count, *self.measure(store, child, count))
            rows.append(row)
            first = rows[0]
            against = [row[at] / row[0] / (first[at] / first[0]) for at in self.growing]
            cells = [f"{count:,}", *(f"{value:,.2f}" for value in (*row[1:], *against))]
            print("| " + " | ".join(cells) + " |", flush=True)
        print(f"\n{self.words(rows)} {self.medians}", flush=True)
        return rows

    def words(self, rows: list[tuple[float, ...]]) -> str:
        """The slope from the first row to the last, and what one more costs between them, where it is more than chance."""
        first, last = rows[0], rows[-1]
        said = []
        for at in self.drawn:
            slope = math.log(last[at] / first[at]) / math.log(last[0] / first[0])
            kind = (
                "flat"
                if slope < 0.15
                else "less than linear"
                if slope < 0.85
                else "linear"
                if slope < 1.15
                else "steeper"
            )
            each = (last[at] - first[at]) / (last[0] - first[0]) * 1e6
            more = "" if kind == "flat" else f"; {each:,.0f} ns for one more"
            said.append(f"{self.columns[at]}: {kind} (slope {slope:.2f}{more})")
        return f"From {first[0]:,} to {last[0]:,} {self.columns[0]}: " + "; ".join(said) + "."


def leases(store: onecopy.Store, child: Children, count: int) -> tuple[float, ...]:
    child(lambda keep: keep(store.publish("model", [np.ones(MIB // 8)])))
    for _ in range(count - 1):
        child(lambda keep: keep(store.attach("model")))
    assert len(store.show("model")[0].holders) == count
    attach = median(lambda: attach_elsewhere(store, "model"))
    listing = median(lambda: timed(store.list))
    child.kill()
    swept = timed(store.sweep)
    assert store.list() == []
    return attach, listing, swept


def tags(store: onecopy.Store, child: Children, count: int) -> tuple[float, ...]:
    model = [np.ones(MIB // 8)]

    def one_more() -> float:
        """It goes again: there are as many tags each time."""
        leases: list[onecopy.Lease] = []
        spent = timed(lambda: leases.append(store.publish("one more", model)))
        leases.pop().release()
        while len(store.list()) > count:
            time.sleep(0.001)
        return spent

    def publish(keep: Keep) -> float:
        for tag in range(count):
            keep(store.publish(f"model {tag}", model))
        return median(one_more)

    publishing = child(publish)
    assert len(store.list()) == count
    attach = median(lambda: attach_elsewhere(store, f"model {count - 1}"))
    return publishing, attach, median(lambda: timed(store.list)), median(lambda: timed(store.sweep))


def tensors(store: onecopy.Store, child: Children, count: int, length: int = 512) -> tuple[float, ...]:
    import torch

    torch.set_num_threads(1)

    def publish(keep: Keep) -> float:
        model = {f"weight {number}": torch.full((length,), float(number)) for number in range(count)}
        return timed(lambda: keep(store.publish("model", model)))

    def attach(keep: Keep) -> tuple[float, float]:
        spent = timed(lambda: keep(store.attach("model")))
        (lease,) = keep.kept
        assert lease.object[f"weight {count - 1}"].sum() == float(length) * (count - 1)
        return spent, lease.info.private_bytes / 1024

    publishing = published(store, child, publish)
    seen = [child(attach) for _ in range(FEW)]
    return publishing, *(statistics.median(column) for column in zip(*seen, strict=True))


def modules(store: onecopy.Store, child: Children, count: int) -> tuple[float, ...]:
    """Each with one parameter, of a page."""
    import torch

    def publish(keep: Keep) -> float:
        with torch.device("meta"):
            shells = [torch.nn.Linear(1024, 1, bias=False) for _ in range(count)]
        model = torch.nn.ModuleList(shells).to_empty(device="cpu").requires_grad_(False)
        for number, shell in enumerate(model):
            shell.weight.data.fill_(number)
        return timed(lambda: keep(store.publish("model", model)))

    def attach(keep: Keep) -> float:
        spent = timed(lambda: keep(store.attach("model")))
        (lease,) = keep.kept
        assert lease.object[count - 1].weight[0, 0] == count - 1
        return spent

    publishing = published(store, child, publish)
    seen = []
    for _ in range(FEW):
        with children() as one:
            seen.append(one(attach))
    return publishing, statistics.median(seen)


def published(store: onecopy.Store, child: Children, publish: Callable[[Keep], float]) -> float:
    """By a fresh process each time; the last one stays, and what it published."""
    spent = []
    for _ in range(PUBLICATIONS - 1):
        with children() as one:
            spent.append(one(publish))
        store.sweep()
    return statistics.median([*spent, child(publish)])


def flat(store: onecopy.Store, child: Children, mib: int) -> tuple[float, ...]:
    """Bytes alone: one array, of which the attacher reads nothing."""
    child(lambda keep: keep(store.publish("model", [np.ones(mib * MIB, np.uint8)])))
    return (median(lambda: attach_elsewhere(store, "model")),)


def sizes(store: onecopy.Store, child: Children, mib: int) -> tuple[float, ...]:
    """Each fill in a fresh process, over pages that the machine really has; each of the two comes first as often."""
    size = mib * MIB

    def publish(keep: Keep) -> float:
        model = [np.zeros(size, np.uint8)]
        return timed(lambda: keep(store.publish("model", model)))

    ways: dict[str, Callable[[Keep], float]] = {"publish": publish, "plain": lambda keep: write_plainly(mib)}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(FILLS):
        for name in sorted(ways, reverse=bool(number % 2)):
            have_free_pages(size)
            with children() as one:
                spent[name].append(one(ways[name]))
            store.sweep()
    child(publish)
    assert store.show("model")[0].shared_bytes == size
    attach = median(lambda: attach_elsewhere(store, "model"), FEW)
    return statistics.median(spent["publish"]), statistics.median(spent["plain"]), attach


def write_plainly(mib: int) -> float:
    """The limit: fresh shared memory filled by write(2) alone. Giving it back is no part of it."""
    number = os.memfd_create("growth")
    block = bytes(MIB)

    def write() -> None:
        for _ in range(mib):
            os.write(number, block)

    try:
        return timed(write)
    finally:
        os.close(number)


@contextmanager
def namespace() -> Iterator[onecopy.Store]:
    """Of its own; nothing of it stays."""
    store = onecopy.Store(f"growth-{uuid.uuid4().hex[:12]}")
    try:
        yield store
    finally:
        store.sweep()
        assert process.core_store(store.place).remove_registry_if_unused()


class Keep:
    """What a child keeps until it is killed."""

    def __init__(self) -> None:
        self.kept: list[onecopy.Lease] = []

    def __call__(self, lease: onecopy.Lease) -> None:
        self.kept.append(lease)


class Children:
    """Forked from a process that has imported everything and holds nothing: as good as fresh ones, without the import."""

    def __init__(self) -> None:
        self.those: list[Child] = []

    def __call__(self, work: Callable[[Keep], Any]) -> Any:
        """What `work` answers in a new child, which stays."""
        child = Child(working, work)
        self.those.append(child)
        return child()

    def kill(self) -> None:
        while self.those:
            child = self.those.pop()
            os.kill(child.pid, signal.SIGKILL)
            child.end()


def working(work: Callable[[Keep], Any]) -> Iterator[Any]:
    """Plays in a child."""
    as_if_never_forked()
    keep = Keep()
    yield work(keep)


@contextmanager
def children() -> Iterator[Children]:
    started = Children()
    try:
        yield started
    finally:
        started.kill()


def attach_elsewhere(store: onecopy.Store, tag: str) -> float:
    """Milliseconds until a process that has nothing of the store has the model."""
    with children() as child:
        spent: float = child(lambda keep: timed(lambda: keep(store.attach(tag))))
        return spent


def timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def median(measure: Callable[[], float], repeats: int = REPEATS) -> float:
    return statistics.median(measure() for _ in range(repeats))


TABLES = {
    "leases": Table(
        "One model, held by more and more processes",
        ("leases", "attach ms", "list ms", "sweep of all, dead, ms"),
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        leases,
        growing=(2, 3),
        drawn=(1, 2, 3),
        medians=f"Attach and list: medians of {REPEATS}; the sweep: once.",
    ),
    "tags": Table(
        "More and more models of 1 MiB in one namespace",
        ("tags", "publish of one ms", "attach of one ms", "list ms", "sweep ms"),
        (1, 10, 125, 250, 500, 1000),
        tags,
        growing=(3, 4),
        drawn=(1, 2, 3, 4),
        medians=f"Medians of {REPEATS}; `publish of one` is that of one more.",
    ),
    "tensors": Table(
        "One model of more and more torch tensors of 2 KiB",
        ("tensors", "publish ms", "attach ms", "own KiB of an attacher"),
        (1_000, 3_125, 6_250, 12_500, 25_000, 50_000),
        tensors,
        growing=(1, 2, 3),
        drawn=(1, 2),
        medians=f"Publish: medians of {PUBLICATIONS}; attach: of {FEW}.",
    ),
    "few tensors": Table(
        "One model of few torch tensors, 4 MiB in all",
        ("tensors", "publish ms", "attach ms", "own KiB of an attacher"),
        (10, 100, 1000),
        lambda store, child, count: tensors(store, child, count, (4 * MIB) // (4 * count)),
        growing=(),
        drawn=(1, 2),
        medians=f"Publish: medians of {PUBLICATIONS}; attach: of {FEW}.",
    ),
    "modules": Table(
        "One model of more and more modules with one parameter of 4 KiB each",
        ("modules", "publish ms", "attach ms"),
        (256, 1_024, 4_096, 16_384),
        modules,
        growing=(1, 2),
        drawn=(1, 2),
        medians=f"Publish: medians of {PUBLICATIONS}; attach: of {FEW}.",
    ),
    "bytes": Table(
        "One array of more and more bytes",
        ("MiB", "attach ms"),
        (1, 4, 16, 64, 256, 1024),
        flat,
        growing=(),
        drawn=(1,),
        medians=f"Medians of {REPEATS}.",
    ),
    "sizes": Table(
        "One array of zeros (which take no memory before they are shared), up to 0.55 of the machine's memory",
        ("MiB", "publish ms", "the same bytes by write(2) ms", "attach ms"),
        tuple(int(meminfo("MemTotal") * part) // MIB for part in (1 / 16, 1 / 8, 1 / 4, 0.55)),
        sizes,
        growing=(1, 2),
        drawn=(1, 2, 3),
        medians=f"Fills: medians of {FILLS}, each over pages fetched from the host before; attach: of {FEW}.",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
