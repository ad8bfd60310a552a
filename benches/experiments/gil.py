"""Where one GIL for all bites: N clients of one server, N processes that share the weights, N with their own.

python benches/experiments/gil.py
"""

from __future__ import annotations

import clients  # isort: skip (it puts benches/ on the path)

import functools
import random
import statistics
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import plots
import queueing
import torch
from children import Child, together
from clients import ARMS, OURS, SERVED, SHARED, Worker, batch_of, burn, cpu_seconds, digest, handler, in_a_child, spread
from company import room
from tables import markdown

SECONDS = 240
ROUNDS = 3
COUNTS = (1, 2, 4)
#: 6 MiB: small enough that memory's bandwidth, which all arms share, is not what is measured.
WIDTH, LAYERS = 512, 6
#: How often the forward pass gives the GIL back: the mean, the linear layers, the ReLUs.
PIECES = 1 + (LAYERS + 2) + LAYERS
#: Seconds a cell at least, and calls of each client.
FOR, CALLS = 0.25, 4

NOWHERE, AROUND, INSIDE = "no Python", "Python in pre- and postprocessing", "Python in the model's forward"
#: The client whose process serves, and one that only calls.
SERVER, CALLER = 0, 1
#: The case for the simulation: the server's process and the one client's told apart.
APART = 0

INTRODUCTION = """\
Clients that never stop asking, {rounds} rounds of {seconds} s a cell, the arms in another order in each. A payload is the \
input of a batch, all elements together. An inference alone takes {least:.2f} to {most:.2f} ms of CPU by payload and batch; Python \
is so many times that. Medians; least to most in brackets. Under large_model=True RunInference runs pre- and postprocessing, and \
a custom `inference_fn` too, in the worker: the model that it is given is a proxy. What runs in the server is the model's own \
Python, such as the loop of `generate`."""


@dataclass(frozen=True)
class Cell:
    where: str
    #: So many times as long as the inference.
    times: int
    payload: int
    batch: int


BATCHES, SMALL, LARGE = (1, 16, 64), 4096, 4_194_304
CELLS = (
    *(Cell(NOWHERE, 0, payload, batch) for payload in (SMALL, LARGE) for batch in BATCHES),
    *(Cell(AROUND, times, payload, batch) for payload in (SMALL, LARGE) for batch in BATCHES for times in (1, 5)),
    *(Cell(INSIDE, times, SMALL, batch) for batch in BATCHES for times in (1, 5)),
)


def working(mine: Path, arms_handler: Any) -> Generator[Any, Any, None]:
    """Plays in a child: gets a cell, answers with the outputs' digest, and works when it is told from when on."""
    in_a_child(mine)
    worker = Worker(arms_handler, mine)
    told: Any = yield None
    while True:
        cell, iterations = told
        batch = batch_of(cell.batch, cell.payload)
        around, inside = (iterations, 0) if cell.where == AROUND else (0, iterations)

        def call(batch: Any = batch, around: int = around, inside: int = inside) -> Any:
            burn(around // 2)
            answers = worker(batch, inside)
            burn(around - around // 2)
            return answers

        answers = call()
        start: Any = yield digest(answers)
        while time.perf_counter() < start:
            pass
        done = 0
        while done < CALLS or time.perf_counter() < start + FOR:
            answers = call()
            done += 1
        told = yield done, time.perf_counter() - start, digest(answers)


def calibrating(mine: Path, arms_handler: Any) -> Generator[Any, Any, None]:
    """Plays in a child: CPU seconds of an inference, and of its kernels, by payload and batch; and of one iteration of Python."""
    in_a_child(mine)
    worker = Worker(arms_handler, mine)

    def cpu(call: Callable[[], Any]) -> float:
        found = []
        for _ in range(40):
            start = time.thread_time()
            call()
            found.append(time.thread_time() - start)
        return statistics.median(found)

    inferences = []
    for cell in CELLS:
        if cell.where == NOWHERE:
            batch = batch_of(cell.batch, cell.payload)
            stacked = torch.stack(batch)
            with torch.no_grad():
                kernels = cpu(functools.partial(worker.model, stacked))
            whole = cpu(functools.partial(worker, batch))
            inferences.append({"payload": cell.payload, "batch": cell.batch, "cpu": whole, "kernels": kernels})
    yield {"inferences": inferences, "iteration": cpu(lambda: burn(20_000)) / 20_000}


def of(known: dict[str, Any], cell: Cell) -> dict[str, float]:
    """CPU seconds of its inference."""
    return next(one for one in known["inferences"] if (one["payload"], one["batch"]) == (cell.payload, cell.batch))


def iterations(known: dict[str, Any], cell: Cell) -> int:
    each: float = known["iteration"]
    return round(cell.times * of(known, cell)["cpu"] / each)


def run(those: list[Child], all_of_arm: list[Child], cell: Cell, count: int) -> dict[str, Any]:
    """One cell, one arm, so many clients: calls a second, and CPU seconds by process."""
    before = [cpu_seconds(child.pid) for child in all_of_arm]
    answers = together(those, time.perf_counter() + 0.005)
    cpu = [cpu_seconds(child.pid) - start for child, start in zip(all_of_arm, before, strict=True)]
    calls = sum(done for done, _, _ in answers)
    return {
        "rate": sum(done / seconds for done, seconds, _ in answers),
        "cpu": sum(cpu) / calls,
        "server": cpu[SERVER] / calls,
        "digests": {seen for _, _, seen in answers},
    }


def measure(progress: Callable[[float, str], None]) -> dict[str, Any]:
    with clients.nothing_left(), room() as files, clients.place() as (mine, those):
        clients.save(files, WIDTH, LAYERS)
        progress(0.0, "how long inferences take")
        those.append(Child(calibrating, mine, handler(SHARED, files, mine, WIDTH, LAYERS)))
        known = those[0]()
        clients.end(those[0])
        with clients.place() as shared, clients.place() as served, clients.place() as ours:
            by_arm = dict(zip(ARMS, (shared, served, ours), strict=True))
            for arm, (folder, ready) in by_arm.items():
                arms_handler = handler(arm, files, folder, WIDTH, LAYERS)
                for _ in range(max(COUNTS)):
                    ready.append(Child(working, folder, arms_handler))
                    ready[-1]()  # the first one loads, and serves
            found = {
                "known": known,
                "runs": rounds(progress, known, {arm: ready for arm, (_, ready) in by_arm.items()}),
            }
    return found


def rounds(
    progress: Callable[[float, str], None], known: dict[str, Any], by_arm: dict[str, list[Child]]
) -> list[dict[str, Any]]:
    found: dict[tuple[Cell, str, int], dict[str, Any]] = {}
    for number in range(ROUNDS):
        order = [(arm, count) for arm in ARMS for count in COUNTS] + [(SERVED, APART)]
        for at, cell in enumerate(CELLS):
            progress((number + at / len(CELLS)) / ROUNDS, f"{cell}, round {number + 1}")
            random.Random(100 * number + at).shuffle(order)  # noqa: S311 (to be repeated)
            seen = set()
            for arm, count in order:
                those = by_arm[arm][:count] if count else [by_arm[arm][CALLER]]
                seen.update(together(those, (cell, iterations(known, cell))))
                one = run(those, by_arm[arm], cell, count)
                seen.update(one.pop("digests"))
                kept = found.setdefault((cell, arm, count), {**asdict(cell), "arm": arm, "count": count})
                for name, value in one.items():
                    kept.setdefault(name, []).append(value)
            for arm, count in order:
                found[cell, arm, count].setdefault("outputs", []).append(len(seen))
    return list(found.values())


def find(found: dict[str, Any], cell: Cell, arm: str, count: int) -> dict[str, Any]:
    wanted = {**asdict(cell), "arm": arm, "count": count}
    return next(one for one in found["runs"] if wanted.items() <= one.items())


def write(found: dict[str, Any]) -> str:
    known, most = found["known"], max(COUNTS)
    times = [one["cpu"] * 1000 for one in known["inferences"]]
    unequal = sum(outputs != 1 for one in found["runs"] for outputs in one["outputs"])
    text = [INTRODUCTION.format(rounds=ROUNDS, seconds=FOR, least=min(times), most=max(times))]
    text.append(f"Outputs of all arms {'are equal bit by bit' if not unequal else f'DIFFER in {unequal} runs'}.")
    for title in (NOWHERE, AROUND, INSIDE):
        cells = [cell for cell in CELLS if cell.where == title]
        text.append(f"**{title}**\n\n{table(found, cells)}\n\n{growth(found, cells)}")
    text.append(
        f"This machine has {queueing.cpus()} CPUs: with {most} clients nobody is {most} times as fast, and one GIL costs little more "
        "than the lack of CPUs does anyway. What more CPUs would show is simulated below."
    )
    return "\n\n".join((*text, queueing.write(costs_of(found))))


def table(found: dict[str, Any], cells: list[Cell]) -> str:
    most, lines = max(COUNTS), []
    for cell in cells:
        line = [f"{cell.times} x", "4 kB" if cell.payload == SMALL else "4 MB", str(cell.batch)]
        for arm in ARMS:
            rates = [statistics.median(find(found, cell, arm, count)["rate"]) for count in COUNTS]
            line.append(" / ".join(f"{rate:,.0f}" for rate in rates))
        ours = find(found, cell, OURS, most)
        for arm in (SHARED, SERVED):
            pairs = zip(ours["rate"], find(found, cell, arm, most)["rate"], strict=True)
            line.append(spread([own / other for own, other in pairs]))
        line.append(" / ".join(f"{statistics.median(find(found, cell, arm, most)['cpu']) * 1000:.2f}" for arm in ARMS))
        lines.append(line)
    each = " / ".join(map(str, COUNTS))
    return markdown(
        (
            "Python",
            "payload",
            "batch",
            *(f"{arm}: calls a second, N = {each}" for arm in ARMS),
            *(f"onecopy times {arm}, N = {most}" for arm in (SHARED, SERVED)),
            f"CPU ms a call, all processes, N = {most}: " + " / ".join(ARMS),
        ),
        lines,
    )


def growth(found: dict[str, Any], cells: list[Cell]) -> str:
    """How much more two processes do than one."""
    said = []
    for arm in ARMS:
        more = [
            statistics.median(find(found, cell, arm, 2)["rate"]) / statistics.median(find(found, cell, arm, 1)["rate"])
            for cell in cells
        ]
        said.append(f"{arm} {spread(more)}")
    return f"Two clients do so many times the calls of one (over this table's cells): {'; '.join(said)}."


#: What is simulated: nothing but the calls, much to send, Python beside them and within.
SIMULATED = (
    Cell(NOWHERE, 0, SMALL, 16),
    Cell(NOWHERE, 0, LARGE, 16),
    Cell(AROUND, 5, SMALL, 16),
    Cell(INSIDE, 1, SMALL, 16),
)


def costs_of(found: dict[str, Any]) -> list[queueing.Case]:
    return [case(found, cell) for cell in SIMULATED]


def case(found: dict[str, Any], cell: Cell) -> queueing.Case:
    """One call's costs where one client alone calls, from another process than the server's."""
    apart = find(found, cell, SERVED, APART)
    known = found["known"]
    cpu, server, wall = (statistics.median(apart[name]) for name in ("cpu", "server", "rate"))
    kernels = of(known, cell)["kernels"]
    python = iterations(known, cell) * known["iteration"] if cell.where == INSIDE else 0.0
    costs = queueing.Costs(
        client=cpu - server,
        python=python,
        server=max(0.0, server - kernels - python),
        kernels=kernels,
        pieces=PIECES,
        waiting=max(0.0, 1 / wall - cpu),
        alone=statistics.median(find(found, cell, OURS, 1)["cpu"]),
    )
    measured = {
        arm: {count: statistics.median(find(found, cell, arm, count)["rate"]) for count in COUNTS}
        for arm in (SERVED, OURS)
    }
    python_said = f", {cell.where} {cell.times} x" if cell.times else ""
    name = f"{'4 kB' if cell.payload == SMALL else '4 MB'}, batch {cell.batch}{python_said}"
    return queueing.Case(name, costs, measured[SERVED], measured[OURS])


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    figure, axes = plt.subplots(figsize=(7.5, 6.5))
    most = max(COUNTS)
    for at, arm in enumerate((SERVED, OURS)):
        shares = [
            statistics.median(find(found, cell, arm, most)["rate"])
            / statistics.median(find(found, cell, SHARED, most)["rate"])
            for cell in CELLS
        ]
        places = [number + (at - 0.5) * 0.4 for number in range(len(CELLS))]
        axes.barh(places, shares, 0.38, label=arm, color="C3" if arm == OURS else "C0")
    names = [f"{cell.where} {cell.times} x" if cell.times else cell.where for cell in CELLS]
    sizes = ["4 kB" if cell.payload == SMALL else "4 MB" for cell in CELLS]
    labels = [f"{name}, {size}, batch {cell.batch}" for name, size, cell in zip(names, sizes, CELLS, strict=True)]
    axes.set_yticks(range(len(CELLS)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="k", linestyle=":", label="shared.py")
    axes.set(xlabel=f"calls a second of {most} clients, times those of shared.py")
    return [plots.save(figure, axes, folder, "gil"), queueing.draw(costs_of(found), folder)]


if __name__ == "__main__":
    print(write(measure(lambda part, what: print(f"{part:4.0%} {what}", file=sys.stderr))))
