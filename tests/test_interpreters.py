"""Pythons that cannot have the native part: subinterpreters, free-threaded builds, and where nobody built it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: Imports in a subinterpreter, and in the main one beside it; prints what came of the former.
SUBINTERPRETER = """
import json, sys
import _xxsubinterpreters as interpreters
main_imports, destroyed = sys.argv[1:]
if main_imports == "before":
    import onecopy._core
inner = interpreters.create()
said = []
for module in ("onecopy", "onecopy._core", "onecopy.store"):
    try:
        interpreters.run_string(inner, f"import {module}")
    except interpreters.RunFailedError as error:
        said.append(str(error))
if destroyed == "destroyed":
    interpreters.destroy(inner)
if main_imports == "after":
    import onecopy._core
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    ("main_imports", "destroyed"),
    [("before", "destroyed"), ("after", "left to the exit"), ("never", "left to the exit")],
)
def test_a_subinterpreter_is_refused_with_a_word(main_imports, destroyed):
    """At every import, and it leaves the main interpreter alone: that one has it, and exits."""
    command = [sys.executable, "-X", "faulthandler", "-c", SUBINTERPRETER, main_imports, destroyed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert len(said) == 3
    for error in said:
        assert "NativePartError" in error
        assert "main interpreter only" in error
        assert "WSGIApplicationGroup %{GLOBAL}" in error


#: As on a build that does not look for `.abi3.so`. Here the build itself is simulated, the search is the real one: with the
#: suffixes that CPython's free-threaded builds have (Python/dynload_shlib.c).
WITHOUT = """
import importlib.machinery, importlib.util, sys, sysconfig
if sys.argv[1] == "free-threaded":
    sysconfig.get_config_vars()["Py_GIL_DISABLED"] = 1
suffixes = [suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES if "abi3" not in suffix]
(package,) = importlib.util.find_spec("onecopy").submodule_search_locations
sys.path_importer_cache[package] = importlib.machinery.FileFinder(
    package,
    (importlib.machinery.ExtensionFileLoader, suffixes),
    (importlib.machinery.SourceFileLoader, importlib.machinery.SOURCE_SUFFIXES),
)
import onecopy, onecopy.cli, pickle
pickle.loads(pickle.dumps(onecopy.Holder(dict, "model")))
verbs = {
    "acquire": lambda: onecopy.Holder(dict, "model").acquire(),
    "publish": lambda: onecopy.Store().publish("model", {}),
    "attach": lambda: onecopy.Store().attach("model"),
    "list": lambda: onecopy.Store().list(),
}
for name, verb in verbs.items():
    try:
        verb()
    except ImportError as error:
        assert isinstance(error, onecopy.OneCopyError)
        print(name, error)
print("doctor", onecopy.cli.main(["doctor"]), "ls", onecopy.cli.main(["ls"]))
"""


@pytest.mark.parametrize("build", ["free-threaded", "ordinary"])
def test_without_the_native_part_everything_imports_and_every_verb_says_why(build):
    done = subprocess.run([sys.executable, "-c", WITHOUT, build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    why = {
        "free-threaded": "is a free-threaded build, which does not load extensions for the stable ABI (abi3). "
        "Use a Python with the GIL",
        "ordinary": f"finds none of its kind in {Path(__file__).parents[1]}/python/onecopy. Install the wheel",
    }[build]
    lines = done.stdout.splitlines()
    for verb, line in zip(("acquire", "publish", "attach", "list"), lines[:4], strict=True):
        assert line.startswith(f"{verb} onecopy's native part (onecopy._core) does not load here: Python 3"), line
        assert why in line
    assert lines[4].startswith("LOOK  onecopy's native part")
    assert why in lines[4]
    assert lines[-1] == "doctor 1 ls 1"
    assert why in done.stderr, "ls says it, too"
