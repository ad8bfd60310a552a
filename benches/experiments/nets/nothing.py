"""No model: what a job costs without one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from apache_beam.ml.inference.base import ModelHandler, PredictionResult


class Nothing:
    """Beam keeps models by weak reference, which `object()` cannot have."""


class Handler(ModelHandler[int, PredictionResult, Nothing]):
    def load_model(self) -> Nothing:
        return Nothing()

    def run_inference(
        self, batch: Sequence[int], model: Nothing, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        return [PredictionResult(example, example) for example in batch]


class Model:
    name = file = "nothing"
    inference_args = None

    def prepare(self, folder: Path) -> None:
        (folder / self.file).touch()

    def handler(self, folder: str, *, large_model: bool) -> Handler:
        return Handler()

    def examples(self, count: int) -> list[int]:
        return list(range(count))


def find(name: str) -> Model:
    return Model()
