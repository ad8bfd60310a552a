"""What the demo measures, and how: handlers that write down what happens in the process they run in.

A worker appends one line of JSON per event to the file named by DEMO_TRACE; the demo reads them all. Memory is looked at
just before and just after `load_model`, so without what the imports took.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor

from memory import anonymous, mapped
from onecopy.beam import SharedMemoryModelHandler

SEGMENTS = r"/memfd:onecopy|/dev/shm/onecopy"


def note(event: str, **facts: object) -> None:
    """Append one event to the trace: a line short enough to arrive whole."""
    line = json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic(), **facts}) + "\n"
    with Path(os.environ["DEMO_TRACE"]).open("a", encoding="ascii") as trace:
        trace.write(line)


def events(trace: Path) -> list[dict[str, Any]]:
    """All events so far; a line still being written waits for the next look."""
    lines = trace.read_text("ascii").splitlines(keepends=True) if trace.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class CountedHandler(PytorchModelHandlerTensor):
    """Beam's stock handler; every load of the weights leaves a line."""

    def load_model(self) -> torch.nn.Module:
        """See Beam."""
        note("load")
        return super().load_model()


class Watched:
    """Goes in front of a handler class: what its `load_model` and `run_inference` cost the process they run in."""

    _looked = False

    def load_model(self) -> Any:
        """See Beam."""
        cpu, before, start = time.process_time(), anonymous(), time.perf_counter()
        model = super().load_model()  # type: ignore[misc]
        seconds = time.perf_counter() - start
        note("ready", cpu=cpu, seconds=seconds, private=anonymous() - before)
        return model

    def run_inference(self, batch: Sequence[Any], model: object, inference_args: Any = None) -> Iterator[Any]:
        """See Beam."""
        cpu, start = time.process_time(), time.monotonic()
        results = list(super().run_inference(batch, model, inference_args))  # type: ignore[misc]
        note("batch", cpu=cpu, start=start, records=len(results))
        if not self._looked:  # every weight has been touched now
            self._looked = True
            note("mapped", segments=mapped(SEGMENTS))
        return iter(results)


class WatchedStock(Watched, CountedHandler):
    """Beam's stock handler, watched."""


class WatchedShared(Watched, SharedMemoryModelHandler[Any, Any, Any]):
    """onecopy around Beam's stock handler, watched."""
