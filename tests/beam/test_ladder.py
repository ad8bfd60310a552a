"""Models that cannot be shared: never more copies than Beam would make without the wrapper."""

import logging
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from apache_beam.ml.inference import base
from apache_beam.utils.multi_process_shared import _AutoProxyWrapper
from beam_handlers import Arrays, UnshareableHandler, Weights, counted
from beam_jobs import doorkeeper, infer, run, wait_for

from onecopy.beam import SharedMemoryModelHandler, loaded
from onecopy.errors import SystemCallError


@pytest.fixture(autouse=True)
def files_of_beam(room, monkeypatch):
    """MultiProcessShared leaves its address and lock files behind."""
    monkeypatch.setenv("TMPDIR", room)  # for the processes that are started
    before = set(Path(tempfile.gettempdir()).glob("onecopy-*"))
    yield
    for path in set(Path(tempfile.gettempdir()).glob("onecopy-*")) - before:
        path.unlink()


def warnings_of_workers(caplog):
    return [record.message for record in caplog.records if "is not shared" in record.message]


@pytest.mark.beam
def test_large_model_is_served_once(room, namespace, caplog):
    handler = SharedMemoryModelHandler(UnshareableHandler(room, large_model=True), namespace=namespace)
    with doorkeeper(room, 2):
        results, metrics = run(infer(handler, range(8)), room, 2)
    (loader,) = counted(room, "loads")
    assert sorted(x for x, *_ in results) == list(range(1, 9))
    assert {(made_in, ran_in) for _, made_in, ran_in, _ in results} == {(loader, loader)}
    assert len({asked_by for *_, asked_by in results}) == 2
    assert metrics["shared_model_fallback_counter"] == 2
    assert metrics["shared_model_attached_counter"] == 0
    assert len(warnings_of_workers(caplog)) == 2  # one in each process
    assert all("TypeError: cannot pickle" in message for message in warnings_of_workers(caplog))


@pytest.mark.beam
def test_any_other_model_is_private(room, namespace, caplog):
    handler = SharedMemoryModelHandler(UnshareableHandler(room), namespace=namespace)
    with doorkeeper(room, 2):
        results, metrics = run(infer(handler, range(8)), room, 2)
    assert sorted(x for x, *_ in results) == list(range(1, 9))
    assert all(made_in == ran_in == asked_by for _, made_in, ran_in, asked_by in results)
    assert sorted(counted(room, "loads")) == sorted({asked_by for *_, asked_by in results})
    assert len(counted(room, "loads")) == 2
    assert metrics["shared_model_fallback_counter"] == 2
    assert len(warnings_of_workers(caplog)) == 2


def test_model_copies_are_served_in_turn(room, namespace, caplog):
    handler = SharedMemoryModelHandler(UnshareableHandler(room, model_copies=2), namespace=namespace)
    Path(room, "door").touch()
    model = handler.load_model()
    assert len(counted(room, "loads")) == 2
    assert isinstance(model, base._SharedModelWrapper)
    (message,) = warnings_of_workers(caplog)
    assert message.startswith("the model of beam_handlers.UnshareableHandler is not shared: it cannot be pickled")
    assert "MultiProcessShared holds the one copy" in message
    assert re.fullmatch(r"UnshareableHandler-[0-9a-f]{32}", loaded.find(model).info.tag)
    assert loaded.find(model).info.version == "beam_handlers.UnshareableHandler"
    turns = [handler.model_copies()] + [next(iter(handler.run_inference([1], model)))[0] for _ in range(3)]
    assert turns == [1, 2, 2, 2]


@pytest.fixture
def no_directory(room, monkeypatch):
    path = Path(room, "a file")
    path.touch()
    monkeypatch.setenv("ONECOPY_DIR", str(path))


@pytest.mark.parametrize(("kwargs", "kind"), [({}, Weights), ({"large_model": True}, _AutoProxyWrapper)])
def test_a_store_that_cannot_be_opened(room, no_directory, kwargs, kind, caplog):
    with caplog.at_level(logging.WARNING, "onecopy"):
        model = SharedMemoryModelHandler(Arrays(room, **kwargs)).load_model()
    assert type(model) is kind
    assert model.total() == Weights().total()
    assert len(counted(room, "loads")) == 1
    (message,) = warnings_of_workers(caplog)
    assert "the model of beam_handlers.Arrays is not shared: " in message
    assert "a file" in message
    assert ("MultiProcessShared holds the one copy" if kwargs else "Each process has a copy of its own") in message
    assert loaded.find(model).info.role == "private"


def test_a_store_that_cannot_be_opened_where_nothing_else_will_do(room, no_directory):
    with pytest.raises(
        SystemCallError, match=r"Arrays is not shared: .*a file.* on_unshareable=.raise. makes this an error"
    ):
        SharedMemoryModelHandler(Arrays(room), on_unshareable="raise").load_model()
    assert counted(room, "loads") == []


@pytest.fixture
def slow_loader(room, namespace):
    """Another process, in the middle of loading the model 'slow'; call it to let it finish."""
    script = f"""
import sys
from beam_handlers import Arrays
from onecopy.beam import SharedMemoryModelHandler
inner = Arrays({room!r}, held_up=True)
model = SharedMemoryModelHandler(inner, model_identifier="slow", namespace={namespace!r}).load_model()
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    wait_for(Path(room, "loads"))
    yield Path(room, "go").touch
    Path(room, "go").touch()
    process.stdin.close()
    process.wait()


def test_a_timeout_is_the_next_rung(room, namespace, slow_loader, caplog):
    handler = SharedMemoryModelHandler(Arrays(room), model_identifier="slow", timeout=0.2, namespace=namespace)
    with caplog.at_level(logging.WARNING, "onecopy"):
        model = handler.load_model()
    assert type(model) is Weights
    assert loaded.find(model).info.role == "private"
    assert len(counted(room, "loads")) == 2
    (message,) = warnings_of_workers(caplog)
    assert re.search(
        r"the model of beam_handlers.Arrays is not shared: waited 0\.\d s for the model of .*Raise", message
    )


def test_large_model_does_not_time_out(room, namespace, slow_loader):
    inner = Arrays(room, large_model=True)
    handler = SharedMemoryModelHandler(inner, model_identifier="slow", timeout=0.2, namespace=namespace, linger=0)
    models = []
    thread = threading.Thread(target=lambda: models.append(handler.load_model()))
    thread.start()
    thread.join(1)
    assert thread.is_alive()  # five times the timeout
    slow_loader()
    thread.join()
    (model,) = models
    assert loaded.find(model).info.role == "attacher"
    assert len(counted(room, "loads")) == 1
