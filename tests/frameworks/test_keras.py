"""Keras 3 models, taken apart in one process and put together in another."""

import re

import pytest
from processes import wait_until

import onecopy

pytestmark = pytest.mark.models

KERAS = [
    "functional", "sequential", "custom", "tied", "transformer", "recurrent", "mixed", "int8", "preprocessing", "mobilenet",
    "layer",
]  # fmt: skip
MIB = 1 << 20


@pytest.mark.parametrize("name", KERAS)
def test_the_same_model_in_another_process(publisher, attacher, tmp_path, name):
    """Bit by bit; with dropout, too, which begins where the publisher's stands."""
    expected, skeleton = publisher("take_apart_into", str(tmp_path), name)
    assert attacher("put_together_from", str(tmp_path), name) == expected
    assert skeleton < 128 << 10, "no weights in it"


def test_one_copy(publisher, attacher, namespace):
    store = onecopy.Store(namespace)
    expected, own, moved = publisher("publish", namespace, "model")
    assert moved, "what was published looks at the segment, too"
    assert own > 64 * MIB, "TensorFlow's pool keeps what it had: that is said"
    answer, attached, used = attacher("attach", namespace, "model")
    assert answer == expected
    assert attached < 4 * MIB
    assert used < 8 * MIB

    assert attacher("assign_add", "model"), "an update makes memory of its own"
    assert attacher("computed", "model") != expected
    assert publisher("computed", "model") == expected
    assert store.verify("model") > 64 * MIB

    wait_until(lambda: {who[0] for who in store.show("model")[0].holders} == {publisher.pid, attacher.pid})
    attacher("keep_a_tensor", "model")
    assert attacher.pid in [who[0] for who in store.show("model")[0].holders]
    attacher("drop_the_tensor")
    wait_until(lambda: {who[0] for who in store.show("model")[0].holders} == {publisher.pid})

    role, reason = attacher("acquire_elsewhere", namespace, "model")
    assert role == "private"
    assert "another configuration: epsilon 1e-07, here 0.001" in reason

    publisher.other("leave", namespace)
    attacher.other("leave", namespace)
    wait_until(lambda: not store.list())


def test_what_keras_builds_is_compared_with_what_was_published(publisher):
    expected = [
        "ValueError: Layer 'dense.*' expected 2 variables, but received 1",
        "ValueError: The shape of the target variable",
        "ValueError: Layer 'dense.*' expected 2 variables, but received 3",
        "ValueError: zip",
        r"ValueError: Keras built a Functional without \.layers\[77\]",
        "ValueError: Keras built a .*Dense at .*, not a keras.src.layers.Other",
        "ValueError: Keras built .* to compute in float32, not in float16",
        "ValueError: Keras built a variable that was not published",
        "RuntimeError: Internal error: could not find layer",
        "ValueError: Input 0",
        "RuntimeError: .* another configuration: epsilon 0.5",
        "RuntimeError: .* another configuration: backend 'jax'",
        "TypeError: .*Described",
    ]
    said = publisher("hostile_blueprints")
    for one, pattern in zip(said, expected, strict=True):
        assert re.match(pattern, one, re.DOTALL), (pattern, one)
        assert one != "no error"
