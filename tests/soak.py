"""Random killing. Processes come, acquire, use and check what they have, replace it, fork, let go and leave, and are killed
by SIGKILL at random moments. Afterwards nothing may be wrong, stuck or left.

    python tests/soak.py [--seconds 600] [--workers 6] [--seed N]

The seed gives every worker its steps and the killer his victims and moments (what runs between two moments is up to the
machine). Exit code 1, with the seed, where something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import onecopy
from onecopy import process

TAGS = ("a", "b", "c")
COUNT = 1 << 18  # float64: 2 MiB
#: Seconds without a step, or until what is to happen has happened: for hangs.
HANGS = 60.0
SHM = Path("/dev/shm")
#: The one reason for a copy of one's own that these steps give.
OVERTAKEN = "replaced or removed 3 times while it was loaded"


def weights(value: int) -> np.ndarray:
    """What `value` looks like: every number of it can be checked."""
    return (np.arange(COUNT, dtype=np.float64) * (value % 97 + 1)) % 251


class Worker:
    """One process's steps, until it leaves by itself. `told`: where it writes what is wrong, and that it gets on."""

    def __init__(self, namespace: str, told: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.store = onecopy.Store(namespace, backend=self.random.choice(["memfd", "posix", "auto"]))
        self.told = told
        self.held: dict[str, onecopy.Holder[dict[str, object]]] = {}

    def run(self) -> None:
        steps: list[Callable[[], None]] = [self.acquire] * 6 + [self.use] * 8 + [self.let_go] * 4
        steps += [self.replace, self.fork, self.remove]
        for number in range(self.random.randrange(5, 400)):
            self.random.choice(steps)()
            self.told.write_text(str(number))
        self.use()

    def acquire(self) -> None:
        tag = self.random.choice(TAGS)
        value = self.random.randrange(1 << 16)
        linger = self.random.choice([0.0, 0.0, 0.05])
        holder = onecopy.Holder(
            lambda: {"value": value, "weights": weights(value)}, tag, store=self.store, linger=linger
        )
        self.check(holder.acquire())
        assert holder.info is not None
        if holder.info.role == "private" and OVERTAKEN not in holder.info.reason:
            self.wrong(f"a copy of its own: {holder.info}")
        self.held[tag] = holder

    def use(self) -> None:
        for holder in self.held.values():
            self.check(holder.acquire())

    def let_go(self) -> None:
        if self.held:
            self.held.pop(self.random.choice(list(self.held))).release()

    def replace(self) -> None:
        value = self.random.randrange(1 << 16)
        lease = self.store.publish(self.random.choice(TAGS), {"value": value, "weights": weights(value)}, replace=True)
        self.check(lease.object)

    def remove(self) -> None:
        with contextlib.suppress(onecopy.errors.ModelNotFoundError):
            self.store.remove(self.random.choice(TAGS))

    def fork(self) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                self.use()
                self.acquire()
                os._exit(0)
            except BaseException as error:
                self.wrong(f"in a forked child: {type(error).__name__}: {error}")
                os._exit(1)
        os.waitpid(pid, 0)

    def check(self, model: dict[str, object]) -> None:
        if not np.array_equal(model["weights"], weights(int(model["value"]))):  # type: ignore[call-overload]
            self.wrong(f"other weights than those of {model['value']}")

    def wrong(self, what: str) -> None:
        self.told.with_suffix(".wrong").write_text(f"process {os.getpid()}: {what}\n")


def start(namespace: str, folder: Path, seed: int) -> int:
    """Forks a worker: everything is imported already."""
    told = folder / str(seed)
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = 1
    try:
        worker = Worker(namespace, told, seed)
        try:
            worker.run()
            code = 0
        except BaseException as error:
            worker.wrong(f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        process._at_exit()
    finally:
        os._exit(code)


def soak(seconds: float, workers: int, seed: int, namespace: str) -> dict[str, int]:
    """Runs it; how many were started, killed, left by themselves.

    Raises AssertionError with what is wrong.
    """
    chance = random.Random(seed)
    living: dict[int, int] = {}
    counts = {"started": 0, "killed": 0, "left": 0}
    with tempfile.TemporaryDirectory(prefix="onecopy-soak-") as name:
        folder = Path(name)
        ends = time.monotonic() + seconds
        try:
            while time.monotonic() < ends:
                while len(living) < workers:
                    counts["started"] += 1
                    living[start(namespace, folder, seed * 1_000_003 + counts["started"])] = counts["started"]
                time.sleep(chance.expovariate(1 / 0.06))
                counts["left"] += reap(living)
                if living:
                    victim = sorted(living)[chance.randrange(len(living))]
                    os.kill(victim, signal.SIGKILL)
                    os.waitpid(victim, 0)
                    del living[victim]
                    counts["killed"] += 1
                told(folder)
        finally:
            stuck = finish(living)
            told(folder)
        assert not stuck, f"{stuck} processes got nowhere for {HANGS:.0f} s"
    nothing_left(namespace)
    return counts


def reap(living: dict[int, int]) -> int:
    """Those that have ended by themselves; how many."""
    ended = [pid for pid in living if os.waitpid(pid, os.WNOHANG)[0]]
    for pid in ended:
        del living[pid]
    return len(ended)


def finish(living: dict[int, int]) -> int:
    """Lets the last ones end by themselves; how many had to be killed for hanging."""
    give_up = time.monotonic() + HANGS
    while living and time.monotonic() < give_up:
        reap(living)
        time.sleep(0.01)
    for pid in living:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(living)


def told(folder: Path) -> None:
    wrong = [path.read_text() for path in folder.glob("*.wrong")]
    assert not wrong, "".join(wrong)


def nothing_left(namespace: str) -> None:
    store = onecopy.Store(namespace)
    store.sweep()
    give_up = time.monotonic() + HANGS
    # Children of the killed may still be on their way out.
    while any(row.state != "stale" for row in store.list()) and time.monotonic() < give_up:
        time.sleep(0.05)
        store.sweep()
    rows = [row for row in store.list() if row.state != "stale"]
    assert rows == [], rows
    # No row of a process, of a lease or of a segment.
    assert store.sweep(dry_run=True) == []
    left = [path.name for path in SHM.glob(f"onecopy-v1-{os.geteuid()}-{namespace}-*")]
    assert left == [], left


def main() -> None:
    parser = argparse.ArgumentParser(description="Random killing, with checks.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20))
    options = parser.parse_args()
    namespace = f"soak-{os.getpid()}"
    print(f"seed {options.seed}", flush=True)
    counts = soak(options.seconds, options.workers, options.seed, namespace)
    assert process.core_store(process.Place(namespace)).remove_registry_if_unused()
    print(
        f"{counts['started']} processes, {counts['killed']} killed, {counts['left']} left by themselves: nothing wrong"
    )


if __name__ == "__main__":
    main()
