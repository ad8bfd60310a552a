"""Runs one arm's job, counts what it takes, and reads off its notes when what happened."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import account
import notes
from arms import ARMS

HERE = Path(__file__).parent
#: Of the machine's CPU, in parts of ours, what neighbours and what the host (steal) may take: a run beside more is repeated.
NEIGHBOURS, STOLEN = 0.05, 0.25
REPEATS = 2
#: Seconds between two looks at the group's memory.
LOOK = 0.025
#: Seconds that a job gets after the last worker of it was killed, before it counts as one that hangs.
AFTER_A_KILL = 20.0
LIMIT_S = 420.0


@dataclass(frozen=True)
class Files:
    """A model's files in a tmpfs, for every arm: no disk is read."""

    folder: Path
    model: str
    weights: Path


@contextmanager
def prepared(*models: str) -> Iterator[dict[str, Files]]:
    """One folder, gone afterwards, with the files of each."""
    base = Path(tempfile.mkdtemp(prefix="onecopy-experiments-", dir="/dev/shm"))
    try:
        found = {}
        for name in models:
            folder = base / name.replace(" ", "-").replace(",", "")
            folder.mkdir()
            done = subprocess.run(
                [sys.executable, str(HERE / "models.py"), name, str(folder)],
                env=environment(),
                check=False,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"the files of {name} could not be made:\n{done.stderr[-2000:]}")
            found[name] = Files(folder, name, folder / done.stdout.split()[-1])
        yield found
    finally:
        shutil.rmtree(base)


def environment(**more: str) -> dict[str, str]:
    """One thread a process, nothing from the net, and our modules."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))),
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "KERAS_BACKEND": "tensorflow",
        "USE_TF": "0",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def run(
    arm: str,
    files: Files,
    processes: int,
    phases: Sequence[tuple[int, int]],
    limit: int | None = None,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """One job: `phases` are (batch, batches of one worker); `limit` in bytes. Repeated so often where neighbours were busy."""
    done: list[dict[str, Any]] = []
    while len(done) <= repeats and not (done and quiet(done[-1])):
        done.append(once(arm, files, processes, phases, limit))
    facts = min(done, key=lambda facts: (facts["neighbours"] + facts["stolen"]) / facts["cpu"])
    return {**facts, "dropped": len(done) - 1}


def quiet(facts: dict[str, Any]) -> bool:
    return bool(facts["neighbours"] <= NEIGHBOURS * facts["cpu"] and facts["stolen"] <= STOLEN * facts["cpu"])


def once(
    arm: str,
    files: Files,
    processes: int,
    phases: Sequence[tuple[int, int]],
    limit: int | None,
    *,
    together: bool = True,
    hopeless: float = AFTER_A_KILL,
) -> dict[str, Any]:
    """`together`: all workers wait for each other between phases. `hopeless`: seconds from the last kill to the harness's own."""
    room = files.folder.parent / f"run-{uuid.uuid4().hex[:8]}"
    (room / "tmp").mkdir(parents=True)
    # It asks nobody else into its registry, and takes it with it.
    (room / "registry").mkdir(mode=0o700)
    try:
        with account.opened(limit) as group:
            job = [arm, files.model, str(processes), str(files.folder), str(room), json.dumps(phases)]
            command = [sys.executable, str(HERE / "job.py"), *job, "together" if together else "alone"]
            counted = watched(command, room, files, ARMS[arm].switch, group, hopeless)
        facts = {
            "arm": arm,
            "model": files.model,
            "processes": processes,
            "phases": list(phases),
            "limit": limit,
            **counted,
        }
        return {**facts, **timed(notes.events(room), counted["began"])}
    finally:
        if not os.environ.get("EXPERIMENTS_KEEP"):
            shutil.rmtree(room)


def watched(
    command: list[str], room: Path, files: Files, switch: str, group: account.Account | None, hopeless: float
) -> dict[str, Any]:
    more = {
        notes.ROOM: str(room),
        notes.WEIGHTS: str(files.weights),
        "TMPDIR": str(room / "tmp"),
        "ONECOPY_DIR": str(room / "registry"),
        "ONECOPY": switch,
    }
    if group is not None:
        more[notes.CPU] = str(group.cpu_file)
    before, others, mine = account.busy(), children_cpu(), own_cpu()
    start = time.monotonic()
    with (room / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=group.join if group is not None else None,  # noqa: PLW1509 (we have no threads)
        )
        how, peak, kills = "ended by itself", 0, 0
        killed_at = float("inf")
        try:
            while process.poll() is None:
                time.sleep(LOOK)
                now = time.monotonic()
                if group is not None:
                    peak = max(peak, group.unreclaimable())
                    if group.kills > kills:
                        kills, killed_at = group.kills, now
                        (room / notes.KILLED).touch()
                if now > min(killed_at + hopeless, start + LIMIT_S):
                    how = "hangs after a worker was killed" if killed_at < now else "took too long"
                    break
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if group is not None:
                group.kill()
            rc = process.wait()
    wall = time.monotonic() - start
    user, system = group.cpu() if group is not None else (children_cpu() - others, 0.0)
    worked, stolen = (after - earlier for after, earlier in zip(account.busy(), before, strict=True))
    return {
        "rc": rc,
        "how": how,
        "began": start,
        "wall": wall,
        "cpu": user + system,
        "system": system,
        "neighbours": max(0.0, worked - user - system - (own_cpu() - mine)),
        "stolen": stolen,
        "peak": peak if group is not None else None,
        "kills": group.kills if group is not None else None,
    }


def timed(events: list[dict[str, Any]], began: float) -> dict[str, Any]:
    """When what happened, in seconds since the job began, and what the group's CPUs had worked by then."""
    # A process says so once; in containers all have the same number.
    loads = [event for event in events if event["event"] == "load"]
    ends: dict[int, list[dict[str, Any]]] = {}
    begins: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event["event"] in {"begin", "end"}:
            {"begin": begins, "end": ends}[event["event"]].setdefault(event["phase"], []).append(event)
    first = ends.get(0, [])
    facts: dict[str, Any] = {"loads": len(loads), "predicted": len(first)}
    if first:
        facts["first"] = min(event["at"] for event in first) - began
        facts["all_first"] = max(event["at"] for event in first) - began
    ready = [event for event in events if event["event"] == "ready"]
    if all(event["cpu"] is not None for event in events):
        facts["first_cpu"] = max((event["cpu"] for event in first), default=None)
        if loads and ready:
            facts["start_cpu"] = min(event["cpu"] for event in loads)
            facts["ready_cpu"] = max(event["cpu"] for event in ready)
    phases = []
    for number in sorted(set(ends) - {0}):
        begin, end = begins[number], ends[number]
        if len(end) < len(first):
            break
        if all(event["cpu"] is not None for event in begin + end):
            cpu = max(event["cpu"] for event in end) - min(event["cpu"] for event in begin)
        else:
            cpu = sum(own(end, pid)[-1] - own(begin, pid)[0] for pid in {event["pid"] for event in end})
        wall = max(event["at"] for event in end) - min(event["at"] for event in begin)
        phases.append({"cpu": cpu, "wall": wall, "calls": sum(event["calls"] for event in end)})
    facts["steady"] = phases
    # Without the first predictions: how many there are depends on the workers.
    facts["digest"] = sum(event["digest"] for number, those in ends.items() if number for event in those)
    return facts


def own(events: list[dict[str, Any]], pid: int) -> list[float]:
    """A process's CPU seconds at these events, where no group counts."""
    return sorted(event["own"] for event in events if event["pid"] == pid)


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@functools.cache
def counted() -> bool:
    """Whether the kernel counts for us."""
    with account.opened() as group:
        return group is not None
