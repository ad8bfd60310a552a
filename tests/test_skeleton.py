"""The skeleton itself: which classes and functions it names and which it contains, and what it says when it cannot."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from apart import DATA_START, MIB, OtherProcess, fingerprint, other_process, round_trip

from onecopy.skeleton import Unshareable, collector, put_together, take_apart

__all__ = ["other_process"]  # a fixture


def weights(megabytes: int = 2) -> np.ndarray[Any, Any]:
    return np.arange(megabytes * MIB // 8, dtype="f8")


class Box:
    def __init__(self, **content: object) -> None:
        self.__dict__.update(content)


def test_local_classes_and_lambdas_travel(other_process: OtherProcess) -> None:
    class Local(Box):
        def double(self) -> Any:
            return self.data * 2

    obj = Local(data=weights(), f=lambda box: box.double().sum())
    seen = other_process(take_apart(obj), lambda box: (box.f(box), type(box).__name__))
    assert seen.result == (weights().sum() * 2, "Local")


def test_cycles_and_shared_parts_are_kept() -> None:
    box = Box(data=weights(), name="a")
    box.me, box.again = box, [box.data, box.data]
    made = round_trip(take_apart(box))
    assert made.me is made
    assert made.again[0] is made.again[1]
    assert made.again[0] is made.data


@pytest.mark.parametrize("obj", [None, [None], {"a": 1}, "text" * MIB], ids=["none", "list", "dict", "text"])
def test_objects_without_arrays_are_not_worth_it(obj: object) -> None:
    with pytest.raises(Unshareable) as raised:
        take_apart(obj)
    assert raised.value.silent
    assert round_trip(take_apart(obj, least_shared=0)) == obj


class Refusing:
    def __reduce__(self) -> Any:
        raise RuntimeError("no, thank you")


UNPICKLABLE: dict[str, tuple[Callable[[], object], str]] = {
    "lock": (
        lambda: Box(a=[weights(), {"k": Box(lock=threading.Lock())}]),
        r"_thread\.lock.*\(at \.a\[1\]\['k'\]\.lock\)",
    ),
    "generator": (lambda: {"data": weights(), "next": (i for i in ())}, r"generator.*\(at \['next'\]\)"),
    "own_reduce": (lambda: (weights(), Refusing()), r"RuntimeError: no, thank you \(at \[1\]\)"),
    "itself": (Refusing, r"RuntimeError: no, thank you\. To share it, leave that out"),
}


@pytest.mark.parametrize(("build", "reason"), UNPICKLABLE.values(), ids=UNPICKLABLE.keys())
def test_what_cannot_be_pickled_is_named(build: Callable[[], object], reason: str) -> None:
    with pytest.raises(Unshareable, match=reason) as raised:
        take_apart(build())
    assert not raised.value.silent


def test_deep_recursion_is_a_reason() -> None:
    nest: list[Any] = [weights()]
    for _ in range(100_000):
        nest = [nest]
    with pytest.raises(Unshareable, match="recursion"):
        take_apart(nest)
    while nest and isinstance(nest[0], list):  # or its own destruction recurses
        nest = nest[0]


def test_memory_errors_come_out_as_they_are() -> None:
    class Full:
        def __reduce__(self) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError):
        take_apart([weights(), Full()])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda _: b"", "shorter than its header"),
        (lambda s: s[:20], "shorter than its header"),
        (lambda s: b"junk" + s[4:], "begins with b'junk'"),
        (lambda s: s[:4] + b"\x09" + s[5:], "version 9"),
        (lambda s: s[:-1], "whose header speaks of"),
        (lambda s: s + b"x", "whose header speaks of"),
        (lambda s: s[:8] + b"\xff" * 8 + s[16:], "whose header speaks of"),
        (lambda s: s[:32] + b"\x00" * 64 + s[96:], "table"),
    ],
)
def test_nonsense_is_a_value_error(damage: Callable[[bytes], bytes], complaint: str) -> None:
    skeleton = take_apart(weights()).skeleton
    with pytest.raises(ValueError, match=complaint):
        put_together(damage(skeleton), bytearray(DATA_START + 2 * MIB), DATA_START)


def test_a_mapping_that_is_too_short_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="mapping"):
        put_together(take_apart(weights()).skeleton, bytearray(MIB), DATA_START)


@pytest.mark.parametrize("set_it", [gc.enable, gc.disable])
def test_the_collector_is_left_as_it_was(set_it: Callable[[], None]) -> None:
    was = gc.isenabled()
    parts = take_apart(weights())
    try:
        set_it()
        enabled = gc.isenabled()
        round_trip(parts)
        assert gc.isenabled() is enabled
        with pytest.raises(ValueError, match="mapping"):
            put_together(parts.skeleton, bytearray(MIB), DATA_START)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


def collections_after(parts: Any) -> int:
    """How many there were until many young objects were made after it; what is put together has 3,000."""
    gc.collect()
    before = sum(generation["collections"] for generation in gc.get_stats())
    made = put_together(parts.skeleton, bytearray(DATA_START + parts.data_bytes), DATA_START)
    more = [[] for _ in range(gc.get_threshold()[0] // 2)]
    assert len(made) + len(more) > 3000
    return sum(generation["collections"] for generation in gc.get_stats()) - before


def test_what_is_put_together_is_old_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = take_apart([weights(), *([number] for number in range(3000))])
    assert gc.isenabled()
    monkeypatch.setattr(collector, "_user_freezes", False)
    assert collections_after(parts) == 0
    try:
        gc.freeze()
        # What the user has frozen stays so, and he is not asked twice.
        frozen = gc.get_freeze_count()
        assert collections_after(parts) == 1
        assert gc.get_freeze_count() >= frozen * 0.9  # some have died by reference count
        monkeypatch.setattr(gc, "get_freeze_count", lambda: pytest.fail("it walks through all that is frozen"))
        assert collections_after(parts) == 1
    finally:
        gc.unfreeze()


def test_skeleton_may_be_a_memoryview() -> None:
    parts = take_apart(weights())
    memory = bytearray(DATA_START + parts.data_bytes)
    made = put_together(memoryview(parts.skeleton), memory, DATA_START)
    assert made.shape == weights().shape


def test_parts_keep_nothing_alive_but_the_sources() -> None:
    class Weights(np.ndarray[Any, Any]):
        pass

    box = Box(data=weights().view(Weights))
    alive = weakref.ref(box.data)
    gc.disable()
    try:
        parts = take_apart(box)
        del box
        parts.buffers[0].source = None
        assert alive() is None
    finally:
        gc.enable()


def test_torch_is_imported_by_nobody() -> None:
    code = (
        "import sys, numpy, onecopy.skeleton as s; s.take_apart(numpy.ones(1 << 20)); assert 'torch' not in sys.modules"
    )
    run("-c", code)


def test_beams_own_pickler_decides_on_main() -> None:
    beam_pickler = pytest.importorskip("apache_beam.internal.cloudpickle").cloudpickle.Pickler
    made = round_trip(take_apart(Box(data=weights(), f=lambda x: x + 1), pickler=beam_pickler))
    assert made.f(1) == 2
    assert fingerprint(made.data) == fingerprint(weights())


def test_pythons_own_pickler_works_too() -> None:
    class Plain(pickle._Pickler):  # as dill's, written in Python
        pass

    for pickler in (pickle.Pickler, Plain):
        made = round_trip(take_apart([weights(), weights()[3:]], pickler=pickler))
        assert fingerprint(made) == fingerprint([weights(), weights()[3:]])


def test_dills_pickler_finds_dills_unpickler() -> None:
    dill = pytest.importorskip("dill")
    made = round_trip(take_apart(Box(data=weights(), f=lambda x: x + MIB), pickler=dill.Pickler))
    assert made.f(1) == MIB + 1


# -- __main__

SCRIPT = """
import sys
import numpy as np
import multiprocessing
import threading
import weakref
from pathlib import Path
from onecopy.skeleton import Unshareable, put_together, take_apart

class Base:
    pass

class Net(Base):
    class Inner:
        pass

    def __init__(self):
        self.data, self.inner, self.helper = np.ones(1 << 20), Net.Inner(), helper

    def __call__(self):
        return float(self.data.sum()) + helper(1)

def helper(x):
    return x + 1

def attach(room):
    room = Path(room)
    memory = bytearray((room / "data").read_bytes())
    return put_together((room / "skeleton").read_bytes(), memory, 0)

def check(room):
    made = attach(room)
    print(made(), isinstance(made, Net), isinstance(made.inner, Net.Inner), made.helper is helper)

def publish(room):
    room = Path(room)
    parts = take_apart(Net())
    data = bytearray(parts.data_bytes)
    for buffer in parts.buffers:
        data[buffer.offset : buffer.offset + buffer.nbytes] = memoryview(buffer.source)
    (room / "data").write_bytes(data)
    (room / "skeleton").write_bytes(parts.skeleton)

def in_child(function, room):
    child = multiprocessing.get_context(sys.argv[3]).Process(target=function, args=(room,))
    child.start()
    child.join()
    assert child.exitcode == 0

if __name__ == "__main__":
    {"publish": publish, "check": check, "attach": lambda room: print(attach(room)()),
     "publish-in-child": lambda room: in_child(publish, room),
     "check-in-child": lambda room: in_child(check, room)}[sys.argv[1]](sys.argv[2])
"""
SAME = "1048578.0 True True True\n"


def run(*arguments: str, cwd: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def test_main_is_named_where_the_same_script_runs(script: str, tmp_path: Path) -> None:
    run(script, "publish", str(tmp_path))
    assert run(script, "check", str(tmp_path)) == SAME
    (tmp_path / "link.py").symlink_to(script)
    assert run("link.py", "check", ".", cwd=tmp_path) == SAME
    assert run("-m", "script", "check", ".", cwd=tmp_path) == SAME


@pytest.mark.parametrize("start", ["spawn", "fork", "forkserver"])
def test_main_is_named_where_multiprocessing_runs_it(script: str, tmp_path: Path, start: str) -> None:
    run(script, "publish", str(tmp_path))
    assert run(script, "check-in-child", str(tmp_path), start) == SAME
    run(script, "publish-in-child", str(tmp_path), start)
    assert run(script, "check", str(tmp_path)) == SAME
    assert run(script, "check-in-child", str(tmp_path), start) == SAME


@pytest.mark.parametrize("publish", ["publish", "publish-in-child"])
def test_main_is_contained_where_another_script_runs(script: str, tmp_path: Path, publish: str) -> None:
    run(script, publish, str(tmp_path), "spawn")
    other = tmp_path / "other.py"
    other.write_text(SCRIPT.replace("class Net", "class Other").replace("def helper", "def other_helper"))
    assert run(str(other), "attach", str(tmp_path)) == "1048578.0\n"


def test_main_is_contained_where_the_script_lost_a_class(script: str, tmp_path: Path) -> None:
    run(script, "publish", str(tmp_path))
    Path(script).write_text(SCRIPT.replace("class Net", "class Renamed"))
    assert run(script, "attach", str(tmp_path)) == "1048578.0\n"


def test_main_is_named_where_the_same_command_runs(tmp_path: Path) -> None:
    run("-c", SCRIPT, "publish", str(tmp_path))
    assert run("-c", SCRIPT, "check", str(tmp_path)) == SAME
    assert run("-c", SCRIPT.replace("class Net", "class Gone"), "attach", str(tmp_path)) == "1048578.0\n"


def test_main_that_cannot_be_contained_is_named_all_the_same(script: str, tmp_path: Path) -> None:
    Path(script).write_text(SCRIPT.replace("def helper(x):", "lock = threading.Lock()\n\ndef helper(x):\n    lock"))
    run(script, "publish", str(tmp_path))
    assert run(script, "check", str(tmp_path)) == SAME
    other = tmp_path / "other.py"
    other.write_text(SCRIPT.replace("class Net", "class Other"))
    with pytest.raises(
        AssertionError, match=r"AttributeError: Net, Net.Inner, helper of the __main__ of .*script.py.*lock"
    ):
        run(str(other), "attach", str(tmp_path))


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("class Model:\n    pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        from only_here import Model

        model = Model()
        model.data = weights()
        parts = take_apart(model)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("only_here", None)
    with pytest.raises(ModuleNotFoundError, match="only_here"):
        round_trip(parts)


def test_cloudpickles_registry_is_left_alone() -> None:
    take_apart(Box(data=weights()))
    assert not cloudpickle.list_registry_pickle_by_value()
