"""Models and handlers that the tests here ship to SDK workers, which import this module by its name."""

import json
import os
import time
from pathlib import Path

import apache_beam as beam
import numpy as np
import torch
from apache_beam.ml.inference.base import ModelHandler, PredictionResult
from apache_beam.ml.inference.pytorch_inference import default_tensor_inference_fn

WIDTH = 1024  # a layer of this width is 4 MiB


class Net(torch.nn.Module):
    """Counts its constructions in `room`: a line per process."""

    def __init__(self, room="", seed=0):
        super().__init__()
        if room:
            count(room, "loads")
        torch.manual_seed(seed)
        self.first, self.second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def count(room, what):
    with Path(room, what).open("a") as file:  # O_APPEND: lines of several processes do not mix
        file.write(f"{os.getpid()}\n")


def counted(room, what):
    """The processes that said so, one entry each time."""
    path = Path(room, what)
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def meet(room, **facts):
    """Leave word in `room`, once per process, and go on when the test has opened the door."""
    word = Path(room, f"{os.getpid()}.json")
    if not word.exists():
        draft = word.with_suffix(".draft")
        draft.write_text(json.dumps(facts))
        draft.rename(word)
    while not Path(room, "door").exists():
        time.sleep(0.01)


def address_of(array):
    """Where the memory of a tensor or an array begins."""
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data


def meeting_tensor_fn(batch, model, device, inference_args=None, model_id=None):
    """Beam's own inference function for tensors, after a meeting."""
    arguments = dict(inference_args or {})
    if room := arguments.pop("room", None):
        meet(room, addresses=[address_of(weight) for weight in (model.first.weight, model.second.weight)])
    return default_tensor_inference_fn(batch, model, device, arguments, model_id)


class Meet(beam.DoFn):
    """Holds up the first element of a process until the test has opened the door."""

    def __init__(self, room):
        self.room = room

    def process(self, element):
        meet(self.room)
        yield element


class WithState(ModelHandler):
    """Keeps things on itself while it loads, as handlers with a tokenizer do."""

    def __init__(self, room):
        super().__init__()
        self.room = room
        self.seen = {"main"}
        self.gone = "after loading"

    def load_model(self):
        model = Net(self.room)
        self.labels = ["no", "yes"]
        self.seen.add("load_model")
        self.first_weight = model.first.weight
        del self.gone
        return model

    def run_inference(self, batch, model, inference_args=None):
        meet(self.room)
        aliased = self.first_weight.data_ptr() == model.first.weight.data_ptr()
        for x in batch:
            yield self.labels[x % 2], sorted(self.seen), hasattr(self, "gone"), aliased, os.getpid()


class Unshareable:
    """A model that cannot be pickled, and that says which process it is in."""

    def __init__(self):
        self.weights = np.zeros(1 << 20)
        self.made_in = os.getpid()

    def predict(self, x):
        return x + 1, self.made_in, os.getpid()

    def __reduce__(self):
        raise TypeError("cannot pickle 'Unshareable' object")


class Weights:
    def __init__(self):
        self.array = np.arange(1 << 18)

    def total(self):
        return int(self.array.sum())


class Arrays(ModelHandler):
    """A plain model; where it is `held_up`, loading goes on when `go` is in the room."""

    def __init__(self, room, *, held_up=False, **kwargs):
        super().__init__(**kwargs)
        self.room, self.held_up = room, held_up

    def load_model(self):
        count(self.room, "loads")
        while self.held_up and not Path(self.room, "go").exists():
            time.sleep(0.01)
        return Weights()

    def run_inference(self, batch, model, inference_args=None):
        return [(model.total(), os.getpid()) for _ in batch]


class Ones:
    def __init__(self, mib):
        self.array = np.ones((mib << 20) // 8)

    def total(self):
        return float(self.array.sum())


class Sum(ModelHandler):
    """A model of so many MiB: adds the sum of its weights to everything."""

    def __init__(self, mib, **kwargs):
        super().__init__(max_batch_size=1, **kwargs)
        self.mib = mib

    def load_model(self):
        return Ones(self.mib)

    def run_inference(self, batch, model, inference_args=None):
        return [x + model.total() for x in batch]


class UnshareableHandler(ModelHandler):
    def __init__(self, room, **kwargs):
        super().__init__(max_batch_size=1, **kwargs)
        self.room = room

    def load_model(self):
        count(self.room, "loads")
        return Unshareable()

    def run_inference(self, batch, model, inference_args=None):
        meet(self.room)
        return [(*model.predict(x), os.getpid()) for x in batch]


class Versioned(ModelHandler):
    """Its model is the number in its file."""

    def __init__(self, room, path):
        super().__init__(max_batch_size=1)
        self.room, self.path = room, path

    def update_model_path(self, model_path=None):
        self.path = model_path or self.path

    def load_model(self):
        count(self.room, f"loads-{Path(self.path).name}")
        return {"weights": np.full(1 << 18, float(Path(self.path).read_text()))}

    def run_inference(self, batch, model, inference_args=None):
        meet(self.room)
        return [PredictionResult(x, float(model["weights"][-1]), str(os.getpid())) for x in batch]
