"""What runs in the SDK workers around RunInference: the batches before it, the outputs after it, and notes of both.

All workers begin a phase together, once each has ended the one before, so that what a phase took is the difference of what
the whole group had used at its two ends.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import models
from notes import KILLED, ROOM, WEIGHTS, note

#: A worker that failed never comes.
PATIENCE = 300
#: What this thread runs inference on, and the sum of its outputs' digests.
DOING = threading.local()
_loads: list[str] = []


class Phase(NamedTuple):
    batch: int
    #: Batches of one worker.
    calls: int


class Part(NamedTuple):
    """The work of one of so many workers."""

    number: int
    workers: int
    model: str
    phases: tuple[Phase, ...]
    #: Whether all wait for each other between two phases.
    together: bool


def watch_loads() -> None:
    """Every process that opens the model's file has loaded it, whatever the arm: it is said once."""
    weights = os.environ.get(WEIGHTS)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not _loads and str(arguments[0]) == weights:
            _loads.append(weights or "")
            note("load")

    if weights:
        sys.addaudithook(heard)


class Batches(beam.DoFn):
    """Makes the batches of a part where they are used, one after the other; each is one element, RunInference does not batch."""

    def process(self, part: Part) -> Iterator[list[Any]]:
        note("ready")
        examples = models.find(part.model).examples(max(phase.batch for phase in part.phases))
        # A first prediction sets things up, for each size of a batch: phase 0 is not counted.
        begin(0)
        for phase in part.phases:
            yield examples[: phase.batch]
        end(0, part, len(part.phases))
        for number, phase in enumerate(part.phases, 1):
            begin(number)
            for call in range(phase.calls):
                # The same batches, whoever has them.
                DOING.call, DOING.at = part.number + call * part.workers, 0
                first = DOING.call * phase.batch
                yield [examples[(first + at) % len(examples)] for at in range(phase.batch)]
            end(number, part, phase.calls)


def begin(phase: int) -> None:
    DOING.phase, DOING.call, DOING.at, DOING.digest = phase, 0, 0, 0
    note("begin", phase=phase)


def end(phase: int, part: Part, calls: int) -> None:
    note("end", phase=phase, digest=DOING.digest, calls=calls)
    if part.together:
        meet(phase, part.workers)


def meet(phase: int, workers: int) -> None:
    """Until all have come that far."""
    room = Path(os.environ[ROOM], f"met-{phase}")
    room.mkdir(exist_ok=True)
    (room / uuid.uuid4().hex).touch()
    until = time.monotonic() + PATIENCE
    killed = room.parent / KILLED
    while len(list(room.iterdir())) < workers:
        if killed.exists():
            raise RuntimeError(f"phase {phase}: another worker was killed")
        if time.monotonic() > until:
            raise TimeoutError(
                f"phase {phase}: {len(list(room.iterdir()))} of {workers} workers came within {PATIENCE} s"
            )
        time.sleep(0.005)


class Outputs(beam.DoFn):
    """Adds up what the predictions are, in any order."""

    def process(self, result: Any) -> None:
        numbers = result.inference
        content = numbers.numpy().tobytes() if hasattr(numbers, "numpy") else bytes(str(numbers), "utf-8")
        place = f"{DOING.phase} {DOING.call} {DOING.at}".encode()
        DOING.at += 1
        DOING.digest += int.from_bytes(hashlib.blake2b(content, key=place, digest_size=6).digest(), "big")


note("imported") if os.environ.get(ROOM) else None
watch_loads()
