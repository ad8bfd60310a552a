"""Whether this Python can have the native part, and in words if not."""

from __future__ import annotations

import importlib
import sys
import sysconfig
from pathlib import Path

from onecopy.errors import NativePartError


def refuse_subinterpreters() -> None:
    """Raises NativePartError in one.

    The native part keeps one state a process. Whichever interpreter imported it first would have it, and the main one, where
    exit is noticed, perhaps not.
    """
    for name in ("_interpreters", "_xxsubinterpreters"):  # Python 3.13, and before
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            message = (
                "onecopy works in the main interpreter only, and this is a subinterpreter (NumPy does not support them, either). "
                "Use processes; under mod_wsgi: WSGIApplicationGroup %{GLOBAL}"
            )
            raise NativePartError(message)
        return


def why_no_native_part() -> NativePartError:
    """For a Python that finds none of its own kind."""
    version = f"Python {sys.version.split()[0]}"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        reason = f"{version} is a free-threaded build, which does not load extensions for the stable ABI (abi3)"
        remedy = "Use a Python with the GIL, 3.11 or later"
    else:
        reason = f"{version} finds none of its kind in {Path(__file__).parent}"
        remedy = "Install the wheel for this platform (pip install --force-reinstall onecopy), or build it (make build)"
    return NativePartError(f"onecopy's native part (onecopy._core) does not load here: {reason}. {remedy}")
