"""The finest look: a private and an attached copy of one model in one process, called in turn through `run_inference`.

Each process is one observation: where its memory lies is a matter of chance that no number of calls evens out. Run as a
script, it is one of these: `pairs.py publish|compare MODEL FILES REGISTRY SECONDS BATCH FIRST`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tables
from interval import interval
from plan import Progress

import running

#: (model, batch, processes, seconds of calls in each)
SETS = (("tiny", 1, 5, 2.0), ("MiniLM", 1, 5, 6.0), ("MobileNetV2", 1, 4, 12.0))
#: Imports, too.
SECONDS = 40 + sum(count * (9 + seconds) + 8 for _, _, count, seconds in SETS)


def measure(progress: Progress) -> dict[str, Any]:
    found = []
    with running.prepared(*(name for name, *_ in SETS)) as files:
        for done, (name, batch, processes, seconds) in enumerate(SETS):
            with published(files[name]) as arguments:
                observed = []
                for number in range(processes):
                    progress(
                        done / len(SETS) + number / processes / len(SETS), f"pairs of {name}, process {number + 1}"
                    )
                    more = map(str, (seconds, batch, number % 2))
                    observed.append(json.loads(spoken("compare", *arguments, *more)))
            found.append({"model": name, "batch": batch, "processes": observed})
    return {"sets": found}


@contextmanager
def published(files: running.Files) -> Iterator[list[str]]:
    """A process has it; what the others are told."""
    room = files.folder / f"registry-{uuid.uuid4().hex[:8]}"
    room.mkdir(mode=0o700)
    arguments = [files.model, str(files.folder), str(room)]
    with subprocess.Popen(
        script("publish", *arguments),
        env=running.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as publisher:
        assert publisher.stdin is not None
        assert publisher.stdout is not None
        assert publisher.stdout.readline().strip() == "publisher"
        yield arguments
        publisher.stdin.close()


def script(*arguments: str) -> list[str]:
    return [sys.executable, __file__, *arguments]


def spoken(*arguments: str) -> str:
    done = subprocess.run(script(*arguments), env=running.environment(), check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def write(found: dict[str, Any]) -> str:
    lines = []
    for set_ in found["sets"]:
        processes = set_["processes"]
        row = [
            f"{set_['model']}, batch {set_['batch']}",
            f"{sum(one['pairs'] for one in processes):,}",
            str(len(processes)),
        ]
        for clock in ("cpu", "wall"):
            low, mean, high = interval([one[clock] for one in processes])
            row.append(f"{mean:.4f} ({low:.4f} to {high:.4f})")
        row.append(f"{statistics.median(one['private'] for one in processes) * 1000:.3f}")
        lines.append(row)
    head = [
        "attached / private",
        "pairs of calls",
        "processes",
        "CPU (95 % interval)",
        "wall (95 % interval)",
        "ms of a private call",
    ]
    return tables.markdown(head, lines)


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    return []


def main() -> None:
    what, name, folder, registry, *rest = sys.argv[1:]
    os.environ["ONECOPY_DIR"] = registry
    import models

    from onecopy.beam import SharedMemoryModelHandler

    model = models.find(name)
    plain = model.handler(folder, large_model=False)
    shared = SharedMemoryModelHandler(model.handler(folder, large_model=False), model_identifier="pairs")
    if what == "publish":
        mine = shared.load_model()
        print(role(mine), flush=True)
        sys.stdin.read()
        return
    seconds, batch, first = float(rest[0]), int(rest[1]), int(rest[2])
    # Who is loaded first has the better place in memory, or the worse.
    nets = {handler: handler.load_model() for handler in ((shared, plain), (plain, shared))[first]}
    assert role(nets[shared]) == "attacher"
    print(json.dumps(compared([(shared, nets[shared]), (plain, nets[plain])], model, seconds, batch)))


def role(model: Any) -> str:
    from onecopy.beam import loaded

    found = loaded.find(model)
    assert found is not None, "not shared"
    return found.info.role


def compared(sides: list[tuple[Any, Any]], model: Any, seconds: float, batch: int) -> dict[str, Any]:
    examples = model.examples(batch)[:batch]
    outputs = [list(handler.run_inference(examples, net, model.inference_args)) for handler, net in sides]
    first, second = ([one.inference.numpy().tobytes() for one in output] for output in outputs)
    assert first == second
    wall: tuple[list[float], ...] = ([], [])
    cpu: tuple[list[float], ...] = ([], [])
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        # A B B A: whoever comes second finds the processor's cache as the other left it.
        for which in (0, 1) if len(wall[0]) % 2 else (1, 0):
            handler, net = sides[which]
            start, worked = time.perf_counter(), time.process_time()
            list(handler.run_inference(examples, net, model.inference_args))
            cpu[which].append(time.process_time() - worked)
            wall[which].append(time.perf_counter() - start)
    return {
        "pairs": len(wall[0]),
        # Of pairs, so what slows both does not count.
        "wall": statistics.median(a / b for a, b in zip(*wall, strict=True)),
        "cpu": statistics.median(a / b for a, b in zip(*cpu, strict=True)),
        "private": statistics.median(wall[1]),
    }


if __name__ == "__main__":
    main()
