"""Plain Python clients in the place of Beam's workers, in the three ways that RunInference can have a model.

A client does what RunInference's DoFn does (apache_beam/ml/inference/base.py: setup, process), without a runner around it. It is
forked from a process that has imported everything and holds no model, so neither starting an interpreter nor importing is in
any figure.
"""

from __future__ import annotations

import paths  # noqa: F401 isort: skip (before what lies there)
import environment  # noqa: F401 isort: skip (before anything that reads it)
import os

#: Also for threads that are not ours to tell, as the server's.
os.environ["OMP_NUM_THREADS"] = "1"

import hashlib
import logging
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from apache_beam.ml.inference.base import ModelHandler, _ModelStatus
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
from apache_beam.utils.multi_process_shared import MultiProcessShared
from apache_beam.utils.shared import Shared
from children import Child, be_still
from company import room
from peers.ours import store

from onecopy import _acquire, _publish, _verbs  # noqa: F401 (what a first use imports)
from onecopy.beam import SharedMemoryModelHandler, torch_mapped  # noqa: F401
from onecopy.frameworks import numpy  # noqa: F401

SHARED, SERVED, OURS = ARMS = ("shared.py", "large_model=True (MPS)", "onecopy")
TAG = "model"
#: What an element is pooled to, and what an answer has.
FEATURES = 16
FILE, LOADS = "model.pt", "loads"


class Net(torch.nn.Module):
    """Takes elements of any length. Writes down that it was made: one byte a load."""

    def __init__(self, width: int, layers: int, loads: str) -> None:
        super().__init__()
        with open(loads, "ab", buffering=0) as file:  # noqa: PTH123 (Path cannot append without a buffer)
            file.write(b".")
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, width),
            *(torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU()) for _ in range(layers)),
            torch.nn.Linear(width, FEATURES),
        )

    def forward(self, batch: torch.Tensor, iterations: int = 0) -> torch.Tensor:
        """`iterations` is Python in the model, as the loop of `generate` is: under large_model=True it runs in the server."""
        burn(iterations)
        answer: torch.Tensor = self.layers(batch.view(len(batch), FEATURES, -1).mean(2))
        return answer


def burn(iterations: int) -> int:
    """Python and nothing else."""
    number = 1
    for _ in range(iterations):
        number = (number * 5 + 1) & 0xFFFF
    return number


def save(files: Path, width: int, layers: int) -> None:
    """The weights' file, for all arms, in a tmpfs."""
    torch.manual_seed(7)
    torch.save(Net(width, layers, os.devnull).state_dict(), files / FILE)


def handler(arm: str, files: Path, mine: Path, width: int, layers: int) -> ModelHandler:
    """What a user would write. The weights lie in `files`; what belongs to this arm and round alone, in `mine`."""
    beams = PytorchModelHandlerTensor(
        state_dict_path=str(files / FILE),
        model_class=Net,
        model_params={"width": width, "layers": layers, "loads": str(mine / LOADS)},
        large_model=arm == SERVED,
    )
    return SharedMemoryModelHandler(beams, namespace=store(mine).place.namespace) if arm == OURS else beams


def loads(mine: Path) -> int:
    return (mine / LOADS).stat().st_size


class Worker:
    """A DoFn's `setup` and `process`."""

    def __init__(self, handler: ModelHandler, mine: Path) -> None:
        self.handler = handler
        self.mine = mine
        self.setup()

    def setup(self) -> None:
        """Called again after a failure, as in the DoFn that the SDK makes anew then: handles are new ones."""
        if self.handler.share_model_across_processes():
            self.status = self.handle(lambda: _ModelStatus(True), f"{TAG}_model_status").acquire()
            self.model_handle = self.handle(self.handler.load_model, TAG)
            self.model = self.model_handle.acquire()
        else:
            self.status = Shared().acquire(lambda: _ModelStatus(False), tag=f"{TAG}_model_status")
            self.model = Shared().acquire(self.handler.load_model, tag=TAG)

    def handle(self, make: Any, tag: str) -> Any:
        return MultiProcessShared(make, tag, path=str(self.mine), always_proxy=True)

    def __call__(self, batch: Sequence[torch.Tensor], iterations: int = 0) -> list[torch.Tensor]:
        assert self.status.is_valid_tag(TAG)
        arguments = {"iterations": iterations} if iterations else None
        return [result.inference for result in self.handler.run_inference(batch, self.model, arguments)]


def in_a_child(mine: Path) -> None:
    """Said first by whatever plays in one. Ctrl-C is the parent's: its end is the children's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tempfile.tempdir = str(mine)
    # Threads of multiprocessing print where another process was killed; what fails here goes to the parent (children.Failed).
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)


def batch_of(size: int, payload: int) -> list[torch.Tensor]:
    """`size` elements that take `payload` bytes together."""
    chance = torch.Generator().manual_seed(size)
    return list(torch.rand((size, payload // 4 // size), generator=chance))


def digest(answers: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(answer.numpy().tobytes() for answer in answers)).hexdigest()[:16]


@contextmanager
def nothing_left() -> Iterator[None]:
    """Of whatever is started within: also after a signal that asks us to end."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    be_still()
    try:
        yield
    finally:
        logging.disable(level)
        signal.signal(signal.SIGTERM, before)


@contextmanager
def place() -> Iterator[tuple[Path, list[Child]]]:
    """A room for one arm of one round. Clients that are put into the list end before its namespace is swept."""
    with room() as folder:
        clients: list[Child] = []
        try:
            yield folder, clients
        finally:
            with ExitStack() as stack:
                for client in clients:
                    stack.callback(end, client)


def end(client: Child) -> None:
    """As the OOM killer does it. A process that is sharing a tensor right then leaves its name in /dev/shm."""
    if not client._ended:  # its number may be somebody else's by now
        os.kill(client.pid, signal.SIGKILL)
    client.end()
    for path in Path("/dev/shm").glob(f"torch_{client.pid}_*"):
        path.unlink()


def cpu_seconds(pid: int) -> float:
    """Of a process, all threads, the ended ones too: its clock by clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


def user_seconds(pid: int) -> float:
    """The part of it that was not the kernel's; by the tick, so for long whiles alone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and least to most in brackets."""
    low, middle, high = (f"{one:,.{digits}f}" for one in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} [{low}..{high}]"
