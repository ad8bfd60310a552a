"""`onecopy`: the verbs of the store for the person who is on call. No command needs a framework, but `put`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from onecopy import __version__
from onecopy.cli import commands
from onecopy.errors import ModelNotFoundError, OneCopyError
from onecopy.store import BACKENDS, Store

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_CODES = """exit codes:
  0  done
  1  an error, told on standard error; for `doctor`: something here limits sharing
  2  the command line cannot be read
  3  no such model
"""
#: Remedies in messages, as a script has them and as a person at the command line has them.
PYTHON_TO_OPTIONS = (
    ("Pass replace=True", "Pass --replace"),
    ("Pass version=", "Pass --version "),
    ('backend="posix" or "auto", not "memfd"', "--backend posix or auto, not memfd"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    options = _parser().parse_args(arguments)
    try:
        store = Store(options.namespace, directory=options.directory, backend=getattr(options, "backend", "auto"))
        code: int = options.run(store, options)
    except ModelNotFoundError as error:
        print(f"onecopy: {_for_a_person(error, options)}", file=sys.stderr)
        return 3
    except OneCopyError as error:
        print(f"onecopy: {_for_a_person(error, options)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    return code


def _for_a_person(error: OneCopyError, options: argparse.Namespace) -> str:
    """The message, with the options of the command line for the arguments of Python, and commands that mean this place."""
    said = str(error).replace("`onecopy ", f"`{commands.program(options)} ")
    for python, option in PYTHON_TO_OPTIONS:
        said = said.replace(python, option)
    return said


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onecopy",
        description="One copy of a model's weights per machine: what is shared here, and by whom.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def place(of: argparse.ArgumentParser, namespace: str, directory: str | None) -> None:
        of.add_argument("--namespace", default=namespace, help="set of tags (default: default)")
        of.add_argument(
            "--directory", default=directory, help="where the registry lives (default: $ONECOPY_DIR, or /dev/shm)"
        )

    place(parser, "default", None)
    parser.add_argument("--version", action="version", version=f"onecopy {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, run: object, text: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="one JSON value on standard output")
        # Before the command or after it. Without a default here: it would undo what stands before the command.
        place(command, argparse.SUPPRESS, argparse.SUPPRESS)
        return command

    verb("ls", commands.ls, "List the models of the namespace. Never waits for a loader.")
    show = verb("show", commands.show, "Show every version and generation of a tag, with its holders.")
    show.add_argument("tag")
    put = verb("put", commands.put, "Call MODULE:FUNCTION (looked for here, too) and publish what it returns, pinned.")
    put.add_argument("tag")
    put.add_argument("constructor", metavar="MODULE:FUNCTION")
    put.add_argument("--version", help="your name for the content (a path, a hash)")
    put.add_argument("--replace", action="store_true", help="supersede what is there")
    put.add_argument("--backend", choices=BACKENDS, default="auto")
    remove = verb("rm", commands.rm, "Remove the name of a model. Its memory is freed when the last user leaves.")
    remove.add_argument("tag")
    remove.add_argument("--version", help="this version only")
    sweep = verb("sweep", commands.sweep, "Remove what dead processes left, and the registry's file if nobody uses it.")
    sweep.add_argument("--dry-run", action="store_true", help="only say what would go")
    verify = verb("verify", commands.verify, "Check every buffer of a model against its checksum.")
    verify.add_argument("tag")
    verify.add_argument("--version", help="this version only")
    verb("doctor", commands.doctor, "Say what this machine lets processes share, and the remedy where it does not.")
    return parser
