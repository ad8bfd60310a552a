"""What load_model leaves on a handler."""

import threading

import pytest
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler

from onecopy.beam import state
from onecopy.beam.pickling import pickler_class


class Handler(ModelHandler):
    def __init__(self):
        super().__init__()
        self.path = "a"
        self.words = ["one"]
        self.lock = threading.Lock()
        self.opaque = iter_forever()
        self.gone = 1


def iter_forever():
    while True:
        yield


def difference(handler, change):
    pickler = pickler_class()
    before = state.snapshot(handler, pickler)
    change(handler)
    return state.changes(handler, before, pickler)


def test_nothing_changed():
    assert difference(Handler(), lambda _: None) == []


def test_equal_values_are_no_change():
    def change(handler):
        handler.path = str(b"a", "ascii")
        handler.words = ["one"]

    assert difference(Handler(), change) == []


def test_set_changed_in_place_and_removed():
    def change(handler):
        handler.tokenizer = {"a": 1}
        handler.words.append("two")
        del handler.gone

    found = difference(Handler(), change)
    other = Handler()
    state.apply(other, found, None)
    assert (other.tokenizer, other.words, hasattr(other, "gone")) == ({"a": 1}, ["one", "two"], False)
    assert {name for _, name, _, _ in found} == {"tokenizer", "words", "gone"}


def test_what_cannot_be_pickled_changes_by_identity():
    def change(handler):
        next(handler.opaque)
        handler.lock = threading.Lock()

    assert difference(Handler(), change) == []

    def replace(handler):
        handler.opaque = iter_forever()

    assert [name for _, name, _, _ in difference(Handler(), replace)] == ["opaque"]


def test_inside_of_wrapping_handlers():
    def change(handler):
        handler._unkeyed.device = "cpu"

    found = difference(KeyedModelHandler(Handler()), change)
    assert found == [(("_unkeyed",), "device", True, "cpu")]
    other = KeyedModelHandler(Handler())
    state.apply(other, found, None)
    assert other._unkeyed.device == "cpu"


def test_a_new_handler_travels_whole():
    def change(handler):
        handler._unkeyed = Handler()
        handler._unkeyed.device = "cpu"

    found = difference(KeyedModelHandler(Handler()), change)
    assert [(route, name) for route, name, _, _ in found] == [((), "_unkeyed")]


def test_a_handler_that_is_removed():
    handler = Handler()
    handler.helper = Handler()
    found = difference(handler, lambda one: vars(one).pop("helper"))
    other = Handler()
    other.helper = Handler()
    state.apply(other, found, None)
    assert not hasattr(other, "helper")


def test_the_model_itself_is_not_kept():
    model = Handler()

    def change(handler):
        handler.model = model

    found = state.without_model(difference(Handler(), change), model)
    assert all(value is not model for _, _, _, value in found)
    other, its_model = Handler(), object()
    state.apply(other, found, its_model)
    assert other.model is its_model


def test_a_handler_that_refers_to_itself():
    handler = Handler()
    handler.me = handler
    assert difference(handler, lambda _: None) == []
    assert {name for _, name, _, _ in difference(handler, lambda one: setattr(one, "new", 1))} >= {"new"}


@pytest.mark.parametrize("kind", [threading.Lock, threading.RLock])
def test_locks_travel_as_new_locks(kind):
    import io
    import pickle

    file = io.BytesIO()
    pickler_class()(file, 5).dump(kind())
    lock = pickle.loads(file.getvalue())
    assert lock.acquire(blocking=False)
