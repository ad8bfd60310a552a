"""Who keeps the weights, and that nothing stays when nobody does: mapping -> array -> storage -> housekeeping thread."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Forked, Other, wait_until, within
from tasks import Model, counted, loads, mapped, weigh

import onecopy

torch = pytest.importorskip("torch")

SHM = Path("/dev/shm")
WIDE = 512  # a layer of 1 MiB


def segments(namespace: str) -> list[str]:
    return [path.name for path in SHM.glob(f"onecopy-v1-{os.geteuid()}-{namespace}-*")]


def freed(namespace: str) -> bool:
    """Nothing is listed, named or mapped here any more."""
    return not onecopy.Store(namespace).list() and not segments(namespace) and not mapped()


def network() -> Any:
    torch.manual_seed(7)
    layers = torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE), torch.nn.BatchNorm1d(WIDE), torch.nn.Linear(WIDE, WIDE))
    return layers.eval()


@pytest.fixture
def collector() -> Iterator[None]:
    """Nothing may be freed by a collection that happens to come: only what the test itself lets go of."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Torch's own objects are many, and none of our business: without them a collection takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def elsewhere(namespace: str, hatch: Callable[[], Forked]) -> Forked:
    """Another process with torch."""
    return hatch()


# -- The last user of a model may be any part of it.

PARTS: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda model: model[0].weight,
    "detached": lambda model: model[0].weight.detach(),
    "slice": lambda model: model[0].weight[3:5, ::2],
    "numpy view": lambda model: model[0].weight.detach().numpy()[1:],
    "storage": lambda model: model[0].weight.untyped_storage(),
    "typed storage": lambda model: torch.storage.TypedStorage(
        wrap_storage=model[0].weight.untyped_storage(), dtype=torch.float32, _internal=True
    ),
    "memoryview": lambda model: memoryview(model[0].weight.detach().numpy()),
    "dlpack": lambda model: torch.from_dlpack(model[0].weight.detach()),
    "graph": lambda model: model[0](torch.ones(2, WIDE)).sum().grad_fn,
}


@pytest.mark.parametrize(("part", "backend"), [*((part, "memfd") for part in PARTS), ("slice", "posix")])
def test_any_part_of_a_model_keeps_its_weights_and_its_lease(namespace, part, backend, collector, elsewhere):
    store = onecopy.Store(namespace, backend=backend)
    holder = onecopy.Holder(network, "model", store=store)
    model = holder.acquire()
    expected = model[0].weight.detach().clone()
    kept = PARTS[part](model)
    del model
    holder.release()
    del holder
    assert [who[0] for who in store.show("model")[0].holders] == [os.getpid()]
    assert elsewhere("torch_attach", namespace, "model") == weigh(expected), "good for others, too"
    elsewhere("release", "model")
    if isinstance(kept, torch.Tensor) and kept.shape == expected.shape:
        assert torch.equal(kept, expected)
    del kept
    wait_until(lambda: freed(namespace))


def test_an_attached_model_is_kept_by_any_part_of_it_too(namespace, collector, elsewhere):
    store = onecopy.Store(namespace)
    total = elsewhere("torch_publish", namespace, "model", WIDE)
    for part, take in PARTS.items():
        lease = store.attach("model")
        assert lease.info.role == "attacher", part
        kept = take(lease.object)
        lease.release()
        del lease
        assert os.getpid() in [who[0] for who in store.show("model")[0].holders], part
        with store.attach("model") as model:
            assert weigh(model[0].weight) == total
        del kept, model
        wait_until(lambda: len(store.show("model")[0].holders) == 1)
    elsewhere("release", "model")
    wait_until(lambda: freed(namespace))


def test_a_published_objects_own_tensors_keep_the_lease(namespace, collector, elsewhere):
    """`publish` re-points the caller's object; its tensors lie on another mapping than the one that others see."""
    store = onecopy.Store(namespace)
    mine = network()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    store.publish("model", mine).release()
    assert mapped()
    assert len(store.show("model")[0].holders) == 1
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    assert elsewhere("torch_attach", namespace, "model") == weigh(before["0.weight"])
    elsewhere("release", "model")
    del mine
    wait_until(lambda: freed(namespace))


def test_a_cycle_is_freed_by_the_collector(namespace, collector):
    holder = onecopy.Holder(network, "model", store=onecopy.Store(namespace))
    model = holder.acquire()
    model.itself = [model]  # torch would take a module for a child
    holder.release()
    del model
    assert not freed(namespace)
    gc.collect()
    wait_until(lambda: freed(namespace))


# -- Finalizers run anywhere.


class Rude:
    """Its finalizer collects and lets go of a lease: inside whatever call the collector happened to run in."""

    def __init__(self, *kept: Any) -> None:
        self.kept = kept
        self.itself = self

    def __del__(self) -> None:
        for thing in self.kept:
            if isinstance(thing, (onecopy.Holder, onecopy.Lease)):
                thing.release()
        gc.collect()


@pytest.mark.parametrize("threshold", [1, 7])
def test_collections_inside_our_own_calls(namespace, threshold):
    """Cycles over mappings are collected while four threads publish, acquire, attach and let go: nobody hangs."""
    store = onecopy.Store(namespace)
    rounds, failures = 25, []

    def work(number: int) -> None:
        try:
            for turn in range(rounds):
                tag = f"model {(number + turn) % 3}"
                holder = onecopy.Holder(lambda: Model(1.0, mib=1), tag, store=store)
                model = holder.acquire()
                assert model.total() == (1 << 20) / 8
                Rude(holder, model)
                if turn % 5 == 0:
                    with contextlib.suppress(onecopy.errors.ModelNotFoundError):
                        lease = store.attach(tag)
                        Rude(lease, lease.object)
                        del lease
                if turn % 7 == 0:
                    lease = store.publish(tag, Model(1.0, mib=1), replace=True)
                    Rude(lease, lease.object)
                    del lease
                del holder, model
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    before = gc.get_threshold()
    gc.set_threshold(threshold)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*before)
    assert failures == []
    gc.collect()
    wait_until(lambda: freed(namespace))


def test_a_deleter_in_a_thread_that_python_does_not_know(namespace, collector):
    """The last reference of a tensor goes in a C thread, without the GIL: as in torch's own pools."""
    holder = onecopy.Holder(network, "model", store=onecopy.Store(namespace))
    model = holder.acquire()
    managed, deleter = _dlpack(model[0].weight.detach())
    del model
    holder.release()
    assert not freed(namespace)
    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()
    assert libc.pthread_create(ctypes.byref(thread), None, ctypes.c_void_p(deleter), ctypes.c_void_p(managed)) == 0
    assert libc.pthread_join(thread, None) == 0
    wait_until(lambda: freed(namespace))


def _dlpack(tensor: Any) -> tuple[int, int]:
    """(DLManagedTensor, its deleter): a reference to a tensor that C code holds (dlpack.h)."""
    capsule = torch.utils.dlpack.to_dlpack(tensor)
    python = ctypes.pythonapi
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    python.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
    managed = python.PyCapsule_GetPointer(capsule, b"dltensor")
    # Taken over by us: the capsule no longer frees it. The name must outlive the capsule.
    python.PyCapsule_SetName(capsule, _USED)
    # dl_tensor: data, device (2 x int32), ndim, dtype (4 bytes), shape, strides, byte_offset; then manager_ctx, deleter
    return managed, ctypes.c_void_p.from_address(managed + 8 + 8 + 4 + 4 + 8 + 8 + 8 + 8).value


_USED = b"used_dltensor"


def test_backward_in_another_thread_frees_what_the_graph_saved(namespace, collector):
    holder = onecopy.Holder(network, "model", store=onecopy.Store(namespace))
    model = holder.acquire()
    inputs = torch.ones(4, WIDE, requires_grad=True)
    expected = model[0].weight.detach().sum(0).clone()
    loss = torch.nn.functional.linear(inputs, model[0].weight.detach()).sum()
    del model
    holder.release()
    assert not freed(namespace)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert torch.allclose(inputs.grad[0], expected, rtol=1e-4, atol=1e-4)
    wait_until(lambda: freed(namespace))


# -- What users do to models (P5): it works here, and reaches nobody else.


def _half(model: Any) -> Any:
    assert model.half()[0].weight.dtype is torch.float16


def _to(model: Any) -> Any:
    assert model.to(torch.bfloat16)[0].weight.dtype is torch.bfloat16


def _deepcopy(model: Any) -> Any:
    twin = copy.deepcopy(model)
    assert torch.equal(twin[0].weight, model[0].weight)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert model[0].weight.any()


def _share_memory(model: Any) -> Any:
    before = model[0].weight.detach().clone()
    model.share_memory()
    assert model[0].weight.is_shared()
    assert torch.equal(model[0].weight, before)


def _save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model[0].weight.detach(), file)
    assert file.tell() < 1.1 * WIDE * WIDE * 4, "one tensor, not the whole segment"
    file.seek(0)
    assert torch.equal(torch.load(file), model[0].weight.detach())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))


def _optimizer(model: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model[0].weight.detach().clone()
    model(torch.ones(8, WIDE)).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def _train(model: Any) -> Any:
    before = model[1].running_mean.clone()
    model.train()(torch.randn(8, WIDE))
    assert not torch.equal(model[1].running_mean, before)


def _in_place(model: Any) -> Any:
    with torch.no_grad():
        model[0].weight[0] = 1
        model[2].weight.zero_()
    assert model[2].weight.count_nonzero() == 0


def _through_numpy(model: Any) -> Any:
    model[0].weight.detach().numpy()[...] = 3
    assert model[0].weight[5, 5].item() == 3


def _grow(model: Any) -> Any:
    weight = model[0].weight.detach()
    before = weight.clone()
    with pytest.raises(RuntimeError, match="not resizable"):
        weight.resize_(2 * WIDE, WIDE)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    "use",
    [_half, _to, _deepcopy, _share_memory, _save, _optimizer, _train, _in_place, _through_numpy, _grow],
    ids=lambda use: use.__name__.strip("_"),
)
@pytest.mark.parametrize("role", ["publisher", "attacher"])
def test_what_users_do_stays_with_them(namespace, use, role, elsewhere):
    store = onecopy.Store(namespace)
    if role == "attacher":
        total = elsewhere("torch_publish", namespace, "model", WIDE)
        lease = store.attach("model")
    else:
        lease = store.acquire("model", network)
        total = elsewhere("torch_attach", namespace, "model")
    assert lease.info.role == role
    names = {path.name for path in SHM.iterdir()}
    use(lease.object)
    assert elsewhere("torch_total", "model") == total
    assert store.verify("model") > 2 * WIDE * WIDE * 4, "the shared bytes are what was published"
    lease.release()
    del lease
    elsewhere("release", "model")
    gc.collect()
    wait_until(lambda: freed(namespace))
    assert {path.name for path in SHM.iterdir() if path.name.startswith("torch")} <= names


# -- The interpreter exits, whatever state it is in.

PRELUDE = """
import atexit, os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
namespace, log, backend = sys.argv[2:5]
import onecopy, tasks
store = onecopy.Store(namespace, backend=backend)

TAG = f"model in {backend}"  # two of these run at a time

def holder_of(tag=TAG, seconds=0.0, **options):
    return onecopy.Holder(lambda: tasks.counted(log, seconds=seconds, mib=2), tag, store=store, **options)

class SlowToDie:
    # The end of the interpreter takes a while, and other threads get their turn in it.
    def __del__(self, sleep=time.sleep):
        sleep(0.3)

def begun(condition):
    while not condition():
        time.sleep(0.01)
"""

EXITS = {
    "held": "holder = holder_of(); model = holder.acquire()",
    "object only": "model = holder_of().acquire()",
    "array only": "weights = holder_of().acquire().weights[5:]",
    "released": "holder = holder_of(); holder.acquire(); holder.release()",
    "lingering": "with holder_of(linger=600.0) as model: pass\ndel model",
    "cycle": "model = holder_of().acquire(); model.itself = model; del model",
    "lease of a store": "lease = store.publish(TAG, tasks.Model(1.0))",
    "own object of publish": "model = tasks.Model(1.0); store.publish(TAG, model).release()",
    "sys.exit inside with": "with holder_of() as model: sys.exit(0)",
    "sys.exit in a constructor": "onecopy.Holder(lambda: sys.exit(0), TAG, store=store).acquire()",
    "os._exit": "model = holder_of().acquire(); os._exit(0)",
    "os._exit in a constructor": "onecopy.Holder(lambda: os._exit(0), TAG, store=store).acquire()",
    "os._exit in a thread": """
holder = holder_of(); model = holder.acquire()
threading.Thread(target=os._exit, args=(0,)).start()
time.sleep(600)
""",
    "acquire at exit": "atexit.register(lambda: holder_of().acquire())",
    "let go at exit": "holder = holder_of(); holder.acquire(); atexit.register(holder.release)",
    "loading in a daemon": """
threading.Thread(target=holder_of(seconds=600).acquire, daemon=True).start()
begun(lambda: tasks.loads(log))
slow = SlowToDie()
""",
    "publishing in a daemon": """
from onecopy import _publish
filled = threading.Event()
def stays(attached): filled.set(); time.sleep(600)
_publish.rebuild = stays
threading.Thread(target=holder_of().acquire, daemon=True).start()
filled.wait()
slow = SlowToDie()
""",
    "waiting for a thread in daemons": """
for number in range(3): threading.Thread(target=holder_of(seconds=600).acquire, daemon=True).start()
begun(lambda: tasks.loads(log))
slow = SlowToDie()
""",
    "acquiring in daemons": """
import logging
logging.disable()  # a thread that the exit overtakes may have something to say, but must not break anything
def work(number):
    while True:
        holder_of(f"{TAG} {number % 2}").acquire()
        store.list()
for number in range(4): threading.Thread(target=work, args=(number,), daemon=True).start()
begun(lambda: tasks.loads(log) > 2)
slow = SlowToDie()
""",
    "held in a thread": """
def work():
    with holder_of() as model: model.total()
threading.Thread(target=work).start()
""",
    "torch": """
import torch
holder = onecopy.Holder(lambda: torch.nn.Linear(512, 512), TAG, store=store); model = holder.acquire()
saved = (model.weight * 2).sum()  # a tensor that C++ keeps
""",
}


# Torch takes seconds to start: once must do.
BACKENDS = ("memfd", "posix")


def start(namespace: str, log: str, backend: str, script: str) -> subprocess.Popen[str]:
    # Python looks for its own mistakes in development mode, which makes torch start twice as slowly.
    options = [] if "import torch" in script else ["-X", "dev"]
    arguments = [str(Path(__file__).parent), namespace, log, backend]
    command = [sys.executable, *options, "-c", PRELUDE + script, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status, and what it said on standard error."""
    _, said = process.communicate()
    return process.returncode, said


@pytest.mark.parametrize("state", EXITS)
def test_exit_leaves_nothing(namespace, state, tmp_path):
    both = [
        start(namespace, str(tmp_path / backend), backend, EXITS[state]) for backend in BACKENDS[state == "torch" :]
    ]
    assert {end(process) for process in both} == {(0, "")}
    # Whoever kills himself cannot clean up: for others his claims are void at the first look.
    store = onecopy.Store(namespace)
    if state.startswith("os._exit") or state == "acquiring in daemons":
        store.sweep()
    assert all(not row.holders and row.publisher is None and row.state in ("vacant", "stale") for row in store.list())
    assert segments(namespace) == []


@pytest.mark.parametrize("backend", ["memfd", "posix"])
def test_exit_while_threads_wait_for_another_process(namespace, backend, tmp_path):
    """A thread that comes back from its wait when the interpreter is going must not bring the process down."""
    log = str(tmp_path / "loads")
    with Other() as loader:
        loader.start("acquire", namespace, "model", log, seconds=600.0)
        wait_until(lambda: loads(log) == 1)
        script = """
for number in range(4): threading.Thread(target=holder_of("model").acquire, daemon=True).start()
begun(lambda: len(os.listdir("/proc/self/task")) > 4)
time.sleep(0.2)
slow = SlowToDie()
"""
        assert end(start(namespace, log, backend, script)) == (0, "")
        (row,) = onecopy.Store(namespace).list()
        assert (row.state, row.publisher) == ("loading", (loader.pid, "python"))
        loader.kill()
    assert all(not row.holders and row.publisher is None for row in onecopy.Store(namespace).list())


#: What ends a process that does nothing about SIGTERM, by the state that it says it is in.
TERMINATED = {
    "held": "model = holder_of().acquire(); tell(); time.sleep(600)",
    "loading": "onecopy.Holder(lambda: (tell(), time.sleep(600)), TAG, store=store).acquire()",
    "publishing": """
from onecopy import _publish
def stays(attached): tell(); time.sleep(600)
_publish.rebuild = stays
holder_of().acquire()
""",
    "waiting": """
threading.Thread(target=holder_of(seconds=600).acquire, daemon=True).start()
begun(lambda: tasks.loads(log))
tell()
holder_of(TAG).acquire()
""",
}


@pytest.mark.parametrize("state", TERMINATED)
def test_sigterm_leaves_nothing_that_the_next_one_does_not_find(namespace, state, tmp_path):
    """No handler, no exit of the interpreter: dead at once. The next process loads, and sweeps."""
    script = "def tell(): os.write(2, b'x')\n" + TERMINATED[state]
    both = [start(namespace, str(tmp_path / backend), backend, script) for backend in BACKENDS]
    for process in both:
        assert process.stderr is not None
        assert process.stderr.read(1) == "x"
        process.terminate()
        assert end(process) == (-signal.SIGTERM, "")
    for backend in BACKENDS:
        holder = onecopy.Holder(
            lambda: Model(1.0), f"model in {backend}", store=onecopy.Store(namespace, backend=backend)
        )
        assert holder.acquire().total() > 0
        assert holder.info.role == "publisher"
        holder.release()
    del holder
    wait_until(lambda: onecopy.Store(namespace).sweep() is not None and freed(namespace))


@pytest.mark.parametrize("backend", ["memfd", "posix"])
def test_exit_by_ctrl_c_while_waiting(namespace, backend, tmp_path):
    log = str(tmp_path / "loads")
    with Other() as loader:
        loader.start("acquire", namespace, "model", log, seconds=600.0)
        wait_until(lambda: loads(log) == 1)
        script = """
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
holder_of("model").acquire()
"""
        code, said = end(start(namespace, log, backend, script))
        assert code == -signal.SIGINT, said
        assert said.rstrip().endswith("KeyboardInterrupt")
        loader.kill()
    assert all(not row.holders and row.publisher is None for row in onecopy.Store(namespace).list())


# -- Many threads.


def test_sixty_four_threads_and_eight_tags(namespace, tmp_path):
    log = str(tmp_path / "loads")
    store = onecopy.Store(namespace)
    gate = threading.Barrier(64)
    got: dict[str, list[Any]] = {f"model {number}": [] for number in range(8)}

    def work(tag: str) -> None:
        holder = onecopy.Holder(lambda: counted(log, mib=1), tag, store=store)
        gate.wait()
        got[tag].append(holder.acquire())

    threads = [threading.Thread(target=work, args=(f"model {number % 8}",)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads(log) == 8
    assert [len({id(model) for model in models}) for models in got.values()] == [1] * 8
    assert [len(models) for models in got.values()] == [8] * 8
    assert sorted(len(row.holders) for row in store.list()) == [1] * 8
    got.clear()
    wait_until(lambda: freed(namespace))


def test_threads_attach_the_same_object_and_one_lease(namespace):
    store = onecopy.Store(namespace)
    with Other() as other:
        other("publish", namespace, "model", 1.0)
        for _ in range(20):
            gate = threading.Barrier(6)
            leases: list[onecopy.Lease] = []

            def work(gate: threading.Barrier = gate, leases: list[onecopy.Lease] = leases) -> None:
                gate.wait()
                leases.append(store.attach("model"))

            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len({id(lease.object) for lease in leases}) == 1
            # The round before may still be giving its own back.
            both = sorted((os.getpid(), other.pid))
            assert within(20, lambda both=both: sorted(who[0] for who in store.show("model")[0].holders) == both)
            leases.clear()
            del work
        wait_until(lambda: len(store.show("model")[0].holders) == 1)


def test_a_process_has_one_lease_of_a_segment_however_it_came_to_it(namespace):
    """Two stores that differ in `backend` are two slots of the process, and one entry of the registry."""
    with Other() as other:
        other("publish", namespace, "model", 1.0)
        roles: set[str] = set()
        gate = threading.Barrier(3)

        def work(backend: str) -> None:
            holder = onecopy.Holder(lambda: Model(1.0), "model", store=onecopy.Store(namespace, backend=backend))
            for _ in range(100):
                gate.wait()
                holder.acquire()
                roles.add(holder.info.role)
                holder.release()

        threads = [threading.Thread(target=work, args=(backend,)) for backend in ("auto", "memfd", "posix")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        del work
        gc.collect()
        assert roles == {"attacher"}
        wait_until(lambda: [who[0] for who in onecopy.Store(namespace).show("model")[0].holders] == [other.pid])


def test_a_model_let_go_of_is_found_again_or_attached_again_never_private(namespace):
    """The housekeeping thread gives the lease back while the next acquire is on its way."""
    holder = onecopy.Holder(lambda: Model(1.0, mib=1), "model", store=onecopy.Store(namespace))
    roles = set()
    for _ in range(300):
        holder.acquire()
        roles.add(holder.info.role)
        holder.release()
    assert roles <= {"publisher", "attacher"}
