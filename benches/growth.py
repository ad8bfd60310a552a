"""What grows with what: leases, tags, tensors, bytes. `make growth` prints the tables that benches/README.md shows.

Each table doubles one number, in one run, and tells the cost for one of what was doubled beside the first row's: 1.0 and
less is linear or better. Medians.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import statistics
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import onecopy

# What a first use imports is not what is measured.
from onecopy import _acquire, _publish, _verbs, process  # noqa: F401

MIB = 1 << 20
REPEATS = 15


def main() -> int:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each model takes a descriptor, and a shell's usual limit is 1,024.
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(f"{os.cpu_count()} CPUs, {memory('MemTotal') / 2**30:.1f} GiB; onecopy {onecopy.__version__}")
    for name in sys.argv[1:] or TABLES:
        TABLES[name].print()
    return 0


@dataclass
class Table:
    """Markdown. For some columns how the cost of one compares with the first row's."""

    title: str
    columns: tuple[str, ...]
    counts: tuple[int, ...]
    measure: Callable[[onecopy.Store, Children, int], tuple[float, ...]]
    #: The columns that may grow with the count.
    growing: tuple[int, ...]

    def print(self) -> None:
        names = [*self.columns, *(f"{self.columns[at]} for one, against the first row" for at in self.growing)]
        print(f"\n{self.title}\n\n| " + " | ".join(names) + " |\n|" + "---:|" * len(names))
        first: tuple[float, ...] = ()
        for count in self.counts:
            with namespace() as store, children() as child:
                row = (count, *self.measure(store, child, count))
            first = first or row
            against = [row[at] / row[0] / (first[at] / first[0]) for at in self.growing]
            cells = [f"{count:,}", *(f"{value:,.2f}" for value in (*row[1:], *against))]
            print("| " + " | ".join(cells) + " |", flush=True)


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
    def publish(keep: Keep) -> float:
        def one(tag: int) -> None:
            keep(store.publish(f"model {tag}", [np.ones(MIB // 8)]))

        return statistics.median(timed(lambda tag=tag: one(tag)) for tag in range(count))

    publishing = child(publish)
    assert len(store.list()) == count
    attach = median(lambda: attach_elsewhere(store, f"model {count - 1}"))
    return publishing, attach, median(lambda: timed(store.list)), median(lambda: timed(store.sweep))


def tensors(store: onecopy.Store, child: Children, count: int) -> tuple[float, ...]:
    import torch

    torch.set_num_threads(1)

    def publish(keep: Keep) -> float:
        model = {f"weight {number}": torch.full((512,), float(number)) for number in range(count)}
        return timed(lambda: keep(store.publish("model", model)))

    def attach(keep: Keep) -> tuple[float, float]:
        spent = timed(lambda: keep(store.attach("model")))
        (lease,) = keep.kept
        assert lease.object[f"weight {count - 1}"].sum() == 512.0 * (count - 1)
        return spent, lease.info.private_bytes / 1024

    publishing = child(publish)
    seen = [child(attach) for _ in range(5)]
    return publishing, *(statistics.median(column) for column in zip(*seen, strict=True))


def sizes(store: onecopy.Store, child: Children, mib: int) -> tuple[float, ...]:
    size = mib * MIB
    plain = timed(lambda: write_plainly(mib))
    publishing = child(lambda keep: timed(lambda: keep(store.publish("model", [np.zeros(size, np.uint8)]))))
    assert store.show("model")[0].shared_bytes == size
    return publishing, plain, median(lambda: attach_elsewhere(store, "model"), 5)


def write_plainly(mib: int) -> None:
    """The limit: fresh shared memory filled by write(2) alone, and given back."""
    number = os.memfd_create("growth")
    block = bytes(MIB)
    for _ in range(mib):
        os.write(number, block)
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
        self.pids: list[int] = []

    def __call__(self, work: Callable[[Keep], Any]) -> Any:
        """What `work` answers in a new child, which stays."""
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            self._live(work, writing)
        self.pids.append(pid)
        os.close(writing)
        with os.fdopen(reading, "rb") as answer:
            return pickle.load(answer)

    @staticmethod
    def _live(work: Callable[[Keep], Any], writing: int) -> NoReturn:
        try:
            keep = Keep()
            os.write(writing, pickle.dumps(work(keep)))
            os.close(writing)
            signal.pause()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def kill(self) -> None:
        while self.pids:
            pid = self.pids.pop()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


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


def memory(name: str) -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) << 10


TABLES = {
    "leases": Table(
        "One model, held by more and more processes",
        ("leases", "attach ms", "list ms", "sweep of all, dead, ms"),
        (64, 128, 256, 512),
        leases,
        growing=(2, 3),
    ),
    "tags": Table(
        "More and more models of 1 MiB in one namespace",
        ("tags", "publish of one ms", "attach of one ms", "list ms", "sweep ms"),
        (125, 250, 500, 1000),
        tags,
        growing=(3, 4),
    ),
    "tensors": Table(
        "One model of more and more torch tensors of 2 KiB",
        ("tensors", "publish ms", "attach ms", "own KiB of an attacher"),
        (6_250, 12_500, 25_000, 50_000),
        tensors,
        growing=(1, 2, 3),
    ),
    "sizes": Table(
        "One array of zeros (which take no memory before they are shared), up to 0.55 of the machine's memory",
        ("MiB", "publish ms", "the same bytes by write(2) ms", "attach ms"),
        tuple(int(memory("MemTotal") * part) // MIB for part in (1 / 16, 1 / 8, 1 / 4, 0.55)),
        sizes,
        growing=(1, 2),
    ),
}


if __name__ == "__main__":
    sys.exit(main())
