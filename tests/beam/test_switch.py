"""ONECOPY over --onecopy over the constructor."""

import logging

import numpy as np
import pytest
from apache_beam.ml.inference.base import ModelHandler
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.options.value_provider import RuntimeValueProvider

from onecopy.beam import OneCopyOptions, SharedMemoryModelHandler, loaded, switch
from onecopy.errors import UnshareableError


class Opaque(ModelHandler):
    """Its model has no weights that could be shared, and cannot be pickled."""

    def load_model(self):
        return (one for one in np.zeros(1 << 18))


class Arrays(ModelHandler):
    def load_model(self):
        return {"weights": np.arange(1 << 18)}


@pytest.fixture
def option():
    """What a runner that ships pipeline options does in its workers."""
    before = RuntimeValueProvider.runtime_options

    def put(word):
        options = PipelineOptions([f"--onecopy={word}"]).get_all_options(drop_default=True)
        RuntimeValueProvider.set_runtime_options(options)

    yield put
    RuntimeValueProvider.set_runtime_options(before)


def test_nobody_touched_it():
    assert switch.position() is None


def test_environment_over_option(monkeypatch, option):
    option("off")
    assert switch.position() == "off"
    monkeypatch.setenv("ONECOPY", "require")
    assert switch.position() == "require"


def test_an_option_of_beam():
    assert PipelineOptions(["--onecopy=require"]).view_as(OneCopyOptions).onecopy == "require"
    assert PipelineOptions([]).view_as(OneCopyOptions).onecopy is None


def test_a_word_that_is_none(monkeypatch):
    monkeypatch.setenv("ONECOPY", "on")
    with pytest.raises(ValueError, match="environment variable ONECOPY is 'on'; it must be one of auto, off, require"):
        SharedMemoryModelHandler(Arrays()).share_model_across_processes()


def test_off_is_the_inner_handler(monkeypatch, namespace):
    monkeypatch.setenv("ONECOPY", "off")
    handler = SharedMemoryModelHandler(Arrays(large_model=True), namespace=namespace)
    assert handler.share_model_across_processes() is True
    model = handler.load_model()
    assert type(model) is dict
    assert loaded.find(model) is None


def test_require_raises_where_a_model_is_not_shared(monkeypatch, namespace):
    monkeypatch.setenv("ONECOPY", "require")
    with pytest.raises(
        UnshareableError, match=r"the model of \S+Opaque is not shared: .*pickle.* ONECOPY=require makes this"
    ):
        SharedMemoryModelHandler(Opaque(), namespace=namespace).load_model()
    transparent = Arrays()
    transparent._device = "cuda"
    with pytest.raises(
        UnshareableError, match=r"the model of \S+Arrays is not shared: its device is cuda.* ONECOPY=require makes"
    ):
        SharedMemoryModelHandler(transparent, namespace=namespace).load_model()
    SharedMemoryModelHandler(Arrays(), namespace=namespace).load_model()


def test_auto_is_over_the_constructor(monkeypatch, caplog, namespace):
    strict = {"on_unshareable": "raise", "namespace": namespace}
    with pytest.raises(UnshareableError):
        SharedMemoryModelHandler(Opaque(), **strict).load_model()
    monkeypatch.setenv("ONECOPY", "auto")
    with caplog.at_level(logging.WARNING, "onecopy"):
        assert next(SharedMemoryModelHandler(Opaque(), **strict).load_model()) == 0
    assert len([record for record in caplog.records if "not shared" in record.message]) == 1
