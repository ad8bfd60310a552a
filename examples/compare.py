"""The same pipeline four ways, and what each way cost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apache_beam.ml.inference.base import ModelHandler
from rich.table import Table

from measure import CountedHandler, WatchedShared, WatchedStock
from minilm import Encoder
from running import Room, Run

# Enough for steady work, little enough for four runs on two cores.
SAMPLE = 160


def stock(weights: Path, *, kind: type[CountedHandler] = CountedHandler, large_model: bool = False) -> ModelHandler:
    """Beam's PytorchModelHandlerTensor over a `.pt` state dict, always in batches of 16."""
    return kind(
        state_dict_path=str(weights),
        model_class=Encoder,
        model_params={},
        large_model=large_model,
        min_batch_size=16,
        max_batch_size=16,
    )


def compare(room: Room, texts: list[str], workers: int) -> None:
    """Run the four ways over an even sample of `texts` and print the table."""
    sample = texts[:: max(1, len(texts) // SAMPLE)][:SAMPLE]
    arms: list[tuple[str, int, Callable[[], ModelHandler]]] = [
        ("one process", 1, lambda: stock(room.weights, kind=WatchedStock)),
        (f"{workers} x shared.py", workers, lambda: stock(room.weights, kind=WatchedStock)),
        (f"{workers} x large_model=True", workers, lambda: stock(room.weights, kind=WatchedStock, large_model=True)),
        (f"{workers} x onecopy", workers, lambda: WatchedShared(stock(room.weights))),
    ]
    room.screen.print(
        f"MiniLM ({room.weights.stat().st_size / 1e6:.0f} MB of weights) under RunInference, {len(sample)} passages of "
        f"Python's manual, one thread per process."
    )
    table = Table("", "loads", "private MB", "shared MB", "together MB", "CPU s", "vectors/s", "attach ms")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, processes, handler in arms:
        run = room.run(name, sample, handler(), processes)
        table.add_row(name, *_numbers(run))
    room.screen.print(table)
    room.screen.print(
        "private, shared: what the weights take in all processes, without the imports; a shared segment counts once.\n"
        "CPU s: all workers, without the imports. attach: the metric of onecopy, waiting for the loader apart."
    )
    with room.screen.status("safetensors from the page cache"):
        room.screen.print(_page_cache())


def _numbers(run: Run) -> list[str]:
    attach = "" if run.attach is None else f"{run.attach:.0f}"
    sizes = [run.private, run.shared, run.private + run.shared]
    return [str(run.loads), *(f"{size / 1e6:.1f}" for size in sizes), f"{run.cpu:.1f}", f"{run.rate:.1f}", attach]


def _page_cache() -> str:
    """What a process pays that maps a safetensors file by itself: no onecopy, no Beam, other code."""
    script = Path(__file__).parent / "page_cache.py"
    found: dict[str, Any] = json.loads(subprocess.check_output([sys.executable, script, "--json"], env=os.environ))
    return (
        f"For free: a checkpoint that is used just as it lies on the disk can be mapped from the page cache. safetensors "
        f"with a model built on `meta`: {found['private'] / 1e6:.1f} MB private, the file's pages shared by all, "
        f"{found['seconds'] * 1e3:.0f} ms. `python examples/{script.name}` measures it."
    )
