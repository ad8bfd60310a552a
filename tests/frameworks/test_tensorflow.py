"""TensorFlow's variables, tensors and SavedModels, taken apart in one process and put together in another."""

import re

import pytest

from onecopy import _key

pytestmark = pytest.mark.models


@pytest.mark.parametrize("name", ["module", "values", "saved", "exported"])
def test_the_same_in_another_process(publisher, attacher, tmp_path, name):
    expected, _ = publisher("take_apart_into", str(tmp_path), name)
    assert attacher("put_together_from", str(tmp_path), name) == expected


def test_a_table_that_lies_is_an_error_and_no_abort(publisher, attacher, tmp_path):
    publisher("take_apart_into", str(tmp_path), "values")
    said = attacher("hostile", str(tmp_path))
    words = [
        "multiple of 64",
        "buffer",
        "before the data area",
        "",
        "buffer",
        "",
        "string",
        "no such type",
        "float8",
        "",
    ]
    assert len(said) == len(words)
    for one, word in zip(said, words, strict=True):
        assert re.match(r"(ValueError|TypeError|MemoryError): ", one), said
        assert word in one, said


def test_what_cannot_be_shared_says_why(publisher):
    words = {
        "own weights": "keeps weights that Keras does not know of in ['mine']: use add_weight",
        "lora": "merge LoRA weights",
        "undescribed": "Keras cannot describe it: NotImplementedError: no config",
        "namesakes": "two classes are called Same",
        "keras 2": "share a Keras 3 model",
        "function": "share what tf.saved_model.load returned",
        "aliased": "begins 48 bytes into an array of the same object",
        "without assets": "vocabulary.txt is gone from where it was loaded",
        "distributed": "belongs to a distribution strategy",
    }
    said = publisher("refusals")
    assert said.keys() == words.keys()
    for name, word in words.items():
        assert word in said[name]
        assert "['model']" in said[name] or name == "aliased", "where it is"


def test_an_object_without_tensors_needs_no_tensorflow(publisher):
    """Its process has it imported; who attaches need not."""
    assert publisher("frameworks_of_an_array") == ["numpy"]


def test_versions_are_part_of_the_key():
    assert re.search(r", tensorflow \d+\.\d+[^,]*, keras \d", _key.compatibility())
