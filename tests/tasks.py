"""What other processes do in the tests. Each function runs in a process of its own, see `processes.Other`."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

import onecopy
from onecopy import process

KEPT: dict[str, Any] = {}


class Broken:
    """Fails to be built again in a process that is told so."""

    def __init__(self, count: int) -> None:
        self.weights = np.arange(count, dtype=np.float64)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if os.environ.get("ONECOPY_TEST_BROKEN"):
            raise AttributeError("class Broken cannot live here")
        self.__dict__.update(state)


class Model:
    """Weights, and a plain attribute."""

    def __init__(self, value: float, mib: int = 4) -> None:
        self.value = value
        self.weights = np.full((mib << 20) // 8, value)

    def total(self) -> float:
        return float(self.weights.sum())


def counted(log: str, value: float = 1.0, seconds: float = 0.0, mib: int = 4) -> Model:
    """Makes a model, and leaves a line in `log` for every load."""
    with Path(log).open("a") as lines:
        lines.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    return Model(value, mib)


def loads(log: str) -> int:
    return len(Path(log).read_text().splitlines()) if Path(log).exists() else 0


def acquire(
    namespace: str,
    tag: str,
    log: str,
    *,
    value: float = 1.0,
    seconds: float = 0.0,
    mib: int = 4,
    backend: str = "auto",
    timeout: float | None = None,
    version: str | None = None,
    linger: float = 0.0,
) -> tuple[float, str, str, int]:
    """Acquires and keeps; (sum of the weights, role, backend, generation)."""
    store = onecopy.Store(namespace, backend=backend)
    holder = onecopy.Holder(
        lambda: counted(log, value, seconds, mib), tag, store=store, timeout=timeout, version=version, linger=linger
    )
    model = holder.acquire()
    KEPT[tag] = holder
    assert holder.info is not None
    return model.total(), holder.info.role, holder.info.backend, holder.info.generation


def release(tag: str) -> None:
    KEPT.pop(tag)


def publish(
    namespace: str, tag: str, value: float = 1.0, *, pin: bool = False, replace: bool = False, backend: str = "auto"
) -> tuple[float, int]:
    lease = onecopy.Store(namespace, backend=backend).publish(tag, Model(value), pin=pin, replace=replace)
    KEPT[tag] = lease
    return lease.object.total(), lease.info.generation


def attach(namespace: str, tag: str, timeout: float | None = None) -> tuple[float, int]:
    lease = onecopy.Store(namespace).attach(tag, timeout=timeout)
    KEPT[tag] = lease
    return lease.object.total(), lease.info.generation


def total(tag: str) -> float:
    kept = KEPT[tag]
    model = kept.acquire() if isinstance(kept, onecopy.Holder) else kept.object
    return float(model.total())


def write_in_place(tag: str) -> float:
    kept = KEPT[tag]
    model = kept.acquire() if isinstance(kept, onecopy.Holder) else kept.object
    model.weights[:1000] = -1.0
    return float(model.total())


def broken(namespace: str, tag: str) -> tuple[str, str]:
    holder = onecopy.Holder(lambda: Broken(1 << 20), tag, store=onecopy.Store(namespace))
    holder.acquire()
    KEPT[tag] = holder
    assert holder.info is not None
    return holder.info.role, holder.info.reason


def fails(namespace: str, tag: str, log: str, seconds: float = 0.0) -> str:
    """A constructor that raises."""

    def constructor() -> Model:
        counted(log, seconds=seconds)
        raise LookupError("no such checkpoint")

    try:
        onecopy.Holder(constructor, tag, store=onecopy.Store(namespace)).acquire()
    except LookupError as error:
        return str(error)
    return "nothing was raised"


def close_descriptors() -> None:
    """What daemons do: everything above standard error is closed."""
    keep = {int(os.environ["ONECOPY_TEST_IN"]), int(os.environ["ONECOPY_TEST_OUT"])}
    for path in list(Path("/proc/self/fd").iterdir()):
        number = int(path.name)
        if number > 2 and number not in keep:
            with contextlib.suppress(OSError):
                os.close(number)


def fork_and_total(tag: str) -> tuple[float, int]:
    """The sum as a forked child sees it, and the child's exit status."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(total(tag)).encode())
        os._exit(0)
    os.close(writing)
    seen = os.read(reading, 100)
    os.close(reading)
    return float(seen), os.waitpid(child, 0)[1]


def fork_and_leave(tag: str) -> int:
    """Forks a child that keeps the model and waits; its pid. The caller may be killed then."""
    child = os.fork()
    if child == 0:
        total(tag)
        time.sleep(600)
        os._exit(0)
    return child


def memory() -> dict[str, int]:
    """Pss and Anonymous of this process's mapping of segments, in bytes."""
    found = {"Pss": 0, "Anonymous": 0}
    inside = False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                inside = "/memfd:onecopy" in line or "/dev/shm/onecopy" in line
            elif inside and first[:-1] in found:
                found[first[:-1]] += int(line.split()[1]) << 10
    return found


def environment(name: str, value: str) -> None:
    os.environ[name] = value


def mapped() -> list[str]:
    """Mappings of segments in this process, one line of /proc/self/maps each."""
    with Path("/proc/self/maps").open() as lines:
        return [line for line in lines if "/memfd:onecopy" in line or re.search(r"/onecopy-v\d+-.*-[0-9a-f]{32}", line)]


def torch_publish(namespace: str, tag: str, wide: int) -> float:
    import torch

    torch.manual_seed(7)
    layers = torch.nn.Sequential(torch.nn.Linear(wide, wide), torch.nn.BatchNorm1d(wide), torch.nn.Linear(wide, wide))
    KEPT[tag] = onecopy.Store(namespace).publish(tag, layers.eval())
    return torch_total(tag)


def torch_attach(namespace: str, tag: str) -> float:
    KEPT[tag] = onecopy.Store(namespace).attach(tag)
    return torch_total(tag)


def torch_total(tag: str) -> float:
    """The sum of the first layer's weights."""
    return float(KEPT[tag].object[0].weight.detach().double().sum())


def leave(namespace: str) -> None:
    """As at exit: this process goes out of the namespace's table."""
    KEPT.clear()
    gc.collect()
    process.core_store(process.Place(namespace)).leave()
