"""A room to run the demo's pipelines in: a temporary folder, a log, a progress bar, and what each run measured."""

import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.ml.inference.base import ModelHandler
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from measure import events

Embed = Callable[[list[str], ModelHandler, PipelineOptions, Path], PipelineResult]
LOG_LINES = 40


@dataclass
class Run:
    """One pipeline that has finished."""

    events: list[dict[str, Any]]
    beam: PipelineResult
    result: Path
    cpu_of_workers: float  # seconds, imports included

    @property
    def loads(self) -> int:
        """How often Beam's stock handler read the weights from the disk."""
        return len(self._all("load"))

    @property
    def private(self) -> int:
        """Bytes that `load_model` added to what the processes hold alone, all processes together."""
        return sum(ready["private"] for ready in self._all("ready"))

    @property
    def shared(self) -> int:
        """Bytes of shared segments, each counted once, by the process that has most of it in its page tables."""
        sizes: dict[str, int] = {}
        for mapped in self._all("mapped"):
            for segment, size in mapped["segments"].items():
                sizes[segment] = max(size, sizes.get(segment, 0))
        return sum(sizes.values())

    @property
    def cpu(self) -> float:
        """CPU seconds of all workers from just before the load until they had left: their imports are taken off."""
        imports: dict[int, float] = {}
        for event in self.events:
            if "cpu" in event:
                imports.setdefault(event["pid"], event["cpu"])
        return self.cpu_of_workers - sum(imports.values())

    @property
    def rate(self) -> float:
        """Vectors per second, each worker timed from its first batch to its last, added up."""
        batches: dict[int, list[dict[str, Any]]] = {}
        for batch in self._all("batch"):
            batches.setdefault(batch["pid"], []).append(batch)
        rates = [sum(one["records"] for one in all_) / (all_[-1]["at"] - all_[0]["start"]) for all_ in batches.values()]
        return float(sum(rates))

    @property
    def attach(self) -> float | None:
        """Mean milliseconds of attaching, waiting for the loader apart, as onecopy's Beam metric has it; None if none did."""
        named = MetricsFilter().with_name("shared_model_attach_latency_milli_secs")
        found = self.beam.metrics().query(named)["distributions"]
        return float(found[0].committed.mean) if found else None

    def vectors(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The result, in the order of the texts."""
        files = self.result.parent.glob(f"{self.result.name}-*")
        lines = [line for file in files for line in file.read_text("ascii").splitlines()]
        return np.array([vector for _, vector in sorted(map(json.loads, lines))], np.float32)

    def _all(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


class Room:
    """A temporary folder in which pipelines run one after another; it is gone afterwards."""

    def __init__(self, screen: Console, embed: Embed) -> None:
        self.screen = screen
        self._embed = embed
        self._runs = 0

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="onecopy-demo-"))
        self.weights = self.folder / "minilm.pt"
        # What Beam leaves in the temporary folder (MultiProcessShared's .address and .lock files) goes with the rest.
        tempfile.tempdir = os.environ["TMPDIR"] = str(self.folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        log = self.folder / "log"
        if kind and log.exists():
            print("".join(log.open(errors="replace").readlines()[-LOG_LINES:]), end="")
        tempfile.tempdir = None
        del os.environ["TMPDIR"]
        shutil.rmtree(self.folder)

    def run(
        self,
        title: str,
        texts: list[str],
        handler: ModelHandler,
        workers: int,
        meanwhile: Callable[[int], None] = lambda _done: None,
    ) -> Run:
        """Run `embed` with so many SDK processes; `meanwhile(vectors done)` is called a few times a second."""
        self._runs += 1
        trace, result = self.folder / f"trace-{self._runs}", self.folder / f"vectors-{self._runs}"
        os.environ["DEMO_TRACE"] = str(trace)
        options = PipelineOptions(
            [
                "--runner=FnApiRunner",  # a process per worker; DirectRunner may choose a runner with one process
                "--direct_running_mode=multi_processing",
                f"--direct_num_workers={workers}",
            ]
        )
        before = _cpu_of_children()
        if not self.screen.is_terminal:
            self.screen.print(f"running: {title} ...")
        with self._log(), self._bar() as bar, ThreadPoolExecutor(1) as background:
            task = bar.add_task(f"{title}: processes start", total=len(texts))
            job = background.submit(self._embed, texts, handler, options, result)
            while not job.done():
                time.sleep(0.2)
                done = sum(event.get("records", 0) for event in events(trace))
                bar.update(task, completed=done, description=title if done else None)
                meanwhile(done)
            finished = job.result()
            bar.update(task, completed=len(texts))
        return Run(events(trace), finished, result, _cpu_of_children() - before)

    def _bar(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.screen,
            transient=True,
            disable=not self.screen.is_terminal,
        )

    @contextmanager
    def _log(self) -> Iterator[None]:
        """Beam's workers write their log to stderr: into the room's log, shown if something fails."""
        kept = os.dup(2)
        with (self.folder / "log").open("ab") as log:
            os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
