"""A network so small that only the call costs; just over 1 MiB, below which nothing is shared."""

from __future__ import annotations

import threading

import torch
from torch.nn.utils import skip_init

from nets.torch_model import Model, seeded


class Tiny(torch.nn.Sequential):
    def __init__(self, *, lock: bool = False, generator: bool = False) -> None:
        # Without random numbers that are overwritten.
        first, second = (skip_init(torch.nn.Linear, *sizes) for sizes in ((256, 1024), (1024, 10)))
        super().__init__(first, torch.nn.ReLU(), second)
        if lock:  # which Beam's pickler makes anew in each process
            self.lock = threading.Lock()
        if generator:  # which nobody can pickle: such a model cannot be shared
            self.generator = (number for number in ())


def filled() -> Tiny:
    model = Tiny()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05, generator=seeded())
    return model


def examples(count: int) -> list[torch.Tensor]:
    return list(torch.rand((max(64, count), 256), generator=seeded()))


def find(name: str) -> Model:
    return Model(name, Tiny, filled, examples, {"lock": "lock" in name, "generator": "generator" in name})
