"""Where the time goes: the parts of publishing and of attaching, in fresh processes.

    python benches/phases.py                  # BERT-base, and the t5-large shape
    python benches/phases.py --rounds 3 BERT-base

Wraps the functions that do the work, and asks the kernel for the page faults of the attaching thread (getrusage(2)). Medians.
"""

from __future__ import annotations

import environment  # noqa: F401 isort: skip (before anything that reads it)

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ending import end_well

SHAPES = ("BERT-base", "t5-large")


class Phases:
    """Milliseconds by the name of what is wrapped, what lies inside counted again."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    def wrap(self, module: Any, name: str, phase: str) -> None:
        work: Callable[..., Any] = getattr(module, name)

        def timed(*args: Any, **options: Any) -> Any:
            with self.phase(phase):
                return work(*args, **options)

        setattr(module, name, timed)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + (time.perf_counter() - began) * 1e3


def publish(shape_name: str, namespace: str) -> None:
    """Loads, publishes, says how long it took, and holds the model until it is told to go."""
    from shapes import find

    import onecopy
    from onecopy import _publish, skeleton

    shape = find(shape_name)
    model = shape.model()
    phases = Phases()
    phases.wrap(skeleton, "take_apart", "taking it apart")
    phases.wrap(_publish, "_fill", "filling, and giving the source back")
    phases.wrap(_publish, "rebuild", "rebuilding it over the mapping")
    with phases.phase("all"):
        lease = onecopy.Store(namespace).publish("model", model)
    found = {"milliseconds": phases.milliseconds, "bytes": lease.info.shared_bytes, "huge": lease.info.huge_bytes}
    print(json.dumps(found), flush=True)
    sys.stdin.readline()


def attach(shape_name: str, namespace: str) -> None:
    """With everything imported that the model needs, and nothing of onecopy used. The publisher has no more to do."""
    import torch
    from peers.ours import wait_for_collapse
    from shapes import find

    import onecopy
    from onecopy import _acquire, skeleton
    from onecopy.frameworks import torch as tensors

    shape = find(shape_name)
    torch.set_num_threads(1)
    shape.warm_up()
    wait_for_collapse(shape.size)
    phases = Phases()
    phases.wrap(_acquire.Acquisition, "_ask", "registry, descriptor, lease, mapping, reading the skeleton")
    phases.wrap(skeleton, "_table", "its table")
    phases.wrap(tensors, "build", "tensors")
    phases.wrap(skeleton, "put_together", "all of rebuilding")
    holder = onecopy.Holder(shape.model, "model", store=onecopy.Store(namespace))
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    with phases.phase("all"):
        model = holder.acquire()
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults
    inferences = []
    for _ in range(4):
        with phases.phase("inference"):
            shape.predict(model)
        inferences.append(phases.milliseconds.pop("inference"))
    assert holder.info is not None
    assert holder.info.role == "attacher"
    parts = phases.milliseconds
    parts["modules, by pickle"] = parts.pop("all of rebuilding") - parts["tensors"] - parts["its table"]
    found = {
        "milliseconds": parts,
        "page faults": faults,
        "first": inferences[0],
        "steady": statistics.median(inferences[1:]),
    }
    print(json.dumps(found), flush=True)


def run(role: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--role", role, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def measure(shape_name: str, rounds: int) -> None:
    published, attached = [], []
    for _ in range(rounds):
        namespace = f"bench-{uuid.uuid4().hex[:8]}"
        try:
            with run("publish", shape_name, namespace) as publisher:
                published.append(answer(publisher))
                with run("attach", shape_name, namespace) as attacher:
                    attached.append(answer(attacher))
                publisher.communicate("go\n")
        finally:
            subprocess.run(
                [sys.executable, "-m", "onecopy.cli", "sweep", "--namespace", namespace],
                check=True,
                capture_output=True,
            )
    size = published[0]["bytes"]
    rates = statistics.median(one["bytes"] / one["milliseconds"]["all"] / 1e6 for one in published)
    huge = statistics.median(one["huge"] / one["bytes"] for one in published)
    print(f"\n### {shape_name}: {size / 1e6:,.0f} MB, medians of {rounds}\n")
    table(f"publishing ({rates:.2f} GB/s, {huge:.0%} in huge pages when READY)", published)
    faults = statistics.median(one["page faults"] for one in attached)
    first = statistics.median(one["first"] / one["steady"] for one in attached)
    table(f"attaching ({faults:,.0f} page faults; first inference / steady: {first:.2f})", attached)


def table(title: str, found: list[dict[str, Any]]) -> None:
    print(f"| {title} | ms |\n|---|---:|")
    for phase in found[0]["milliseconds"]:
        print(f"| {phase} | {statistics.median(one['milliseconds'][phase] for one in found):,.2f} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--role", choices=("publish", "attach"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        {"publish": publish, "attach": attach}[options.role](*options.shapes)
        return
    end_well()
    for shape in options.shapes:
        measure(shape, options.rounds)


if __name__ == "__main__":
    main()
