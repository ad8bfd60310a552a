"""Which model: identifiers, handler classes, refreshed paths, and how long a process keeps one."""

import gc
import logging
import time
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.ml.inference.base import ModelHandler, ModelMetadata
from beam_handlers import Versioned, Weights, counted
from beam_jobs import doorkeeper, infer, run

from onecopy import Store
from onecopy.beam import SharedMemoryModelHandler, loaded


class Other(Versioned):
    pass


class Attributes(ModelHandler):
    """Keeps the model on itself."""

    def load_model(self):
        self.model = Weights()
        return self.model

    def run_inference(self, batch, model, inference_args=None):
        return [self.model is model for _ in batch]


@pytest.fixture
def paths(room):
    found = [Path(room, name) for name in ("v1", "v2")]
    for number, path in enumerate(found, 1):
        path.write_text(str(number))
    return [str(path) for path in found]


def held(namespace):
    """The paths of the models that somebody holds; a handler of one's own names its first path to nobody."""
    rows = [row for row in Store(namespace).list() if row.state == "ready" and row.holders]
    return sorted(Path(row.version.partition(":")[2]).name for row in rows)


def until_held(namespace, names):
    """Waits for what the housekeeping thread does."""
    gc.collect()
    while held(namespace) != names:
        time.sleep(0.01)


@pytest.mark.beam
def test_a_side_input_moves_every_process(room, paths, namespace):
    handler = SharedMemoryModelHandler(Versioned(room, paths[0]), namespace=namespace)

    def build(pipeline):
        path = pipeline | "path" >> beam.Create([ModelMetadata(paths[1], "v2")])
        return infer(handler, range(8), model_metadata_pcoll=path)(pipeline)

    with doorkeeper(room, 2):
        results, metrics = run(build, room, 2)
    assert [result.inference for result in results] == [2.0] * 8
    assert len({result.model_id for result in results}) == 2
    assert len(counted(room, "loads-v2")) == 1
    assert counted(room, "loads-v1") == []
    assert (metrics["shared_model_published_counter"], metrics["shared_model_attached_counter"]) == (1, 1)


def test_a_refreshed_path_supersedes_the_old_one(room, paths, namespace):
    Path(room, "door").touch()
    handler = SharedMemoryModelHandler(Versioned(room, paths[0]), namespace=namespace)
    first = handler.load_model()
    handler.update_model_path(paths[1])
    second = handler.load_model()
    assert held(namespace) == ["", "v2"]  # somebody still has the first
    assert [next(iter(handler.run_inference([0], model))).inference for model in (first, second)] == [1.0, 2.0]
    del first
    until_held(namespace, ["v2"])
    handler.update_model_path(None)  # as Beam does for an empty side input: no other path
    assert loaded.find(handler.load_model()).info.version == loaded.find(second).info.version
    assert (len(counted(room, "loads-v1")), len(counted(room, "loads-v2"))) == (1, 1)


def test_kept_until_the_process_exits(room, paths, namespace):
    handler = SharedMemoryModelHandler(Versioned(room, paths[0]), namespace=namespace)
    handler.load_model()
    assert held(namespace) == [""]
    handler.load_model()
    assert len(counted(room, "loads-v1")) == 1


def test_linger_zero(room, paths, namespace):
    handler = SharedMemoryModelHandler(Versioned(room, paths[0]), namespace=namespace, linger=0)
    model = handler.load_model()
    assert held(namespace) == [""]
    del model
    until_held(namespace, [])
    handler.load_model()
    assert len(counted(room, "loads-v1")) == 2


def test_linger_ends_when_superseded(room, paths, namespace):
    handler = SharedMemoryModelHandler(Versioned(room, paths[0]), namespace=namespace, linger=3600)
    model = handler.load_model()
    handler.update_model_path(paths[1])
    model = handler.load_model()
    until_held(namespace, ["v2"])
    loaded.find(model).hold.end()  # its own hour is not for this test to wait for


def test_one_identifier_is_one_model(room, paths, namespace):
    handlers = [
        SharedMemoryModelHandler(Versioned(room, paths[0]), namespace=namespace, model_identifier="m") for _ in range(2)
    ]
    models = [handler.load_model() for handler in handlers]
    assert len(counted(room, "loads-v1")) == 1
    assert [loaded.find(model).info.tag for model in models] == ["m", "m"]


def test_one_identifier_with_another_class(room, paths, namespace, caplog):
    with caplog.at_level(logging.WARNING, "onecopy"):
        mine = SharedMemoryModelHandler(
            Versioned(room, paths[0]), namespace=namespace, model_identifier="m"
        ).load_model()
        assert not caplog.records
        other = SharedMemoryModelHandler(Other(room, paths[0]), namespace=namespace, model_identifier="m").load_model()
    (record,) = caplog.records
    assert "beam_handlers.Versioned too" in record.message
    assert "Other does not share with it" in record.message
    assert len(counted(room, "loads-v1")) == 2
    assert mine is not other


def test_two_names_are_two_models(room, paths, namespace):
    handlers = [SharedMemoryModelHandler(Versioned(room, paths[0]), namespace=namespace) for _ in range(2)]
    models = [handler.load_model() for handler in handlers]
    assert len(counted(room, "loads-v1")) == 2
    assert len({loaded.find(model).info.tag for model in models}) == 2


def test_a_handler_that_keeps_the_model_on_itself_does_not_keep_it_for_ever(namespace):
    handler = SharedMemoryModelHandler(Attributes(), namespace=namespace, linger=0, model_identifier="m")
    model = handler.load_model()
    assert list(handler.run_inference([1], model)) == [True]
    number = id(model)
    assert loaded._by_id[number]
    del model, handler
    gc.collect()
    assert number not in loaded._by_id
    while any(row.state == "ready" for row in Store(namespace).list()):
        time.sleep(0.01)
