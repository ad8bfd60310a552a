"""The trace of a job: a line for whatever happens in any of its processes, with what all have used by then."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

#: In the environment of a job's processes: its folder, the file that counts its CPU time, and the model's file.
ROOM, CPU, WEIGHTS = "EXPERIMENT_ROOM", "EXPERIMENT_CPU", "EXPERIMENT_WEIGHTS"
#: In the folder, once the kernel has killed a process of the job: nobody waits for it any more.
KILLED = "killed"


def note(event: str, **facts: object) -> None:
    """A line in the trace, short enough to arrive whole."""
    cpu = os.environ.get(CPU)
    line = {
        "event": event,
        "pid": os.getpid(),
        "at": time.monotonic(),
        "own": time.process_time(),
        "cpu": read_cpu(Path(cpu)) if cpu else None,
        **facts,
    }
    number = os.open(Path(os.environ[ROOM], "trace"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(number, (json.dumps(line) + "\n").encode())
    os.close(number)


def events(room: Path) -> list[dict[str, Any]]:
    trace = room / "trace"
    lines = trace.read_text().splitlines(keepends=True) if trace.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_cpu(file: Path) -> float:
    """Seconds, of an `account.Account.cpu_file`."""
    text = file.read_text()
    return int(text.split()[1]) / 1e6 if text.startswith("usage_usec") else int(text) / 1e9
