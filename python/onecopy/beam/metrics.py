"""Beam metrics about sharing, beside those that RunInference keeps itself.

Counters and distributions only: gauges are not supported on Dataflow.
"""

from apache_beam.metrics.metric import Metrics
from apache_beam.runners.worker.statesampler import get_current_tracker

from onecopy.info import ModelInfo


def inside_bundle() -> bool:
    """Whether an update would be counted; outside a bundle (in `setup`, say) Beam drops it without a word."""
    return get_current_tracker() is not None


def update(info: ModelInfo, namespace: str) -> None:
    """Sizes are in bytes, latencies in milliseconds; a latency is what this process spent, waiting and loading apart."""

    def spend(name: str, seconds: float) -> None:
        Metrics.distribution(namespace, f"shared_model_{name}_latency_milli_secs").update(round(seconds * 1000))

    own = max(0.0, info.seconds - info.wait_seconds - info.load_seconds)
    if info.role == "publisher":
        Metrics.counter(namespace, "shared_model_published_counter").inc()
        spend("publish", own)
    elif info.role == "attacher":
        Metrics.counter(namespace, "shared_model_attached_counter").inc()
        spend("attach", own)
    else:
        Metrics.counter(namespace, "shared_model_fallback_counter").inc()
    spend("wait", info.wait_seconds)
    if info.role != "private":
        Metrics.distribution(namespace, "shared_model_byte_size").update(info.shared_bytes)
    Metrics.distribution(namespace, "private_model_byte_size").update(info.private_bytes)
