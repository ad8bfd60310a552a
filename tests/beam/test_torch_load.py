"""Beam's torch handlers load their state dict from the mapped file: the model that Beam loads, in the memory of one."""

import gc
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from apache_beam.ml.inference.base import KeyedModelHandler
from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerKeyedTensor, PytorchModelHandlerTensor
from torch import nn

from onecopy.beam import SharedMemoryModelHandler, torch_load, torch_mapped

# Beam leaves the files of state dicts to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

WIDTH = 600  # a square of it is more than torch_mapped spares


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))
        self.register_buffer("places", torch.arange(WIDTH).float(), persistent=False)

    def forward(self, x):
        return self.norm(self.into(x) * self.scale + self.places)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(x @ self.words.weight)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 300, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


class Truncated(nn.Linear):
    """Draws again until it likes what it sees."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        with torch.no_grad():
            while not (self.weight.normal_().abs() < 10).all():
                pass
        nn.init.trunc_normal_(self.weight)
        nn.init.orthogonal_(self.weight)


class Looking(Plain):
    """Keeps its weight in another place, too."""

    def __init__(self):
        super().__init__()
        self.alias = self.into.weight.data

    def forward(self, x):
        return x @ self.alias


class Projecting(nn.Linear):
    """Has random numbers of its own, always the same."""

    def __init__(self):
        torch.manual_seed(1)
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("projection", torch.empty(WIDTH, WIDTH).normal_(), persistent=False)

    def forward(self, x):
        return super().forward(x @ self.projection)


class Drawing(Projecting):
    def __init__(self):
        super().__init__()
        self.projection = torch.randn(WIDTH, WIDTH)


class Half(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH, dtype=torch.bfloat16)

    def forward(self, x):
        return super().forward(x.bfloat16())


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        both = torch.zeros(2, WIDTH, WIDTH)
        self.one, self.other = nn.Parameter(both[0]), nn.Parameter(both[1])

    def forward(self, x):
        return x @ self.one @ self.other


MAPPED = [Plain, Tied, Recurrent, Truncated]
READ = {
    Looking: "does not replace",
    Projecting: "does not replace",
    Drawing: "draw other numbers",
    Half: "other types",
    Views: "one memory of the module",
}


def saved(cls, path, **options):
    """A state dict that is not what `cls` makes by itself."""
    model = nn.Linear(WIDTH, WIDTH) if cls is Half else cls()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape).abs())
    torch.save(model.state_dict(), path, **options)
    return str(path)


def handler(cls, path, **options):
    return PytorchModelHandlerTensor(state_dict_path=path, model_class=cls, **options)


def same(one, other):
    """Types, ties, flags, values, outputs."""
    assert type(one) is type(other)
    named, again = (
        dict(one.named_parameters(remove_duplicate=False)),
        dict(other.named_parameters(remove_duplicate=False)),
    )
    assert [*named] == [*again]
    assert {(a, b): named[a] is named[b] for a in named for b in named} == {
        (a, b): again[a] is again[b] for a in again for b in again
    }
    named |= dict(one.named_buffers())
    again |= dict(other.named_buffers())
    for name, tensor in named.items():
        mine = again[name]
        assert type(tensor) is type(mine)
        assert tensor.requires_grad is mine.requires_grad is False
        assert (tensor.dtype, tensor.stride(), tensor.device) == (mine.dtype, mine.stride(), mine.device)
        assert torch.equal(tensor, mine), name
    assert [module.training for module in one.modules()] == [module.training for module in other.modules()]
    x = torch.randn(2, 3, WIDTH)[:, 0]
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("cls", MAPPED)
def test_the_model_that_beam_loads(cls, tmp_path):
    path = saved(cls, tmp_path / "weights.pt")
    ours = handler(cls, path)
    model = torch_mapped.load(ours)
    same(handler(cls, path).load_model(), model)
    assert ours._device == torch.device("cpu")
    assert set(files_under(model)) == {path}


@pytest.mark.parametrize("cls", READ)
def test_what_would_differ_is_read_by_beam(cls, tmp_path, caplog):
    path = saved(cls, tmp_path / "weights.pt")
    with pytest.raises(torch_mapped.DiffersError, match=READ[cls]):
        torch_mapped.load(handler(cls, path))
    with caplog.at_level(logging.INFO, "onecopy"):
        model = torch_load.constructor(handler(cls, path))()
    assert READ[cls] in caplog.text
    same(handler(cls, path).load_model(), model)
    assert path not in files_under(model)


def test_ties_of_the_file_alone_are_not_made(tmp_path):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[0].weight = model[1].weight
    torch.save(model.state_dict(), tmp_path / "tied.pt")
    with pytest.raises(torch_mapped.DiffersError, match="one memory of the file"):
        torch_mapped.load(handler(two_layers, str(tmp_path / "tied.pt")))


def test_ties_of_the_module_that_the_file_does_not_have(tmp_path):
    state = Tied().state_dict()
    torch.save({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "untied.pt")
    with pytest.raises(torch_mapped.DiffersError, match="the file has several"):
        torch_mapped.load(handler(Tied, str(tmp_path / "untied.pt")))


def two_layers():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def test_errors_are_beams_own(tmp_path):
    path = saved(nn.Identity, tmp_path / "empty.pt")
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        torch_load.constructor(handler(Plain, path))()
    with pytest.raises(RuntimeError) as beams:
        handler(Plain, path).load_model()
    assert str(caught.value) == str(beams.value)


@pytest.mark.parametrize("old", [True, False])
def test_a_file_that_cannot_be_mapped(old, tmp_path):
    path = tmp_path / "weights.pt"
    saved(Plain, path, _use_new_zipfile_serialization=not old)
    if not old:
        path = path.rename(tmp_path / "elsewhere.pt")
    model = torch_load.constructor(handler(Plain, str(path)))()
    assert (str(path) in files_under(model)) is not old
    same(handler(Plain, str(path)).load_model(), model)


class Own(PytorchModelHandlerTensor):
    def load_model(self):
        return super().load_model()


def test_who_loads_otherwise_is_left_alone(tmp_path):
    path = saved(Plain, tmp_path / "weights.pt")
    options = {"model_class": Plain, "state_dict_path": path}
    for one in (
        Own(**options),
        PytorchModelHandlerTensor(**options, load_model_args={"mmap": False}),
        PytorchModelHandlerTensor(model_class=Plain, state_dict_path=str(tmp_path / "not there")),
        PytorchModelHandlerTensor(model_class=Plain, state_dict_path="gs://bucket/weights.pt"),
    ):
        assert torch_load.constructor(one) == one.load_model
    for one in (
        PytorchModelHandlerKeyedTensor(**options),
        KeyedModelHandler(PytorchModelHandlerTensor(**options)),
        PytorchModelHandlerTensor(**options).with_preprocess_fn(abs),
    ):
        assert path in files_under(torch_load.constructor(one)())


@pytest.mark.parametrize("mapped", [True, False])
def test_through_the_wrapper(mapped, namespace, tmp_path, caplog):
    path = saved(Plain, tmp_path / "weights.pt")
    wrapped = SharedMemoryModelHandler(handler(Plain, path), namespace=namespace, map_weights=mapped)
    loads = []
    Plain.__init__, plain = counting(Plain.__init__, loads), Plain.__init__
    try:
        model = wrapped.load_model()
    finally:
        Plain.__init__ = plain
    assert loads == ["thrifty" if mapped else "filling"]
    same(handler(Plain, path).load_model(), model)
    x = [torch.randn(WIDTH)]
    (mine,), (beams,) = (list(one.run_inference(x, one.load_model())) for one in (wrapped, handler(Plain, path)))
    assert torch.equal(mine.inference, beams.inference)
    # The segment has taken the file's place.
    assert path not in files_under(model)


def test_who_does_not_share_does_not_depend_on_the_file(monkeypatch, tmp_path):
    path = saved(Tied, tmp_path / "weights.pt")
    monkeypatch.setenv("ONECOPY_DIR", str(tmp_path / "not there"))
    wrapped = SharedMemoryModelHandler(handler(Tied, path))
    model = wrapped.load_model()
    assert path not in files_under(model)
    same(handler(Tied, path).load_model(), model)
    mapped = torch_load.constructor(handler(Tied, path))()
    assert path in files_under(mapped)
    same(handler(Tied, path).load_model(), torch_load.unmapped(mapped))
    gc.collect()
    assert path not in files_under(mapped)


def test_the_compiler_of_torch_is_not_imported(tmp_path):
    """It takes seconds, and memory for good, in the process that loads."""
    script = (
        "import sys; from test_torch_load import Plain, handler, torch_mapped; "
        "torch_mapped.load(handler(Plain, sys.argv[1])); print('torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", script, saved(Plain, tmp_path / "weights.pt")]
    said = subprocess.run(command, cwd=Path(__file__).parent, check=True, text=True, stdout=subprocess.PIPE)
    assert said.stdout.strip() == "False"


def counting(init, loads):
    def counted(self):
        init(self)
        loads.append("thrifty" if torch.utils._python_dispatch._get_current_dispatch_mode() else "filling")

    return counted


def files_under(model):
    """The files whose pages the parameters are."""
    addresses = [tensor.data_ptr() for tensor in model.parameters()]
    found = []
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            span, *_, name = line.split()
            start, end = (int(number, 16) for number in span.split("-"))
            found += [name for address in addresses if start <= address < end]
    return found
