"""Runs pipelines in real SDK worker processes, and looks at these from outside while they run."""

import json
import os
import pickle
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner


class Collect(beam.DoFn):
    """Writes elements to files: one process, one file."""

    def __init__(self, room):
        self.room = str(room)

    def process(self, element):
        with Path(self.room, f"{os.getpid()}.elements").open("ab") as file:
            pickle.dump(element, file)


def collected(room):
    elements = []
    for path in Path(room).glob("*.elements"):
        with path.open("rb") as file:
            while True:
                try:
                    elements.append(pickle.load(file))
                except EOFError:
                    break
    return elements


def run(build, room, workers, *, mode="multi_processing", environment=None):
    """Run the PCollection that `build(pipeline)` returns in `workers` processes. Returns (elements, metrics by name).

    A counter is an int, a distribution (sum, count), over all steps; 0 where there was no update.
    """
    flags = [f"--direct_num_workers={workers}"]
    if environment is None:
        flags.append(f"--direct_running_mode={mode}")
    options = PipelineOptions(flags, pipeline_type_check=False)
    pipeline = beam.Pipeline(runner=FnApiRunner(default_environment=environment), options=options)
    _ = build(pipeline) | "Collect" >> beam.ParDo(Collect(room))
    result = pipeline.run()
    result.wait_until_finish()
    asked = result.metrics().query()
    metrics = Counter()
    for one in asked["counters"]:
        metrics[one.key.metric.name] += one.committed
    for one in asked["distributions"]:
        total, count = metrics[one.key.metric.name] or (0, 0)
        metrics[one.key.metric.name] = total + one.committed.sum, count + one.committed.count
    return collected(room), metrics


def infer(handler, examples, **kwargs):
    """A pipeline that spreads `examples` over the workers and runs inference on them."""
    return lambda pipeline: (
        pipeline | beam.Create(examples, reshuffle=False) | beam.Reshuffle() | RunInference(handler, **kwargs)
    )


@contextmanager
def doorkeeper(room, workers, look=lambda _: None):
    """When `workers` processes have come to `meet` in the room, calls `look` with what each said, then lets them go.

    Yields a list that holds `look`'s result afterwards.
    """
    seen, over = [], threading.Event()

    def keep():
        while not over.wait(0.01):
            words = list(Path(room).glob("*.json"))
            if len(words) >= workers:
                facts = {int(word.stem): json.loads(word.read_text()) for word in words}
                try:
                    seen.append(look(facts))
                finally:
                    Path(room, "door").touch()
                return

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        Path(room, "door").touch()
        thread.join()


def mappings_with(pid, addresses):
    """The lines of /proc/<pid>/smaps for the mappings that contain these addresses: {start: {field: kB}}."""
    found, current = {}, None
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = line.split()
        if "-" in head[0] and not head[0].endswith(":"):
            start, end = (int(part, 16) for part in head[0].split("-"))
            current = found.setdefault(start, {}) if any(start <= address < end for address in addresses) else None
        elif current is not None and head[1].isdigit():
            current[head[0].rstrip(":")] = int(head[1])
    return found


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.01)
