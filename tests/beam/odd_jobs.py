"""Pipelines with a model that may not be shareable, and what became of it. Run in children, see `processes.Forked`."""

import os
from pathlib import Path
from typing import NamedTuple

from beam_handlers import Sum
from beam_jobs import infer, run
from told import Heard, squeezed_by_others

from onecopy.beam import SharedMemoryModelHandler, loaded

COUNTERS = ("published", "attached", "fallback")


class Ran(NamedTuple):
    results: list
    shared: tuple  # how many processes published, attached, and neither
    warnings: list


def pipeline(room, namespace, mib, *, wrapped=True, workers=1, mode="in_memory", **kwargs):
    """Runs one over four elements."""
    folder = Path(room)
    folder.mkdir()
    handler = Sum(mib, **kwargs)
    if wrapped:
        handler = SharedMemoryModelHandler(handler, model_identifier="model", namespace=namespace)
    in_processes = mode == "multi_processing"
    if in_processes:  # they chat on standard error
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    # ... and send to the root logger what they have to say.
    with Heard("" if in_processes else "onecopy") as warnings:
        results, metrics = run(infer(handler, range(4)), folder, workers, mode=mode)
    counted = tuple(metrics[f"shared_model_{name}_counter"] for name in COUNTERS)
    return Ran(sorted(results), counted, [one for one in warnings if "is not shared" in one])


def load(namespace, mib, squeezed=None, on_unshareable="warn", **kwargs):
    """The role in which the model was loaded outside of a pipeline; `squeezed` as `told.squeezed_by_others` says."""
    handler = SharedMemoryModelHandler(
        Sum(mib, **kwargs), model_identifier="model", namespace=namespace, on_unshareable=on_unshareable
    )
    with Heard():
        if squeezed is None:
            return loaded.find(handler.load_model()).info.role
        with squeezed_by_others(*squeezed):
            return loaded.find(handler.load_model()).info.role


def load_torch(folder, namespace, side, layers, **kwargs):
    """Writes the state dict of a model of `layers` squares, loads it as Beam's handler does, shared; bytes, and its sum."""
    import torch
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor

    path = Path(folder) / f"{side}-{layers}.pt"
    if not path.exists():
        torch.save({f"{n}.weight": torch.full((side, side), 1.0 + n) for n in range(layers)}, path)
    inner = PytorchModelHandlerTensor(str(path), Squares, {"side": side, "layers": layers})
    handler = SharedMemoryModelHandler(inner, model_identifier=path.stem, namespace=namespace, **kwargs)
    model = handler.load_model()
    assert loaded.find(model).info.role == "publisher"
    return layers * side * side * 4, sum(float(weight.sum()) for weight in model.parameters())


def Squares(side, layers):  # noqa: N802 (what Beam calls a model class)
    from torch import nn

    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))
