"""One arm's whole Beam job: `python benches/experiments/job.py ARM MODEL WORKERS FOLDER ROOM PHASES together|alone`, in a process of its own.

FOLDER has the model's files, ROOM takes the notes. Run by `running.run`, which counts.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import apache_beam as beam
import models
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import EmbeddedPythonGrpcEnvironment, SubprocessSDKEnvironment
from arms import APART, ARMS
from notes import note
from worker import Batches, Outputs, Part, Phase

WORKER = f"{sys.executable} -m apache_beam.runners.worker.sdk_worker_main"
#: As containers have it: numbers of processes, shared memory and temporary files of their own; one volume is common.
CONTAINER = """
set -e
mount --bind "$1" /mnt
mount -t tmpfs -o size=64m tmpfs /dev/shm
mkdir -p "$1"
mount --move /mnt "$1"
mount -t tmpfs tmpfs "$TMPDIR"
mount -t tmpfs tmpfs /tmp
shift
exec "$@"
"""


def main() -> None:
    name, model_name, workers, folder, room, phases, together = sys.argv[1:]
    note("started")
    logging.getLogger().setLevel(logging.WARNING)
    arm, model, count = ARMS[name], models.find(model_name), int(workers)
    planned = tuple(Phase(*one) for one in json.loads(phases))
    parts = [Part(at, count, model_name, planned, together == "together") for at in range(count)]
    if arm.workers == "one":
        # The same work, by one.
        parts = [Part(0, 1, model_name, tuple(Phase(one.batch, one.calls * count) for one in planned), together=False)]
    options = PipelineOptions([f"--direct_num_workers={len(parts)}"], pipeline_type_check=False)
    handler = arm.handler(model, folder).with_no_batching()
    with beam.Pipeline(FnApiRunner(default_environment=environment(arm.workers, Path(room))), options) as pipeline:
        (
            pipeline
            | beam.Create(parts, reshuffle=False)
            | beam.Reshuffle()
            | beam.ParDo(Batches())
            | RunInference(handler, inference_args=model.inference_args)
            | beam.ParDo(Outputs())
        )
    note("finished")


def environment(workers: str, room: Path) -> object:
    if workers == "threads":
        return EmbeddedPythonGrpcEnvironment.default()
    if workers != "containers":
        return SubprocessSDKEnvironment.from_command_string(WORKER)
    script = room / "container.sh"
    script.write_text(CONTAINER)
    return SubprocessSDKEnvironment.from_command_string(f"{APART} sh {script} {room.parent} {WORKER}")


if __name__ == "__main__":
    main()
