"""Row 3: asking for what this process has."""

import functools
import time
from timeit import Timer

import pytest
from children import Child
from company import room
from peers.ours import store
from rounds import ROUNDS, shuffled
from shapes import MINILM

import onecopy

CALLS = 20_000
#: By statements, which timeit compiles into its loop: no arm has a function around it.
ARMS = {
    "Holder.acquire, held": "holder.acquire()",
    "another Holder's acquire and release": "other.acquire(); other.release()",
    "Beam Shared.acquire": "shared.acquire(None)",
    "a dictionary": "table['model']",
    "run_inference of a handler that does nothing": "idle.run_inference((), model)",
    "the same, in SharedMemoryModelHandler": "wrapped.run_inference((), shared_model)",
}


def asking(folder):
    """Plays in a child."""
    from apache_beam.ml.inference.base import ModelHandler
    from apache_beam.utils.shared import Shared

    from onecopy.beam import SharedMemoryModelHandler

    class Idle(ModelHandler):
        def load_model(self):
            return MINILM.model()

        def run_inference(self, batch, model, inference_args=None):
            return batch

    idle = Idle()
    wrapped = SharedMemoryModelHandler(idle, namespace=store(folder).place.namespace)
    shared_model = wrapped.load_model()
    model = MINILM.model()
    shared = Shared()
    shared.acquire(lambda: model)
    holder = onecopy.Holder(lambda: model, "model", store=store(folder))
    holder.acquire()
    other = onecopy.Holder(lambda: model, "model", store=store(folder))
    assert other.acquire() is holder.acquire()
    other.release()

    table = {"model": model}
    assert shared.acquire(None) is table["model"]
    assert wrapped.run_inference((), shared_model) == idle.run_inference((), model)
    names = locals()
    yield None
    spent = {name: [] for name in ARMS}
    for number in range(ROUNDS * 2):
        for name in shuffled(ARMS, number):
            timer = Timer(ARMS[name], timer=time.perf_counter, globals=names)
            spent[name].append(timer.timeit(CALLS) / CALLS)
    yield spent
    holder.release()


@functools.cache
def measured():
    with room() as folder, Child(asking, folder) as child:
        child()
        return child()


@pytest.mark.parametrize("arm", ARMS)
def test_held(arm, play):
    play("held", arm, measured()[arm], ours=measured()["Holder.acquire, held"])
