"""Semantic search over Python's own manual, under Beam's RunInference, with one copy of the model for all processes.

    python examples/semantic_search.py                              compare, kill the loader, answer three questions
    python examples/semantic_search.py "how do I copy a list?"      answer this one
    python examples/semantic_search.py -n 4                         with four SDK processes

`embed` and `shared_handler` are what a user would copy. What measures and shows stands in the files beside this one.
"""

import settings  # noqa: F401

# isort: split

import argparse
import json
import signal
import sys
from pathlib import Path

import apache_beam as beam
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult
from rich.console import Console

from compare import compare
from killing import finish_without_the_loader
from minilm import Encoder, Tokenize, save_state_dict
from onecopy.beam import SharedMemoryModelHandler
from passages import passages
from running import Room
from searching import answer

QUESTIONS = [
    "How do I make sure that a file is closed, even when an error occurs?",
    "What is the difference between == and is?",
    "How can a function take any number of arguments?",
]


DIFF = """
  + from onecopy.beam import SharedMemoryModelHandler
    ...
  - | RunInference(KeyedModelHandler(PytorchModelHandlerTensor(...)))
  + | RunInference(KeyedModelHandler(SharedMemoryModelHandler(PytorchModelHandlerTensor(...))))
"""


def embed(texts: list[str], handler: ModelHandler, options: PipelineOptions, result: Path) -> PipelineResult:
    """Write one line per text, its number and its vector, to files whose names begin with `result`."""
    with beam.Pipeline(options=options) as pipeline:
        _ = (
            pipeline
            | beam.Create(enumerate(texts))
            | beam.Reshuffle()
            | beam.ParDo(Tokenize())
            | RunInference(KeyedModelHandler(handler))
            | beam.MapTuple(lambda number, done: json.dumps([number, done.inference.tolist()]))
            | beam.io.WriteToText(str(result))
        )
    return pipeline.result


def shared_handler(state_dict: Path) -> ModelHandler:
    """Beam's stock handler for torch, with its model in one copy for all processes of the machine."""
    stock = PytorchModelHandlerTensor(state_dict_path=str(state_dict), model_class=Encoder, model_params={})
    return SharedMemoryModelHandler(stock)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Semantic search over Python's own manual, one copy of the model.")
    parser.add_argument("question", nargs="?", help="answer this question only")
    parser.add_argument("-n", type=int, default=2, metavar="N", help="SDK worker processes (default 2)")
    arguments = parser.parse_args()
    # As Ctrl-C does: the room is left, and its temporary folder goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    with Room(screen, embed) as room:
        save_state_dict(room.weights)
        texts = passages()
        if arguments.question:
            questions = [arguments.question]
            run = room.run("reading the manual", texts + questions, shared_handler(room.weights), arguments.n)
        else:
            questions = QUESTIONS
            compare(room, texts, arguments.n)
            screen.print("What switches a pipeline over:", DIFF, markup=False)
            run = finish_without_the_loader(room, texts + questions, arguments.n)
        answer(screen, texts, questions, run.vectors())


if __name__ == "__main__":
    main()
