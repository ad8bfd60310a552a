"""RunInference in several SDK worker processes: one load, one copy, the outputs of the handler without the wrapper."""

import functools
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import apache_beam as beam
import grpc
import pytest
import torch
from apache_beam.ml.inference.base import RunInference
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
from apache_beam.transforms.environments import ExternalEnvironment
from beam_handlers import WIDTH, Arrays, Net, WithState, count, counted, meeting_tensor_fn
from beam_jobs import doorkeeper, infer, kill, mappings_with, run, wait_for

from onecopy.beam import SharedMemoryModelHandler

# Beam leaves the files of state dicts to the garbage collector.
pytestmark = [pytest.mark.beam, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture
def weights(tmp_path):
    path = str(tmp_path / "net.pt")
    torch.save(Net().state_dict(), path)
    return path


def torch_handler(weights, room, **kwargs):
    return PytorchModelHandlerTensor(
        state_dict_path=weights, model_class=Net, model_params={"room": room}, inference_fn=meeting_tensor_fn,
        max_batch_size=1, **kwargs,
    )  # fmt: skip


def private_outputs(handler, examples):
    """What the handler gives without the wrapper, in this process."""
    model = handler.load_model()
    return [result.inference for one in examples for result in handler.run_inference([one], model)]


@pytest.mark.parametrize("workers", [2, 4])
def test_one_copy(room, weights, namespace, workers):
    examples = [torch.randn(WIDTH) for _ in range(4 * workers)]
    expected = private_outputs(torch_handler(weights, ""), examples)
    handler = SharedMemoryModelHandler(torch_handler(weights, room), namespace=namespace)

    def look(facts):
        return [mappings_with(pid, said["addresses"]) for pid, said in facts.items()]

    with doorkeeper(room, workers, look) as seen:
        results, metrics = run(infer(handler, examples, inference_args={"room": room}), room, workers)

    assert len(counted(room, "loads")) == 1
    outputs = {result.example.numpy().tobytes(): result.inference for result in results}
    assert len(outputs) == len(examples)
    for one, inference in zip(examples, expected, strict=True):
        assert torch.equal(outputs[one.numpy().tobytes()], inference)

    (looks,) = seen
    assert len(looks) == workers
    assert all(len(mappings) == 1 for mappings in looks)  # both layers lie in one mapping
    (sizes,) = zip(*(mappings.values() for mappings in looks), strict=True)
    assert sum(size["Pss"] for size in sizes) <= 1.01 * max(size["Size"] for size in sizes)
    assert sum(size["Anonymous"] for size in sizes) == 0

    assert metrics["shared_model_published_counter"] == 1
    assert metrics["shared_model_attached_counter"] == workers - 1
    assert metrics["shared_model_fallback_counter"] == 0
    total, count = metrics["shared_model_byte_size"]
    assert (total // count, count) == (4 * sum(one.numel() for one in Net().parameters()), workers)
    assert metrics["private_model_byte_size"][1] == workers
    assert metrics["shared_model_wait_latency_milli_secs"][1] == workers
    assert metrics["shared_model_publish_latency_milli_secs"][1] == 1
    assert metrics["shared_model_attach_latency_milli_secs"][1] == workers - 1
    assert metrics["num_inferences"] == len(examples)


def test_large_model_runs_in_every_process(room, weights, namespace):
    """With a proxy, a plain module whose weights require grad could not even answer."""
    handler = SharedMemoryModelHandler(torch_handler(weights, room, large_model=True), namespace=namespace)
    with doorkeeper(room, 2) as seen:
        results, metrics = run(infer(handler, [torch.ones(WIDTH)] * 8, inference_args={"room": room}), room, 2)
    assert (len(results), len(seen)) == (8, 1)
    assert len(counted(room, "loads")) == 1
    assert metrics["shared_model_attached_counter"] == 1


def test_state_of_load_model_travels(room, namespace):
    setup = functools.partial(count, room, "setups")
    handler = SharedMemoryModelHandler(WithState(room), namespace=namespace, process_setup_fn=setup)
    with doorkeeper(room, 2):
        results, _ = run(infer(handler, range(8)), room, 2)
    assert len(counted(room, "loads")) == 1
    assert len({pid for *_, pid in results}) == 2
    assert sorted(counted(room, "setups")) == sorted({pid for *_, pid in results})
    for label, seen, has_gone, aliased, _ in results:
        assert label in ("no", "yes")
        assert (seen, has_gone, aliased) == (["load_model", "main"], False, True)


def test_classes_of_main(room, namespace):
    """The model's class is in the script, so it reaches the workers by value: isinstance must hold in attachers."""
    script = Path(room, "job.py")
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        import torch
        from apache_beam.ml.inference.base import ModelHandler
        from beam_handlers import counted, count, meet
        from beam_jobs import doorkeeper, infer, run
        from onecopy.beam import SharedMemoryModelHandler

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(1024, 1024)

            def forward(self, x):
                return super().forward(x)

        class Handler(ModelHandler):
            def load_model(self):
                count({room!r}, "loads")
                return Net()

            def run_inference(self, batch, model, inference_args=None):
                meet({room!r})
                return [(type(model) is Net and isinstance(model, Net), os.getpid())] * len(batch)

        if __name__ == "__main__":
            with doorkeeper({room!r}, 2):
                results, _ = run(
                    infer(SharedMemoryModelHandler(Handler(), namespace={namespace!r}), range(8)), {room!r}, 2
                )
            print(len(set(pid for _, pid in results)), all(same for same, _ in results), len(counted({room!r}, "loads")))
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.stdout == "2 True 1\n", done.stderr[-3000:]


def test_a_loader_outside_the_job_is_killed(room, weights, namespace):
    examples = [torch.randn(WIDTH) for _ in range(8)]
    handler = torch_handler(weights, room)
    loader_script = f"""
import sys
from pathlib import Path
from beam_handlers import Net, meeting_tensor_fn
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
from onecopy.beam import SharedMemoryModelHandler
inner = PytorchModelHandlerTensor(
    state_dict_path={weights!r}, model_class=Net, model_params={{"room": {room!r}}}, inference_fn=meeting_tensor_fn)
model = SharedMemoryModelHandler(inner, model_identifier="net", namespace={namespace!r}).load_model()
Path({room!r}, "loaded").touch()
sys.stdin.read()
"""
    loader = subprocess.Popen([sys.executable, "-c", loader_script], stdin=subprocess.PIPE)
    try:
        wait_for(Path(room, "loaded"))
        shared = SharedMemoryModelHandler(handler, model_identifier="net", namespace=namespace)
        with doorkeeper(room, 2, lambda _: kill(loader)) as seen:
            results, metrics = run(infer(shared, examples, inference_args={"room": room}), room, 2)
    finally:
        loader.stdin.close()
        loader.wait()
    assert len(seen) == 1  # it was alive until the workers had begun
    assert counted(room, "loads") == [loader.pid]
    assert metrics["shared_model_attached_counter"] == 2
    expected = private_outputs(torch_handler(weights, ""), examples)
    outputs = {result.example.numpy().tobytes(): result.inference for result in results}
    for one, inference in zip(examples, expected, strict=True):
        assert torch.equal(outputs[one.numpy().tobytes()], inference)


def test_switched_off_loads_in_every_process(room, weights, namespace, monkeypatch):
    monkeypatch.setenv("ONECOPY", "off")
    handler = SharedMemoryModelHandler(torch_handler(weights, room), namespace=namespace)
    with doorkeeper(room, 2):
        results, metrics = run(infer(handler, [torch.ones(WIDTH)] * 8, inference_args={"room": room}), room, 2)
    assert len(results) == 8
    assert len(set(counted(room, "loads"))) == 2
    assert not [name for name in metrics if name.startswith("shared_model")]


def test_the_option_reaches_workers_that_get_options(room, weights, namespace):
    """FnApiRunner sends its workers no options; the portable runner does."""
    script = f"""
import apache_beam as beam, torch
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.ml.inference.base import RunInference
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor
from beam_handlers import Net, WIDTH
from beam_jobs import Collect
from onecopy.beam import SharedMemoryModelHandler
import sys
inner = PytorchModelHandlerTensor(state_dict_path={weights!r}, model_class=Net, model_params={{"room": {room!r}}})
options = PipelineOptions([
    "--runner=PortableRunner", "--job_endpoint=embed", "--onecopy=off",
    "--environment_type=beam:env:harness_subprocess_python:v1",
    "--environment_config=" + sys.executable + " -m apache_beam.runners.worker.sdk_worker_main"])
with beam.Pipeline(options=options) as pipeline:
    (pipeline | beam.Create([torch.ones(WIDTH)])
     | RunInference(SharedMemoryModelHandler(inner, namespace={namespace!r}, model_identifier="net"))
     | beam.Map(lambda result: result.inference) | beam.ParDo(Collect({room!r})))
"""
    from beam_jobs import collected

    # The name is taken by a model that is not theirs: who shares would attach to it and would not load.
    other = PytorchModelHandlerTensor(state_dict_path=weights, model_class=Net, model_params={"room": ""})
    published = SharedMemoryModelHandler(other, namespace=namespace, model_identifier="net", linger=0).load_model()
    subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(collected(room)) == 1
    assert len(counted(room, "loads")) == 1
    del published


def test_workers_of_a_pool(room, weights, namespace, monkeypatch):
    """As on Flink with a worker pool in the container: the pool starts the workers, which get no pipeline options."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # it starts `python`
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pool = subprocess.Popen(
        [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"],
        stderr=subprocess.DEVNULL,
    )
    try:
        with grpc.insecure_channel(f"localhost:{port}") as channel:
            grpc.channel_ready_future(channel).result()
        handler = SharedMemoryModelHandler(torch_handler(weights, room), namespace=namespace)
        with doorkeeper(room, 2) as seen:
            results, metrics = run(
                infer(handler, [torch.ones(WIDTH)] * 8, inference_args={"room": room}), room, 2,
                environment=ExternalEnvironment(f"localhost:{port}"),
            )  # fmt: skip
    finally:
        pool.terminate()
        pool.wait()
    assert (len(results), len(seen)) == (8, 1)
    assert len(counted(room, "loads")) == 1
    assert (metrics["shared_model_published_counter"], metrics["shared_model_attached_counter"]) == (1, 1)


def test_in_a_forked_subprocess(room, namespace):
    """`with_exception_handling(use_subprocess=True)` forks the worker, which may have the model already."""
    handler = SharedMemoryModelHandler(Arrays(room), namespace=namespace)
    model = handler.load_model()

    def build(pipeline):
        results, _ = (
            pipeline | beam.Create(range(4)) | RunInference(handler).with_exception_handling(use_subprocess=True)
        )
        return results

    results, _ = run(build, room, 1, mode="in_memory")
    assert [total for total, _ in results] == [model.total()] * 4
    assert {pid for _, pid in results}.isdisjoint({os.getpid()})
    assert counted(room, "loads") == [os.getpid()]
