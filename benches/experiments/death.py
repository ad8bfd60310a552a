"""What a worker's death does to the others: SIGKILL, in each of the three ways to have a model.

python benches/experiments/death.py
"""

from __future__ import annotations

import paths  # noqa: F401 isort: skip (before what lies there)

import mmap
import random
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import clients
import matplotlib.pyplot as plt
import numpy as np
import plan
import plots
import torch
from children import Child, together
from clients import ARMS, Worker, batch_of, digest, handler, in_a_child, loads, nothing_left, place, spread
from company import room
from tables import markdown

SECONDS = 75
ROUNDS = min(3, plan.ROUNDS)
CLIENTS = 4
#: 64 MiB.
WIDTH, LAYERS = 1448, 8
PAYLOAD = 4096
#: Who is killed: the first client loads, and under large_model=True serves.
LOADER, OTHER = VICTIMS = {"the one that loaded": 0, "one that did not": CLIENTS - 1}
BEFORE, AFTER = 0.8, 0.4
#: Who has not answered by then never will: MultiProcessShared tries for about 3 s.
PATIENCE = 60.0
#: Of the plot, in seconds.
BIN = 0.1

INTRODUCTION = """\
{clients} clients, {mib:,.0f} MiB of weights, {rounds} rounds, the arms in another order in each: medians, least to most in brackets. \
The killed client is replaced at once by a new process, forked from one that has imported everything: what starting an \
interpreter and importing take comes on top, for all arms alike. A client whose request raised sets its model up anew, as the \
DoFn that Beam makes then does; requests that a runner would send again count as lost."""
ANEW = """\
To set up anew under large_model=True means two handles of MultiProcessShared, one after the other as in RunInference: the \
model's status and the model. Each first tries the dead server's address for a while; then one of the survivors loads and serves. The old \
proxy and the old handle's `acquire()`, asked again after that: {said}."""

#: What became of a request.
PENDING, SAME, OTHERWISE, RAISED = range(4)
BEGUN, ENDED, OUTCOME = range(3)


class Diary:
    """What every client has seen, in memory that its death leaves to us; and whether they shall go on."""

    REQUESTS = 20_000

    def __init__(self) -> None:
        shape = (CLIENTS + 1, self.REQUESTS, 3)
        self.rows = np.frombuffer(mmap.mmap(-1, int(np.prod(shape)) * 8), np.float64).reshape(shape)
        self.stopped = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.uint8)

    def of(self, client: int) -> Any:
        """The requests that it began."""
        return self.rows[client][: np.count_nonzero(self.rows[client][:, BEGUN])]

    def answered(self, client: int) -> Any:
        """When."""
        rows = self.of(client)
        return rows[np.isin(rows[:, OUTCOME], (SAME, OTHERWISE)), ENDED]


def working(mine: Path, arms_handler: Any, diary: Diary, number: int) -> Generator[Any, Any, None]:
    """Plays in a child: first its answer's digest, then requests until it is stopped, then what old handles say."""
    in_a_child(mine)
    batch = batch_of(1, PAYLOAD)
    worker = Worker(arms_handler, mine)
    seen = digest(worker(batch))
    yield seen
    old = worker.model, getattr(worker, "model_handle", None)
    for row in diary.rows[number]:
        if diary.stopped[0]:
            break
        row[BEGUN] = time.perf_counter()
        try:
            outcome = SAME if digest(worker(batch)) == seen else OTHERWISE
        except Exception:
            outcome = RAISED
        # Who reads it sees the outcome last.
        row[ENDED] = time.perf_counter()
        row[OUTCOME] = outcome
        if outcome == RAISED:
            set_up_anew(worker, diary)
    yield asked_again(old, batch) if worker.model is not old[0] else None


def set_up_anew(worker: Worker, diary: Diary) -> None:
    while not diary.stopped[0]:
        try:
            return worker.setup()
        except Exception:
            time.sleep(0.01)
    return None


def asked_again(old: tuple[Any, Any], batch: Any) -> list[str]:
    """The proxy and the handle of before the death, now that all is well again."""
    said = []
    for ask in (lambda: old[0](torch.stack(batch)), old[1].acquire):
        try:
            ask()
            said.append("works")
        except Exception as error:
            said.append(type(error).__name__)
    return said


def trial(arm: str, victim: int, files: Path) -> dict[str, Any]:
    diary = Diary()
    with place() as (mine, those):
        arms_handler = handler(arm, files, mine, WIDTH, LAYERS)

        def hatch(number: int) -> Child:
            those.append(Child(working, mine, arms_handler, diary, number))
            return those[-1]

        digests = [hatch(0)()]
        digests += together([hatch(number) for number in range(1, CLIENTS)])
        before = loads(mine)
        for client in those:
            client.tell()
        time.sleep(BEFORE)
        killed = time.perf_counter()
        clients.end(those[victim])
        fresh = hatch(CLIENTS)
        fresh.tell()
        survivors = [number for number in range(CLIENTS) if number != victim]
        alive = [*survivors, CLIENTS]
        told = False
        while not all(works_again(diary, number, killed) for number in alive):
            if not told and fresh._connection.poll():
                digests.append(fresh.hear())
                fresh.tell()
                told = True
            if time.perf_counter() - killed > PATIENCE:
                break
            time.sleep(0.01)
        time.sleep(AFTER)
        stopped = time.perf_counter()
        diary.stopped[0] = 1
        old = [those[number].hear() for number in survivors if those[number]._connection.poll(PATIENCE)]
        return {
            "lost": sum(lost(diary, number) for number in survivors),
            "answered": answered(diary, survivors, killed, stopped),
            "gap before": max(longest_gap(diary, number, killed - BEFORE / 2, killed) for number in survivors),
            "gap": max(longest_gap(diary, number, killed, stopped) for number in survivors),
            "survivors": max(works_again(diary, number, killed) or PATIENCE for number in survivors),
            "all": max(works_again(diary, number, killed) or PATIENCE for number in alive),
            "loads before": before,
            "loads": loads(mine),
            "digests": sorted(set(digests)),
            "other answers": int(sum((diary.of(number)[:, OUTCOME] == OTHERWISE).sum() for number in alive)),
            "old": sorted({tuple(one) for one in old if one}),
        }


def works_again(diary: Diary, number: int, killed: float) -> float | None:
    """Seconds from the death to the first answer to a request that was begun after it, all failures behind."""
    rows = diary.of(number)
    failed = rows[(rows[:, OUTCOME] == RAISED) & (rows[:, ENDED] > killed), ENDED]
    since = max(killed, failed.max(initial=killed))
    good = rows[(rows[:, BEGUN] >= since) & np.isin(rows[:, OUTCOME], (SAME, OTHERWISE)), ENDED]
    return float(good[0] - killed) if len(good) else None


def lost(diary: Diary, number: int) -> int:
    """Raised, or pending for good."""
    return int(np.isin(diary.of(number)[:, OUTCOME], (RAISED, PENDING)).sum())


def longest_gap(diary: Diary, number: int, since: float, until: float) -> float:
    """Between two answers of one client, of which the later one came after `since`."""
    ends = diary.answered(number)
    within = ends[max(0, np.searchsorted(ends, since) - 1) : np.searchsorted(ends, until)]
    return float(np.diff([*within, until]).max())


def answered(diary: Diary, those: list[int], killed: float, stopped: float) -> list[int]:
    """In each tenth of a second from half a second before the death on."""
    edges = np.arange(-BEFORE / 2, stopped - killed, BIN)
    ends = np.concatenate([diary.answered(number) for number in those]) - killed
    return [int(count) for count in np.histogram(ends, edges)[0]]


def measure(progress: Callable[[float, str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {"clients": CLIENTS, "bytes": 0, "trials": []}
    with nothing_left(), room() as files:
        clients.save(files, WIDTH, LAYERS)
        found["bytes"] = (files / clients.FILE).stat().st_size
        for number in range(ROUNDS):
            order = [(arm, victim) for arm in ARMS for victim in VICTIMS]
            random.Random(number).shuffle(order)  # noqa: S311 (to be repeated)
            for at, (arm, victim) in enumerate(order):
                progress((number + at / len(order)) / ROUNDS, f"{arm}, killing {victim}, round {number + 1}")
                found["trials"].append(
                    {"round": number, "arm": arm, "victim": victim, **trial(arm, VICTIMS[victim], files)}
                )
    return found


def write(found: dict[str, Any]) -> str:
    text = [
        INTRODUCTION.format(
            clients=found["clients"],
            mib=found["bytes"] / 2**20,
            rounds=1 + max(one["round"] for one in found["trials"]),
        )
    ]
    text += [f"Killed: {victim}.\n\n{table(found, victim)}" for victim in VICTIMS]
    served = [one for one in found["trials"] if one["arm"] == clients.SERVED and one["victim"] == LOADER]
    handles = sorted({tuple(said) for one in served for said in one["old"]})
    text.append(ANEW.format(said="; ".join(f"{proxy} and {handle}" for proxy, handle in handles) or "(nobody had to)"))
    spared = sum(one["lost"] for one in found["trials"] if one["arm"] != clients.SERVED)
    text.append(f"The survivors of the two other arms lost {spared} requests in all trials, of either kind.")
    ends = {answer for one in found["trials"] for answer in one["digests"]}
    others = sum(one["other answers"] for one in found["trials"])
    text.append(
        f"Of all clients of all arms, before and after, the outputs are {'equal' if len(ends) == 1 and not others else 'NOT EQUAL'} "
        f"bit by bit ({others} differed from the client's first one)."
    )
    return "\n\n".join(text)


def table(found: dict[str, Any], victim: str) -> str:
    lines = []
    for arm in ARMS:
        those = [one for one in found["trials"] if (one["arm"], one["victim"]) == (arm, victim)]
        many = {name: [one[name] for one in those] for name in those[0]}
        gaps = [spread([value * 1000 for value in many[name]], 0) for name in ("gap before", "gap")]
        seconds = [spread(many[name]) for name in ("survivors", "all")]
        more = [after - before for after, before in zip(many["loads"], many["loads before"], strict=True)]
        lines.append([arm, spread(many["lost"], 0), *gaps, *seconds, spread(many["loads before"], 0), spread(more, 0)])
    return markdown(
        (
            "arm",
            "requests lost in the three survivors",
            "a survivor's longest gap without an answer, in the half second before, ms",
            "after, ms",
            "until the survivors work again, s",
            "until all four do, s",
            "loads before the death",
            "loads because of it",
        ),
        lines,
    )


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    figure, axes = plt.subplots()
    for arm in ARMS:
        those = [one["answered"] for one in found["trials"] if (one["arm"], one["victim"]) == (arm, LOADER)]
        length = min(len(one) for one in those)
        rate = np.median([one[:length] for one in those], axis=0) / BIN
        plots.draw_line(axes, arm, [(-BEFORE / 2 + (at + 0.5) * BIN, value) for at, value in enumerate(rate)])
    axes.axvline(0, color="k", linestyle=":", label="SIGKILL")
    axes.set(xlabel="seconds after the death of the process that loaded", ylabel="answers a second, three survivors")
    return [plots.save(figure, axes, folder, "death")]


if __name__ == "__main__":
    print(write(measure(lambda part, what: print(f"{part:4.0%} {what}", file=sys.stderr))))
