"""Costs that can be counted, which a noisy machine shows as well as a quiet one: system calls and instructions.

    make bench-check                     # fails where one of them is no more what it was
    python benches/check.py --write      # the new figures are the ones to compare with

System calls by strace(1), of the calling thread and of all; instructions by valgrind(1), `--tool=callgrind`, of the user's
side alone. Both from the moment in which everything is imported and the caller asks, to that in which he has his answer.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ending import end_well

CALLER, ALL, INSTRUCTIONS = "system calls of the caller", "system calls of all threads", "instructions"
#: What was counted last, and by how much a figure may differ from it. Which thread wakes which is chance.
KNOWN = Path(__file__).parent / "counted.json"
MARGIN = 0.10
FEW = {CALLER: 2, ALL: 5, INSTRUCTIONS: 0}
#: Whose versions the figures are of.
PACKAGES = ("torch", "numpy")
#: Of the model: as many parameters as t5-large has, 2.1 MB.
LAYERS, WIDTH = 250, 32
#: System calls that nobody else makes here.
BEGIN, END = "/onecopy-bench-begin", "/onecopy-bench-end"
TOOLS = ("strace", "valgrind", "callgrind_control")


def make() -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH * 2, WIDTH) for _ in range(LAYERS)))


def _attach(store: Any) -> Callable[[], object]:
    return lambda: store.attach("there")


def _acquire_again(store: Any) -> Callable[[], object]:
    import onecopy

    holder = onecopy.Holder(make, "there", store=store)
    _KEPT.append(holder.acquire())
    return lambda: [holder.acquire() for _ in range(1000)]


def _attach_again(store: Any) -> Callable[[], object]:
    """After the first time, the registry is open and the process in it."""
    with store.attach("other"):
        pass
    return lambda: store.attach("there")


def _publish(store: Any) -> Callable[[], object]:
    model = make()
    return lambda: store.publish("new", model)


def _release(store: Any) -> Callable[[], object]:
    lease = store.attach("there")
    return lease.release


_KEPT: list[object] = []
VERBS: dict[str, Callable[[Any], Callable[[], object]]] = {
    "attach": _attach,
    "attach again": _attach_again,
    "1,000 times acquire of what is there": _acquire_again,
    "publish": _publish,
    "release": _release,
}


def serve(verb: str, namespace: str) -> None:
    """In the process that is counted: does one thing when it is told to."""
    import gc

    import torch

    import onecopy

    torch.set_num_threads(1)
    todo = VERBS[verb](onecopy.Store(namespace))
    gc.collect()
    gc.disable()
    print("ready", flush=True)
    sys.stdin.readline()
    os.access(BEGIN, os.F_OK)
    _KEPT.append(todo())
    os.access(END, os.F_OK)
    print("done", flush=True)
    sys.stdin.readline()


@contextmanager
def counted(verb: str, namespace: str, *tool: str) -> Iterator[subprocess.Popen[str]]:
    """That process under a tool, ready to begin."""
    command = [*tool, sys.executable, __file__, "--serve", verb, namespace]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            wait_for(child, "ready")
            yield child
            tell(child)
            if child.wait():
                raise SystemExit(f"{verb}: {' '.join(tool)} ended with {child.returncode}")
        finally:
            child.kill()


def tell(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()


def wait_for(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdout is not None
    if child.stdout.readline().strip() != word:
        raise SystemExit(f"{' '.join(map(str, child.args))} did not say {word!r}")  # type: ignore[union-attr]


def system_calls(verb: str, namespace: str, folder: Path) -> list[tuple[bool, str]]:
    """Whether it was the caller's, and its name."""
    log = folder / "strace"
    with counted(verb, namespace, "strace", "--follow-forks", f"--output={log}") as child:
        tell(child)
        wait_for(child, "done")
    lines = log.read_text(errors="replace").splitlines()
    begin = next(number for number, line in enumerate(lines) if BEGIN in line)
    end = next(number for number, line in enumerate(lines) if END in line)
    caller = lines[begin].split()[0]
    calls = [re.match(r"(\d+) +(\w+)\(", line) for line in lines[begin + 1 : end]]
    return [(call[1] == caller, call[2]) for call in calls if call]


def instructions(verb: str, namespace: str, folder: Path) -> int:
    out = folder / "callgrind"
    tool = ("valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", "--quiet")
    with counted(verb, namespace, *tool) as child:
        _switch(child.pid, "on")
        tell(child)
        wait_for(child, "done")
        _switch(child.pid, "off")
    found = re.search(r"^totals: (\d+)", out.read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def _switch(pid: int, how: str) -> None:
    subprocess.run(["callgrind_control", f"--instr={how}", str(pid)], check=True, capture_output=True)


def measure() -> dict[str, dict[str, int]]:
    import onecopy
    from onecopy import process

    namespace = f"bench-{uuid.uuid4().hex[:8]}"
    store = onecopy.Store(namespace)
    found = {}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="onecopy-bench-") as folder,
            store.publish("there", make()),
            store.publish("other", make()),
        ):
            for verb in VERBS:
                calls = system_calls(verb, namespace, Path(folder))
                found[verb] = {
                    CALLER: sum(own for own, _ in calls),
                    ALL: len(calls),
                    INSTRUCTIONS: instructions(verb, namespace, Path(folder)),
                }
                most = collections.Counter(name for _, name in calls).most_common(4)
                print(f"{verb}: {found[verb]}; most: {most}", flush=True)
    finally:
        # Who is in the table keeps its file.
        process.core_store(store.place).leave()
        subprocess.run(
            [sys.executable, "-m", "onecopy.cli", "--namespace", namespace, "sweep"], check=True, capture_output=True
        )
    return found


def about() -> dict[str, Any]:
    from machine import described

    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"machine": described(), "versions": {"python": platform.python_version(), **versions}}


def compare(found: dict[str, dict[str, int]], known: dict[str, dict[str, int]]) -> list[str]:
    """What differs by more than the margin. What fell, too: beside a figure that is too high, growth is not seen."""
    return [
        f"{verb}: {figure:,} {what}, it was {before:,}"
        for verb, figures in found.items()
        for what, figure in figures.items()
        if abs(figure - (before := known[verb][what])) > before * MARGIN + FEW[what]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("VERB", "NAMESPACE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return 0
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        print(f"bench-check needs {', '.join(missing)}: install strace and valgrind", file=sys.stderr)
        return 2
    end_well()
    facts, found = about(), measure()
    if options.write:
        KNOWN.write_text(json.dumps({**facts, "verbs": found}, indent=2) + "\n")
        return 0
    known = json.loads(KNOWN.read_text())
    changed = compare(found, known["verbs"])
    print("\n".join(changed) or f"nothing differs by more than {MARGIN:.0%}")
    if changed:
        print(f"{KNOWN.name} is of {known['versions']} on {known['machine']}; this is {facts['versions']}")
        print("Where it is meant, or less: python benches/check.py --write")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
