"""The families of Beam's own handlers, in two processes each, against the handler without the wrapper."""

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
import torch
from apache_beam.ml.inference.base import RunInference
from beam_handlers import Meet, counted
from beam_jobs import doorkeeper, run

from onecopy.beam import SharedMemoryModelHandler

# Beam leaves the files of models to the garbage collector.
pytestmark = [pytest.mark.beam, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "copy", "of", "the", "model", "per", "machine"]


def in_two_processes(room, steps):
    """Runs {name: (handler, examples)} as steps of one pipeline; {name: results}, and the metrics."""

    def build(pipeline):
        return [
            pipeline
            | f"create {name}" >> beam.Create(examples, reshuffle=False)
            | f"spread {name}" >> beam.Reshuffle()
            | f"meet {name}" >> beam.ParDo(Meet(room))
            | f"infer {name}" >> RunInference(handler)
            | f"name {name}" >> beam.Map(lambda result, name=name: (name, result))
            for name, (handler, examples) in steps.items()
        ] | beam.Flatten()

    with doorkeeper(room, 2):
        named, metrics = run(build, room, 2)
    return {step: [result for name, result in named if name == step] for step in steps}, metrics


def alone(handler, examples):
    model = handler.load_model()
    return [result for one in examples for result in handler.run_inference([one], model)]


def sorted_bytes(values):
    return sorted(pickle.dumps(np.asarray(value)) for value in values)


def test_sklearn(room, namespace):
    from apache_beam.ml.inference.sklearn_inference import SklearnModelHandlerNumpy
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.neural_network import MLPRegressor

    rng = np.random.default_rng(0)
    inputs, outputs = rng.standard_normal((2000, 64)), rng.standard_normal(2000)
    models = {
        "mlp": MLPRegressor(hidden_layer_sizes=(1024, 256), max_iter=1, solver="sgd").fit(inputs[:50], outputs[:50]),
        "neighbours": KNeighborsRegressor(algorithm="brute").fit(np.repeat(inputs, 2, 0), np.repeat(outputs, 2)),
    }
    examples = list(rng.standard_normal((8, 64)))
    inner = {}
    for name, model in models.items():
        path = Path(room, f"{name}.pkl")
        path.write_bytes(pickle.dumps(model))
        inner[name] = SklearnModelHandlerNumpy(str(path), max_batch_size=1)
    results, metrics = in_two_processes(
        room, {name: (SharedMemoryModelHandler(one, namespace=namespace), examples) for name, one in inner.items()}
    )
    assert (metrics["shared_model_published_counter"], metrics["shared_model_attached_counter"]) == (2, 2)
    for name, one in inner.items():
        expected = [result.inference for result in alone(one, examples)]
        assert sorted_bytes(result.inference for result in results[name]) == sorted_bytes(expected)


@pytest.fixture
def without_triton(room, monkeypatch):
    """TensorFlow and Triton bring an LLVM each, and a process that imports TensorFlow first aborts at the other one.

    torch imports Triton where it is installed: with torch's CUDA wheel.
    """
    folder = Path(room, "site")
    folder.mkdir()
    Path(folder, "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}")
    if "triton" not in sys.modules:
        monkeypatch.setitem(sys.modules, "triton", None)


def test_tensorflow(room, without_triton, namespace):
    """Beside the same handlers without the wrapper, in the same processes: here TensorFlow would be in the way of forks."""
    from apache_beam.ml.inference.tensorflow_inference import ModelType, TFModelHandlerNumpy, TFModelHandlerTensor

    here = Path(__file__).parent
    # Keras's files are the same with torch below it, which is here sooner.
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    subprocess.run([sys.executable, here / "keras_models.py", room], check=True, capture_output=True, env=environment)
    import keras_models

    weights = functools.partial(
        TFModelHandlerNumpy, str(Path(room, "residual.weights.h5")), ModelType.SAVED_WEIGHTS, max_batch_size=1
    )
    inner = {
        "weights": weights(functools.partial(keras_models.residual, room)),
        "model": TFModelHandlerTensor(str(Path(room, "functional.keras")), max_batch_size=1),
    }
    plain = {
        "weights": weights(functools.partial(keras_models.residual_without_sharing, room)),
        "model": inner["model"],
    }
    examples = list(np.random.default_rng(0).standard_normal((8, keras_models.WIDTH)).astype(np.float32))
    steps = {name: (SharedMemoryModelHandler(one, namespace=namespace), examples) for name, one in inner.items()}
    steps |= {f"plain {name}": (one, examples) for name, one in plain.items()}
    results, metrics = in_two_processes(room, steps)
    assert (metrics["shared_model_published_counter"], metrics["shared_model_attached_counter"]) == (2, 2)
    assert metrics["shared_model_fallback_counter"] == 0
    assert len(counted(room, "loads")) == 1
    assert len(set(counted(room, "loads without sharing"))) == 2
    for name in inner:
        alone = sorted_bytes(result.inference for result in results[f"plain {name}"])
        assert len(alone) == 8
        assert sorted_bytes(result.inference for result in results[name]) == alone


@pytest.fixture
def tiny_bert(room, without_triton):
    pytest.importorskip("tensorflow")  # Beam's Hugging Face handlers import it
    transformers = pytest.importorskip("transformers")
    path = Path(room, "tiny-bert")
    config = transformers.BertConfig(
        vocab_size=4096, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(path)
    Path(room, "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(Path(room, "vocab.txt"))).save_pretrained(path)
    return str(path)


def test_hugging_face(room, tiny_bert, namespace):
    from apache_beam.ml.inference.huggingface_inference import (
        HuggingFaceModelHandlerKeyedTensor,
        HuggingFaceModelHandlerTensor,
        HuggingFacePipelineModelHandler,
    )
    from transformers import AutoModel

    ids = [torch.tensor([2, 5 + n, 6, 7, 3]) for n in range(4)]
    inner = {
        "tensor": (HuggingFaceModelHandlerTensor(tiny_bert, AutoModel, max_batch_size=1), ids),
        "keyed": (
            HuggingFaceModelHandlerKeyedTensor(tiny_bert, AutoModel, "pt", max_batch_size=1),
            [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids],
        ),
        "pipeline": (
            HuggingFacePipelineModelHandler(
                "feature-extraction", tiny_bert, device="CPU", load_pipeline_args={"framework": "pt"}, max_batch_size=1
            ),
            ["one copy", "of the model", "per machine", "the machine of the model"],
        ),
    }
    # The handler of plain tensors cannot say how many bytes a batch has (it takes them for dicts), with or without us.
    inner["tensor"][0].get_num_bytes = len
    results, metrics = in_two_processes(
        room,
        {
            name: (SharedMemoryModelHandler(one, namespace=namespace), examples)
            for name, (one, examples) in inner.items()
        },
    )
    assert (metrics["shared_model_published_counter"], metrics["shared_model_attached_counter"]) == (3, 3)
    for name, (one, examples) in inner.items():
        expected = [vectors(result.inference) for result in alone(one, examples)]
        assert sorted_bytes(vectors(result.inference) for result in results[name]) == sorted_bytes(expected)


def vectors(inference):
    return inference["last_hidden_state"] if isinstance(inference, dict) else inference
