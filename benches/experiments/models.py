"""The models, by name: any file of `nets/`, any class of keras.applications, any shape of benches/shapes.py."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any, Protocol


class Model(Protocol):
    name: str
    #: What RunInference is given.
    inference_args: dict[str, Any] | None
    #: What its file is called.
    file: str

    def prepare(self, folder: Path) -> None:
        """Writes its file. Imports the framework: to be called in a process of its own."""

    def handler(self, folder: str, *, large_model: bool) -> Any:
        """Beam's own for it."""

    def examples(self, count: int) -> list[Any]:
        """At least so many, the same in every process."""


@functools.cache
def find(name: str) -> Model:
    """By the name it has in the tables: "T5", "MiniLM", "tiny", "nothing", or a class of keras.applications."""
    family = name.lower().split("-")[0].split(",")[0]
    known = (Path(__file__).parent / "nets" / f"{family}.py").exists()
    model: Model = importlib.import_module(f"nets.{family if known else 'keras_nets'}").find(name)
    return model


if __name__ == "__main__":
    import sys

    made = find(sys.argv[1])
    made.prepare(Path(sys.argv[2]))
    print(made.file)
