"""Which handlers are active, decided without loading anything."""

import pickle

import pytest
import torch
from apache_beam.ml.inference import base
from apache_beam.ml.inference.base import KeyedModelHandler, KeyModelMapping, MaybeKeyedModelHandler, ModelHandler
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerKeyedTensor, PytorchModelHandlerTensor
from apache_beam.ml.inference.sklearn_inference import SklearnModelHandlerNumpy, SklearnModelHandlerPandas
from beam_handlers import Net

from onecopy.beam import SharedMemoryModelHandler, families

# A class that says it is from there stands for it: Beam's module imports TensorFlow.
TensorFlow = type(
    "TFModelHandlerTensor", (ModelHandler,), {"__module__": "apache_beam.ml.inference.tensorflow_inference"}
)


class Custom(ModelHandler):
    pass


class Remote(base.RemoteModelHandler):
    def create_client(self):
        return None

    def request(self, batch, model, inference_args=None):
        return batch


def torch_handler(**kwargs):
    return PytorchModelHandlerTensor(state_dict_path="a.pt", model_class=Net, **kwargs)


ACTIVE = {
    "torch": torch_handler,
    "torch keyed tensor": lambda: PytorchModelHandlerKeyedTensor(state_dict_path="a.pt", model_class=Net),
    "torch large": lambda: torch_handler(large_model=True),
    "torch copies": lambda: torch_handler(model_copies=2),
    "sklearn": lambda: SklearnModelHandlerNumpy("a.pkl"),
    "sklearn pandas": lambda: SklearnModelHandlerPandas("a.pkl"),
    "tensorflow": TensorFlow,
    "custom": Custom,
    "keyed": lambda: KeyedModelHandler(torch_handler()),
    "maybe keyed": lambda: MaybeKeyedModelHandler(torch_handler()),
    "preprocessed": lambda: torch_handler().with_preprocess_fn(abs).with_no_batching(),
}
TRANSPARENT = {
    "remote": (lambda: Remote("test"), "remote service"),
    "torch on a GPU": (lambda: torch_handler(device="GPU"), "its device is cuda"),
    "keyed on a GPU": (lambda: KeyedModelHandler(torch_handler(device="GPU")), "its device is cuda"),
    "torch script": (lambda: PytorchModelHandlerTensor(torch_script_model_path="a.pt"), "TorchScript"),
    "many models": (lambda: KeyedModelHandler([KeyModelMapping(["k"], torch_handler())]), "many models"),
    "wrapped": (lambda: SharedMemoryModelHandler(torch_handler()), "wrapped already"),
    "wrapped inside": (lambda: KeyedModelHandler(SharedMemoryModelHandler(torch_handler())), "wrapped already"),
}


@pytest.mark.parametrize("name", ACTIVE)
def test_active(name):
    assert families.why_transparent(ACTIVE[name]()) == ""


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent(name):
    make, words = TRANSPARENT[name]
    inner = make()
    assert words in families.why_transparent(inner)
    handler = SharedMemoryModelHandler(inner)
    assert handler.share_model_across_processes() == inner.share_model_across_processes()
    assert handler.should_garbage_collect_on_timeout() == inner.should_garbage_collect_on_timeout()


@pytest.mark.parametrize("module", sorted(families._NO_ADAPTER))
def test_families_without_adapter_are_known_by_their_module(module):
    # Most of them need packages that are not installed: a class that says it is from there stands for one.
    parent = type("Theirs", (ModelHandler,), {"__module__": module})
    mine = type("Mine", (parent,), {})
    assert families.why_transparent(mine()) == families._NO_ADAPTER[module]


def test_names_and_paths():
    keyed = KeyedModelHandler(torch_handler())
    assert families.class_name(keyed) == (
        "apache_beam.ml.inference.base.KeyedModelHandler/"
        "apache_beam.ml.inference.pytorch_inference.PytorchModelHandlerTensor"
    )
    assert families.model_path(keyed) == "a.pt"
    keyed.update_model_path("b.pt")
    assert families.model_path(keyed) == "b.pt"
    assert families.model_path(SklearnModelHandlerNumpy("a.pkl")) == "a.pkl"
    assert families.model_path(Custom()) == ""


def test_a_refreshed_path_is_another_path():
    assert families.model_path(Custom(), "b.pt") == "b.pt"
    handler = torch_handler()
    handler.update_model_path("b.pt")
    assert families.model_path(handler, "b.pt") == "b.pt"  # the same as of one that had it from the beginning
    mine = torch_handler()  # of a class that keeps the new path somewhere else
    assert families.model_path(mine, "b.pt") not in ("a.pt", "b.pt")


@pytest.mark.parametrize("device", [torch.device("cpu"), "cpu", "CPU", -1])
def test_words_for_the_cpu(device):
    handler = Custom()
    handler._device = device
    assert families.why_transparent(handler) == ""


def test_modules_named_here_exist_in_beam():
    from importlib.util import find_spec

    missing = {name for name in families._NO_ADAPTER if find_spec(name) is None}
    # Came with Beam 2.75 and later.
    assert missing <= {"apache_beam.ml.inference.agent_development_kit"}


def test_the_decision_travels():
    handler = pickle.loads(pickle.dumps(SharedMemoryModelHandler(torch_handler(device="GPU", large_model=True))))
    assert handler.share_model_across_processes() is True
