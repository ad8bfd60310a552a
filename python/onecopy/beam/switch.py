"""The switch that needs no code change: ONECOPY on the workers, else --onecopy, else what the constructor said."""

import argparse
import os
from typing import Literal, cast

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.options.value_provider import RuntimeValueProvider

Switch = Literal["auto", "off", "require"]
WORDS = ("auto", "off", "require")


class OneCopyOptions(PipelineOptions):
    """`--onecopy=auto|off|require`, for runners that hand pipeline options to their workers.

    Dataflow, and Flink or Spark through Beam's `boot`, do. Workers of FnApiRunner and of a worker pool get no options:
    set the environment variable ONECOPY there.
    """

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--onecopy",
            choices=WORDS,
            default=None,
            help="auto: share models where possible; off: every SharedMemoryModelHandler behaves like the handler"
            " inside it; require: a model that cannot be shared is an error. ONECOPY in the environment wins.",
        )


def position() -> Switch | None:
    """Where the switch stands in this process; None where nobody touched it.

    Raises ValueError for a word that is none of auto, off, require.
    """
    word, source = os.environ.get("ONECOPY"), "the environment variable ONECOPY"
    if not word:
        word, source = RuntimeValueProvider.get_value("onecopy", str, None), "the pipeline option --onecopy"
    if word is None:
        return None
    if word not in WORDS:
        raise ValueError(f"{source} is {word!r}; it must be one of {', '.join(WORDS)}")
    return cast(Switch, word)
