"""Every method of Beam's ModelHandler, compared with the handler inside."""

import copy
import inspect
import logging
import pickle
import subprocess
import sys

import pytest
from apache_beam.internal import pickler as beam_pickler
from apache_beam.ml.inference import base
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler

from onecopy.beam import SharedMemoryModelHandler
from onecopy.errors import BadNameError

PUBLIC = {name for name, thing in vars(ModelHandler).items() if inspect.isfunction(thing) and not name.startswith("_")}
AROUND_US = {"with_preprocess_fn", "with_postprocess_fn", "with_no_batching"}
# A method that is new here was added by Beam: delegated already, but does it matter to an active wrapper?
KNOWN = AROUND_US | {
    "batch_elements_kwargs", "get_metrics_namespace", "get_num_bytes", "get_postprocess_fns", "get_preprocess_fns",
    "get_resource_hints", "load_model", "model_copies", "override_metrics", "run_inference", "set_environment_vars",
    "share_model_across_processes", "should_garbage_collect_on_timeout", "should_skip_batching", "update_model_path",
    "update_model_paths", "validate_inference_args",
}  # fmt: skip
ACTIVE_ANSWERS = {"share_model_across_processes": False, "model_copies": 1, "should_garbage_collect_on_timeout": False}


class Recorder(ModelHandler):
    """Every method says how it was called and answers with an object of its own."""

    def __init__(self):
        super().__init__(max_batch_size=3, env_vars={"A": "B"})
        self.calls = []


def _recorded(name):
    def method(self, *args, **kwargs):
        bound = inspect.signature(getattr(ModelHandler, name)).bind(self, *args, **kwargs)
        self.calls.append((name, list(bound.arguments.items())[1:]))
        return ANSWERS[name]

    return method


ANSWERS = {name: object() for name in PUBLIC}
for _name in PUBLIC - AROUND_US:
    setattr(Recorder, _name, _recorded(_name))


def _call(handler, name):
    parameters = list(inspect.signature(getattr(ModelHandler, name)).parameters.values())[1:]
    arguments = {one.name: object() for one in parameters}
    return getattr(handler, name)(*arguments.values()), list(arguments.items())


def test_beam_added_no_method():
    assert PUBLIC <= KNOWN


@pytest.mark.parametrize("name", sorted(PUBLIC - AROUND_US))
def test_transparent_gives_the_inner_answer(name, monkeypatch):
    monkeypatch.setenv("ONECOPY", "off")
    inner = Recorder()
    answer, arguments = _call(SharedMemoryModelHandler(inner), name)
    assert inner.calls == [(name, arguments)]
    if name not in ("set_environment_vars", "update_model_path", "update_model_paths"):  # whose answer nobody looks at
        assert answer is ANSWERS[name]


@pytest.mark.parametrize("name", sorted(PUBLIC - AROUND_US - {"load_model"}))
def test_active_differs_in_three_answers(name):
    inner = Recorder()
    answer, arguments = _call(SharedMemoryModelHandler(inner), name)
    if name in ACTIVE_ANSWERS:
        assert answer == ACTIVE_ANSWERS[name]
        assert answer.__class__ is ACTIVE_ANSWERS[name].__class__
    else:
        assert inner.calls[-1] == (name, arguments)


def test_keyword_arguments_arrive():
    inner = Recorder()
    SharedMemoryModelHandler(inner).get_num_bytes(batch=[1])
    assert inner.calls == [("get_num_bytes", [("batch", [1])])]


@pytest.mark.parametrize("name", sorted(AROUND_US & PUBLIC))
def test_wrappers_of_beam_wrap_us(name):
    handler = SharedMemoryModelHandler(Recorder())
    arguments = [] if name == "with_no_batching" else [abs]
    around = getattr(handler, name)(*arguments)
    assert around._base is handler
    assert around.share_model_across_processes() is False


def test_attributes_are_the_inner_handlers():
    handler = SharedMemoryModelHandler(Recorder())
    assert handler._env_vars == {"A": "B"}
    assert handler._batching_kwargs == {"max_batch_size": 3}
    assert not hasattr(handler, "no_such_attribute")


def test_both_ways_with_a_keyed_handler():
    class Plain(ModelHandler):
        pass

    assert KeyedModelHandler(SharedMemoryModelHandler(Plain())).share_model_across_processes() is False
    assert SharedMemoryModelHandler(KeyedModelHandler(Plain())).get_metrics_namespace() == "RunInference"


@pytest.mark.parametrize(
    "roundtrip",
    [
        lambda one: beam_pickler.loads(beam_pickler.dumps(one)),
        lambda one: pickle.loads(pickle.dumps(one)),
        copy.deepcopy,
    ],
    ids=["beam", "pickle", "deepcopy"],
)
def test_survives_pickling(roundtrip):
    handler = SharedMemoryModelHandler(Recorder(), timeout=3, torch_num_threads="auto")
    other = roundtrip(handler)
    assert vars(other) | {"_base": None} == vars(handler) | {"_base": None}
    assert type(other._base).__name__ == "Recorder"


def test_two_handlers_have_two_names():
    one, other = SharedMemoryModelHandler(Recorder()), SharedMemoryModelHandler(Recorder())
    assert one._own_name != other._own_name


def test_repr_names_the_inner_handler():
    class Named(ModelHandler):
        def __repr__(self):
            return "Named(t5)"

    assert repr(SharedMemoryModelHandler(Named())) == "SharedMemoryModelHandler(Named(t5))"
    annotations = base.RunInference(SharedMemoryModelHandler(Named())).annotations()
    assert annotations["model_handler"] == "SharedMemoryModelHandler(Named(t5))"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"base": "t5"}, TypeError, "wraps a ModelHandler of Beam, not 't5'"),
        ({"model_identifier": ""}, ValueError, "non-empty string, not ''"),
        ({"model_identifier": 5}, ValueError, "non-empty string, not 5"),
        ({"on_unshareable": "ignore"}, ValueError, "'warn' or 'raise', not 'ignore'"),
        ({"model_identifier": "x" * 256}, BadNameError, "model_identifier 'x.* of 256 bytes"),
        ({"namespace": "a/b"}, BadNameError, "namespace 'a/b'"),
        ({"namespace": 5}, TypeError, "namespace must be a str, not 5"),
        ({"timeout": "5"}, TypeError, "timeout must be seconds"),
        ({"timeout": -1}, ValueError, "timeout must be seconds"),
        ({"linger": float("nan")}, ValueError, "linger must be seconds"),
        ({"torch_num_threads": 0}, ValueError, "a number above 0, 'auto' or None, not 0"),
        ({"torch_num_threads": "all"}, ValueError, "not 'all'"),
        ({"backend": "disk"}, ValueError, "'disk'"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        SharedMemoryModelHandler(**{"base": Recorder(), **arguments})


@pytest.mark.parametrize("missing", ["onecopy._core", "cloudpickle"])
def test_works_where_a_module_does_not_exist(missing):
    script = f"import sys; sys.modules[{missing!r}] = None  # importing it raises ImportError"
    script += """
import logging, pickle
from apache_beam.ml.inference.base import ModelHandler
from apache_beam.internal import pickler
from onecopy.beam import SharedMemoryModelHandler

class Answer(ModelHandler):
    def load_model(self):
        self.ready = True
        return lambda x: x + 1
    def run_inference(self, batch, model, inference_args=None):
        assert self.ready
        return [model(x) for x in batch]

logging.basicConfig(format="%(levelname)s %(message)s")
def shipped(handler):
    return pickler.loads(pickler.dumps(handler))

handler = shipped(SharedMemoryModelHandler(Answer()))
model = handler.load_model()
print(shipped(handler).run_inference([41], model))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[42]\n"
    warnings = [line for line in done.stderr.splitlines() if "is not shared" in line]
    assert len(warnings) == 1
    assert missing.rpartition(".")[2] in warnings[0]


def test_one_info_line_where_it_changes_nothing(caplog):
    class Remote(base.RemoteModelHandler):
        def create_client(self):
            return None

        def request(self, batch, model, inference_args=None):
            return batch

    with caplog.at_level(logging.INFO, "onecopy"):
        SharedMemoryModelHandler(Remote("test"))
        SharedMemoryModelHandler(Recorder())
    assert [record.message.rpartition(" changes nothing: ")[2] for record in caplog.records] == [
        "it calls a remote service"
    ]
