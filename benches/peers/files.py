"""Peers whose model is a file. It lies in a tmpfs: the best case for them, no disk is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import Shape, no_chance

from peers.peer import Peer


class TorchFile(Peer):
    store = "model.pt"

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        if not (folder / self.store).exists():
            torch.save(make(), folder / self.store)


class TorchLoad(TorchFile):
    name = "torch.load"
    settings = "the whole model, weights_only=False"
    own = 1.0

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        return torch.load(folder / self.store, weights_only=False)


class TorchLoadMapped(TorchFile):
    name = "torch.load(mmap)"
    settings = "the whole model, mmap=True, weights_only=False"

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        return torch.load(folder / self.store, mmap=True, weights_only=False)


class Safetensors(Peer):
    store = "model.safetensors"
    packages = ("safetensors", "torch")

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        if (folder / self.store).exists():
            return
        model = make()
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder, max_shard_size="100GB")
        else:
            from safetensors.torch import save_model

            save_model(model, str(folder / self.store))
        # What the format does not hold: buffers that are not persistent, and which parameters are one.
        kept = model.state_dict().keys()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name not in kept}
        first: dict[int, str] = {}
        tied = {
            name: first[id(weight)]
            for name, weight in model.named_parameters(remove_duplicate=False)
            if first.setdefault(id(weight), name) != name
        }
        torch.save((buffers, tied), folder / "rest.pt")

    def hand_over(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        from safetensors.torch import save_model

        save_model(make(), str(folder / self.store))


class SafetensorsAssigned(Safetensors):
    name = "safetensors + assign"
    settings = (
        "load_file, load_state_dict(assign=True) into a model built on the meta device without initial values; buffers "
        "that the file does not hold, and which weights are tied, are known before"
    )

    def prepare(self, shape: Shape, folder: Path) -> None:
        self.rest = torch.load(folder / "rest.pt")

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        from safetensors.torch import load_file

        with torch.device("meta"), no_chance():
            model = shape.build()
        weights = load_file(folder / self.store)
        model.load_state_dict(weights, strict=False, assign=True)
        buffers, tied = self.rest
        for name, other in tied.items():
            # Of the names of one parameter the file holds any one.
            there = other if other in weights else next(n for n, o in tied.items() if o == other and n in weights)
            _set(model, other, weight := model.get_parameter(there))
            _set(model, name, weight)
        for name, buffer in buffers.items():
            _set(model, name, buffer)
        return model.eval().requires_grad_(False)


def _set(model: torch.nn.Module, name: str, what: Any) -> None:
    at, _, last = name.rpartition(".")
    setattr(model.get_submodule(at), last, what)


class FromPretrained(Safetensors):
    name = "from_pretrained"
    packages = ("transformers", "safetensors", "torch")
    settings = "one safetensors file"

    def cannot(self, shape: Shape) -> str | None:
        return "not a model of transformers" if shape.name.endswith("MiB") else None

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        import transformers

        kind = transformers.T5ForConditionalGeneration if shape.name.startswith("t5") else transformers.BertModel
        return kind.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval().requires_grad_(False)


class Joblib(Peer):
    """It maps numpy arrays alone."""

    name = "joblib(mmap)"
    packages = ("joblib", "zerocopy")
    settings = (
        'mmap_mode="r" of what zerocopy.extract_tensors gives, then replace_tensors: joblib maps numpy arrays alone'
    )
    store = "model.joblib"
    peak = 4.0

    def put(self, shape: Shape, make: Callable[[], torch.nn.Module], folder: Path) -> None:
        import joblib
        import zerocopy

        joblib.dump(zerocopy.extract_tensors(make()), folder / self.store)

    def attach(self, shape: Shape, folder: Path, ticket: Any) -> Any:
        import joblib
        import zerocopy

        model, tensors = joblib.load(folder / self.store, mmap_mode="r")
        zerocopy.replace_tensors(model, tensors)
        return model
