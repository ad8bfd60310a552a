"""A network so small that only the call costs; just over 1 MiB, below which nothing is shared."""

from __future__ import annotations

import threading

import torch

from nets.torch_model import Model, seeded


class Tiny(torch.nn.Sequential):
    def __init__(self, *, lock: bool = False) -> None:
        super().__init__(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
        if lock:  # which cannot be pickled: such a model cannot be shared
            self.lock = threading.Lock()


def filled() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def examples(count: int) -> list[torch.Tensor]:
    return list(torch.rand((max(64, count), 256), generator=seeded()))


def find(name: str) -> Model:
    return Model(name, Tiny, filled, examples, {"lock": "lock" in name})
