"""What the models of torch have in common: a state dict, loaded by Beam's handler, or mapped by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor


class Mapped(PytorchModelHandlerTensor):
    """What a careful user writes without onecopy: maps the checkpoint, so that processes share the page cache."""

    def load_model(self) -> torch.nn.Module:
        """The module without memory, then the file's tensors in the place of its own."""
        with torch.device("meta"):
            model = self._model_class(**self._model_params)
        weights = torch.load(self._state_dict_path, mmap=True, weights_only=True)
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)


@dataclass
class Model:
    name: str
    #: The module, as a user's class makes it before it gets its weights.
    build: Callable[..., torch.nn.Module]
    #: With the weights that are saved.
    filled: Callable[[], torch.nn.Module]
    examples: Callable[[int], list[torch.Tensor]]
    parameters: dict[str, Any] = field(default_factory=dict)
    inference_args: dict[str, Any] | None = None
    #: Of the handler, beside those that every model has.
    settings: dict[str, Any] = field(default_factory=dict)
    file: str = "weights.pt"

    def prepare(self, folder: Path) -> None:
        torch.save(self.filled().state_dict(), folder / self.file)

    def handler(self, folder: str, *, large_model: bool) -> PytorchModelHandlerTensor:
        return self._made(PytorchModelHandlerTensor, folder, large_model=large_model)

    def by_hand(self, folder: str) -> Mapped:
        return self._made(Mapped, folder)

    def _made(self, kind: Any, folder: str, **more: Any) -> Any:
        return kind(f"{folder}/{self.file}", self.build, self.parameters, device="CPU", **self.settings, **more)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
