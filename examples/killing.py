"""The process that loaded the model is killed in the middle of a pipeline that uses it.

It is a plain Python process that called the same handler's `load_model()` first. (It is not one of Beam's workers: Beam's
local runner waits for ever when one of those is killed, with or without onecopy.)
"""

import settings  # noqa: F401

# isort: split

import os
import subprocess
import sys
from pathlib import Path

from compare import stock
from measure import WatchedShared, events
from running import Room, Run

IDENTIFIER = "onecopy-demo-minilm"


def shared(weights: Path) -> WatchedShared:
    """The handler of the process to be killed, and of the pipeline: the same name for the same model."""
    return WatchedShared(stock(weights), model_identifier=IDENTIFIER)


def finish_without_the_loader(room: Room, texts: list[str], workers: int) -> Run:
    """Embed `texts` while the process that loaded the model is killed; print what happened."""
    own_trace = room.folder / "trace-loader"
    with subprocess.Popen(
        [sys.executable, __file__, str(room.weights)],
        env=os.environ | {"DEMO_TRACE": str(own_trace)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as loader:
        with room.screen.status("a plain Python process loads the model"):
            said = loader.stdout.readline() if loader.stdout else ""
        if said != "ready\n":
            raise RuntimeError("the process that should load the model did not")
        killed_at = 0

        def kill_in_the_middle(done: int) -> None:
            nonlocal killed_at
            if not killed_at and done > len(texts) // 3:
                loader.kill()
                killed_at = done

        run = room.run("the whole manual, and a SIGKILL", texts, shared(room.weights), workers, kill_in_the_middle)
        ended = loader.wait()
    loads = [event["event"] for event in events(own_trace)].count("load")
    attached = ", ".join(f"{event['seconds'] * 1e3:.0f} ms" for event in run.events if event["event"] == "ready")
    room.screen.print(
        f"\n[bold]kill -9[/bold] of the process that had loaded the model (a plain Python process, it ended with {ended}) "
        f"after {killed_at} of {len(texts)} vectors: the pipeline finished.\n"
        f"Loads by that process: {loads}. Loads by the {workers} SDK processes, before and after the kill: {run.loads}; "
        f"their whole load_model() took {attached}."
    )
    return run


if __name__ == "__main__":
    model = shared(Path(sys.argv[1])).load_model()
    print("ready", flush=True)
    sys.stdin.read()  # until the demo ends, should nobody kill us
