"""Our metrics: once per process and generation, in the namespace that RunInference names, and only inside a bundle."""

import apache_beam as beam
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.ml.inference.base import ModelHandler, RunInference
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from beam_handlers import Weights

from onecopy.beam import SharedMemoryModelHandler, loaded


class Sums(ModelHandler):
    def load_model(self):
        return Weights()

    def run_inference(self, batch, model, inference_args=None):
        return [model.total() + x for x in batch]

    def get_metrics_namespace(self):
        return "theirs"


class Small(Sums):
    def load_model(self):
        return lambda: None

    def run_inference(self, batch, model, inference_args=None):
        return batch


def ours(pipeline, namespace):
    """{name: value} of our metrics in a metrics namespace, a distribution's value being its count."""
    result = pipeline.run()
    result.wait_until_finish()
    found = result.metrics().query(MetricsFilter().with_namespace(namespace))
    return {
        one.key.metric.name: getattr(one.committed, "count", one.committed)
        for one in (*found["counters"], *found["distributions"])
        if "shared_model" in one.key.metric.name or one.key.metric.name == "private_model_byte_size"
    }


PUBLISHED = {
    "shared_model_published_counter": 1,
    "shared_model_publish_latency_milli_secs": 1,
    "shared_model_wait_latency_milli_secs": 1,
    "shared_model_byte_size": 1,
    "private_model_byte_size": 1,
}


def test_once_for_two_steps_in_the_namespace_that_is_named(namespace):
    handler = SharedMemoryModelHandler(Sums(), namespace=namespace)
    pipeline = beam.Pipeline(runner=FnApiRunner())
    for step in "ab":
        _ = (
            pipeline
            | f"create {step}" >> beam.Create(range(5))
            | f"infer {step}" >> RunInference(handler, metrics_namespace="mine")
        )
    assert ours(pipeline, "mine") == PUBLISHED


def test_the_inner_namespace_where_none_is_named(namespace):
    pipeline = beam.Pipeline(runner=FnApiRunner())
    _ = pipeline | beam.Create(range(5)) | RunInference(SharedMemoryModelHandler(Sums(), namespace=namespace))
    assert ours(pipeline, "theirs") == PUBLISHED


def test_through_a_preprocessing_wrapper_which_does_not_pass_the_namespace_on(namespace):
    handler = SharedMemoryModelHandler(Sums(), namespace=namespace).with_preprocess_fn(abs)
    pipeline = beam.Pipeline(runner=FnApiRunner())
    _ = pipeline | beam.Create(range(5)) | RunInference(handler)
    assert ours(pipeline, "theirs") == PUBLISHED


def test_outside_a_bundle_nothing_is_lost(namespace):
    handler = SharedMemoryModelHandler(Sums(), namespace=namespace)
    model = handler.load_model()
    list(handler.run_inference([1], model))
    came_with = loaded.find(model)
    assert not [seen for seen in loaded._reported if came_with.info.tag in seen]
    pipeline = beam.Pipeline(runner=FnApiRunner())
    _ = pipeline | beam.Create(range(5)) | RunInference(handler)
    assert ours(pipeline, "theirs") == PUBLISHED
    assert [seen for seen in loaded._reported if came_with.info.tag in seen]


def test_a_model_that_is_not_shared(namespace):
    pipeline = beam.Pipeline(runner=FnApiRunner())
    _ = pipeline | beam.Create(range(5)) | RunInference(SharedMemoryModelHandler(Small(), namespace=namespace))
    assert ours(pipeline, "theirs") == {
        "shared_model_fallback_counter": 1,
        "shared_model_wait_latency_milli_secs": 1,
        "private_model_byte_size": 1,
    }
