"""Where one GIL for all bites: N clients of one server, N processes that share the weights, N with their own.

python benches/experiments/gil.py
"""

from __future__ import annotations

import paths  # noqa: F401 isort: skip (before what lies there)

import functools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import clients
import matplotlib.pyplot as plt
import plan
import plots
import queueing
import torch
from cells import APART, AROUND, CELLS, COUNTS, INSIDE, NOWHERE, Cell, find, iterations, middle
from children import Child, together
from clients import (
    ARMS,
    OURS,
    SERVED,
    SHARED,
    Worker,
    batch_of,
    burn,
    cpu_seconds,
    digest,
    handler,
    in_a_child,
    spread,
    user_seconds,
)
from company import room
from tables import markdown

SECONDS = 170
ROUNDS = min(2, plan.ROUNDS)
#: 6 MiB: small enough that memory's bandwidth, which all arms share, is not what is measured.
WIDTH, LAYERS = 512, 6
#: Seconds a cell at least, and calls of each client.
FOR, CALLS = 0.25, 4
#: For the simulation, whose cells need one number more that is good to a tick alone.
APART_FOR = 1.0

#: The client whose process serves, and one that only calls.
SERVER, CALLER = 0, 1
INTRODUCTION = """\
Clients that never stop asking, {rounds} rounds of {seconds} s a cell, the arms in another order in each. A payload is the \
input of a batch, all elements together. An inference alone takes {least:.2f} to {most:.2f} ms of CPU by payload and batch; Python \
is so many times that. Medians; least to most in brackets. Under large_model=True RunInference runs pre- and postprocessing, and \
a custom `inference_fn` too, in the worker: the model that it is given is a proxy. What runs in the server is the model's own \
Python, such as the loop of `generate`."""


def working(mine: Path, arms_handler: Any) -> Generator[Any, Any, None]:
    """Plays in a child: gets a cell, answers with the outputs' digest, and works when it is told from when on."""
    in_a_child(mine)
    worker = Worker(arms_handler, mine)
    told: Any = yield None
    while True:
        cell, python = told
        batch = batch_of(cell.batch, cell.payload)
        around, inside = (python, 0) if cell.where == AROUND else (0, python)

        def call(batch: Any = batch, around: int = around, inside: int = inside) -> Any:
            burn(around // 2)
            answers = worker(batch, inside)
            burn(around - around // 2)
            return answers

        answers = call()
        start, seconds = yield digest(answers)
        time.sleep(max(0.0, start - time.perf_counter()))
        start, done = time.perf_counter(), 0
        while done < CALLS or time.perf_counter() < start + seconds:
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


def run(those: list[Child], all_of_arm: list[Child], cell: Cell, count: int) -> dict[str, Any]:
    """One cell, one arm, so many clients: calls a second, and CPU seconds by process."""
    before, user = [cpu_seconds(child.pid) for child in all_of_arm], user_seconds(all_of_arm[SERVER].pid)
    now = time.perf_counter()
    answers = together(those, (now + 0.005, FOR if count else APART_FOR))
    user = user_seconds(all_of_arm[SERVER].pid) - user
    cpu = [cpu_seconds(child.pid) - start for child, start in zip(all_of_arm, before, strict=True)]
    calls = sum(done for done, _, _ in answers)
    return {
        "rate": sum(done / seconds for done, seconds, _ in answers),
        "cpu": sum(cpu) / calls,
        "server": cpu[SERVER] / calls,
        "server's user": user / calls,
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
                "cpus": len(os.sched_getaffinity(0)),
                "layers": LAYERS,
                "at least": FOR,
                "runs": rounds(progress, known, {arm: ready for arm, (_, ready) in by_arm.items()}),
            }
    return found


def rounds(
    progress: Callable[[float, str], None], known: dict[str, Any], by_arm: dict[str, list[Child]]
) -> list[dict[str, Any]]:
    found: dict[tuple[Cell, str, int], dict[str, Any]] = {}
    for number in range(ROUNDS):
        for at, cell in enumerate(CELLS):
            order = [(arm, count) for arm in ARMS for count in COUNTS] + [(SERVED, APART)] * (
                cell in queueing.SIMULATED
            )
            progress((number + at / len(CELLS)) / ROUNDS, f"{cell.name}, round {number + 1}")
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


def write(found: dict[str, Any]) -> str:
    times = [one["cpu"] * 1000 for one in found["known"]["inferences"]]
    unequal = sum(outputs != 1 for one in found["runs"] for outputs in one["outputs"])
    text = [
        INTRODUCTION.format(
            rounds=len(found["runs"][0]["rate"]), seconds=found["at least"], least=min(times), most=max(times)
        )
    ]
    text.append(f"Outputs of all arms {'are equal bit by bit' if not unequal else f'DIFFER in {unequal} runs'}.")
    for title in (NOWHERE, AROUND, INSIDE):
        those = [cell for cell in CELLS if cell.where == title]
        text.append(f"**{title}**\n\n{table(found, those)}\n\n{growth(found, those)}")
    text.append(f"This machine has {found['cpus']} CPUs. What more would show it cannot; see the simulation below.")
    return "\n\n".join((*text, queueing.write(found)))


def table(found: dict[str, Any], those: list[Cell]) -> str:
    most, lines = max(COUNTS), []
    for cell in those:
        line = [f"{cell.times} x", cell.size, str(cell.batch)]
        line += [" / ".join(f"{middle(found, cell, arm, count):,.0f}" for count in COUNTS) for arm in ARMS]
        ours = find(found, cell, OURS, most)["rate"]
        for arm in (SHARED, SERVED):
            pairs = zip(ours, find(found, cell, arm, most)["rate"], strict=True)
            line.append(spread([own / other for own, other in pairs]))
        line.append(" / ".join(f"{middle(found, cell, arm, most, 'cpu') * 1000:.2f}" for arm in ARMS))
        lines.append(line)
    each = " / ".join(map(str, COUNTS))
    rates = [f"{arm}: calls a second, N = {each}" for arm in ARMS]
    ratios = [f"onecopy times {arm}, N = {most}" for arm in (SHARED, SERVED)]
    cpu = f"CPU ms a call, all processes, N = {most}: {' / '.join(ARMS)}"
    return markdown(["Python", "payload", "batch", *rates, *ratios, cpu], lines)


def growth(found: dict[str, Any], those: list[Cell]) -> str:
    """How much more two processes do than one."""
    more = {arm: [middle(found, cell, arm, 2) / middle(found, cell, arm, 1) for cell in those] for arm in ARMS}
    said = "; ".join(f"{arm} {spread(values)}" for arm, values in more.items())
    return f"Two clients make so many times the calls of one (median of this table's cells): {said}."


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    figure, axes = plt.subplots(figsize=(7.5, 6.5))
    most = max(COUNTS)
    for at, (arm, color) in enumerate(((SERVED, "C0"), (OURS, "C3"))):
        shares = [middle(found, cell, arm, most) / middle(found, cell, SHARED, most) for cell in CELLS]
        axes.barh([number + (at - 0.5) * 0.4 for number in range(len(CELLS))], shares, 0.38, label=arm, color=color)
    axes.set_yticks(range(len(CELLS)), [cell.name for cell in CELLS], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="k", linestyle=":", label=SHARED)
    axes.set(xlabel=f"calls a second of {most} clients, times those of {SHARED}")
    return [plots.save(figure, axes, folder, "gil"), queueing.draw(found, folder)]


if __name__ == "__main__":
    print(write(measure(lambda part, what: print(f"{part:4.0%} {what}", file=sys.stderr))))
