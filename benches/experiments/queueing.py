"""What more CPUs would show, simulated: N clients of one server with one GIL, and N processes that need nobody.

Nothing here is measured; what goes in is (gil.py: one client alone). The rules:

* A client asks again as soon as it has its answer. Durations are always the same, which favours the server: no bursts.
* The server's Python (receiving, unpickling, calling, pickling, sending) holds the GIL: its user time without the model's kernels. Those
  and its system time (sockets, pages) do not, and run in parallel, one thread a client. Between two of them a thread needs the
  GIL again.
* The server's process is the first client's, too: that one's own Python holds the same GIL.
* Who waits for the GIL or a CPU waits in a row; both are taken away after the interpreter's switch interval, 5 ms.
* Half of what one call takes beyond its CPU time (sockets, waking up) passes on the way there, half on the way back, on no CPU.
* Memory's bandwidth, caches, NUMA and hyperthreads are not modelled, for either side.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import plots
from cells import APART, AROUND, COUNTS, INSIDE, LARGE, NOWHERE, SMALL, Cell, inference, iterations, middle
from clients import OURS, SERVED
from tables import markdown

#: Nothing but the calls; much to send; Python beside them, and within.
SIMULATED = (
    Cell(NOWHERE, 0, SMALL, 16),
    Cell(NOWHERE, 0, LARGE, 16),
    Cell(AROUND, 5, SMALL, 16),
    Cell(INSIDE, 1, SMALL, 16),
)
CORES = (2, 4, 16, 64)
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
SLICE = 0.005

HEAD = """\
**Simulated: one server with one GIL, and N processes**

Not measured: a simulation (benches/experiments/queueing.py has its rules) fed with what one call costs where one client alone \
calls from another process than the server's. Its inputs, measured, ms a call:"""


@dataclass(frozen=True)
class Costs:
    """Seconds of one call. `alone`: of a process that has the model itself; all others: through the server.

    `server` and `python` hold its GIL, `kernels` (with its system time) does not.
    """

    client: float
    python: float
    server: float
    kernels: float
    pieces: int
    waiting: float
    alone: float


class Place:
    """So many can be in it at once."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.row: deque[Any] = deque()


class Agenda:
    """Processes are generators: they give the seconds that pass, or the place that they want to be in."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Any]] = []
        self._number = itertools.count()

    def add(self, process: Any, after: float = 0.0) -> None:
        heapq.heappush(self._due, (self.now + after, next(self._number), process))

    def step(self) -> None:
        self.now, _, process = heapq.heappop(self._due)
        for wish in process:
            if isinstance(wish, float):
                self.add(process, wish)
                return
            if not wish.free:
                wish.row.append(process)
                return
            wish.free -= 1

    def leave(self, place: Place) -> None:
        if place.row:
            self.add(place.row.popleft())
        else:
            place.free += 1

    def busy(self, seconds: float, *places: Place) -> Iterator[float | Place]:
        while seconds > 0:
            yield from places
            yield min(seconds, SLICE)
            for place in reversed(places):
                self.leave(place)
            seconds -= SLICE


@functools.cache
def served(costs: Costs, clients: int, cores: int) -> float:
    """Calls a second through one server, simulated."""
    agenda, gil, cpus = Agenda(), Place(1), Place(cores)
    done = 0

    def client(number: int) -> Iterator[float | Place]:
        nonlocal done
        own = (gil, cpus) if not number else (cpus,)
        while True:
            yield from agenda.busy(costs.client / 2, *own)
            yield costs.waiting / 2
            yield from agenda.busy(costs.python, gil, cpus)
            for _ in range(costs.pieces):
                yield from agenda.busy(costs.server / costs.pieces, gil, cpus)
                yield from agenda.busy(costs.kernels / costs.pieces, cpus)
            yield costs.waiting / 2
            yield from agenda.busy(costs.client / 2, *own)
            done += 1

    for number in range(clients):
        agenda.add(client(number))
    # Until it runs evenly, and as long again.
    half = 20 * clients
    while done < half:
        agenda.step()
    since, first = agenda.now, done
    while done < 2 * half:
        agenda.step()
    return (done - first) / (agenda.now - since)


def independent(costs: Costs, clients: int, cores: int) -> float:
    """Calls a second of processes that share nothing but the CPUs."""
    return min(clients, cores) / costs.alone


def costs(found: dict[str, Any], cell: Cell) -> Costs:
    """Of one call where one client alone calls, from another process than the server's."""
    known = found["known"]
    cpu, server, user, rate = (
        middle(found, cell, SERVED, APART, what) for what in ("cpu", "server", "server's user", "rate")
    )
    python = iterations(known, cell) * known["iteration"] if cell.where == INSIDE else 0.0
    held = max(0.0, user - inference(known, cell)["kernels"] - python)
    return Costs(
        client=cpu - server,
        python=python,
        server=held,
        kernels=server - held - python,
        # The mean, the linear layers, the ReLUs.
        pieces=1 + (found["layers"] + 2) + found["layers"],
        waiting=max(0.0, 1 / rate - cpu),
        alone=middle(found, cell, OURS, 1, "cpu"),
    )


def write(found: dict[str, Any]) -> str:
    text = [
        HEAD,
        inputs(found),
        f"The simulation beside what was measured, on {found['cpus']} CPUs, calls a second:",
        check(found),
    ]
    return "\n\n".join((*text, "Simulated calls a second, as many clients as CPUs:", curves(found)))


def inputs(found: dict[str, Any]) -> str:
    lines = []
    for cell in SIMULATED:
        one = costs(found, cell)
        values = (one.client, one.python, one.server, one.kernels, one.waiting, one.alone)
        lines.append([cell.name, *(f"{value * 1000:.3f}" for value in values)])
    head = (
        "client's CPU",
        "Python in the model",
        "the server's other Python",
        "the server without the GIL",
        "waiting",
        "onecopy, all of it",
    )
    return markdown(("cell", *head), lines)


def check(found: dict[str, Any]) -> str:
    lines = []
    for cell in SIMULATED:
        one = costs(found, cell)
        for count in COUNTS:
            line = [cell.name, str(count)]
            for arm, simulated in ((SERVED, served), (OURS, independent)):
                measured, said = middle(found, cell, arm, count), simulated(one, count, found["cpus"])
                line += [f"{measured:,.0f}", f"{said:,.0f}", f"{said / measured - 1:+.0%}"]
            lines.append(line)
    heads = [f"{arm}, {what}" for arm in ("MPS", "onecopy") for what in ("measured", "simulated", "error")]
    return markdown(("cell", "N", *heads), lines)


def curves(found: dict[str, Any]) -> str:
    lines = []
    for cell in SIMULATED:
        one = costs(found, cell)
        for count in CORES:
            mps, ours = served(one, count, count), independent(one, count, count)
            lines.append([cell.name, str(count), f"{mps:,.0f}", f"{ours:,.0f}", f"{ours / mps:.1f}"])
    return markdown(("cell", "CPUs = N", "MPS, simulated", "onecopy, simulated", "times"), lines)


def draw(found: dict[str, Any], folder: Path) -> str:
    figure, axes = plt.subplots()
    most = max(CORES)
    for number, cell in enumerate(SIMULATED):
        one = costs(found, cell)
        for arm, style, simulated in ((OURS, "-", independent), ("MPS", "--", served)):
            rates = [simulated(one, count, most) for count in CLIENTS]
            axes.plot(CLIENTS, rates, style, marker="o", markersize=3, color=f"C{number}", label=f"{arm}: {cell.name}")
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="calls a second")
    axes.set(title=f"SIMULATED: {most} CPUs, from costs measured with one client")
    axes.set_xticks(CLIENTS, [str(count) for count in CLIENTS])
    axes.minorticks_off()
    return plots.save(figure, axes, folder, "gil-simulated")
