"""Torch tensors and modules, taken apart and put together over a real mapping, in this process and in another."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pytest
import torch
from apart import DATA_START, MIB, OtherProcess, fingerprint, other_process, private_mapping, round_trip, segment
from torch import nn
from torch.nn.utils import parametrizations

from onecopy.skeleton import Unshareable, put_together, take_apart

__all__ = ["other_process"]  # a fixture

torch.manual_seed(7)
SIZE = 4 * MIB  # bytes of the tensors here: a copy of one is seen in the private memory
DTYPES = sorted(
    {d for d in vars(torch).values() if isinstance(d, torch.dtype)} - {torch.quint4x2, torch.quint2x4}, key=str
)
QUANTIZED = {torch.qint8, torch.quint8, torch.qint32}


def storage(nbytes: int = SIZE) -> torch.UntypedStorage:
    # Bytes below 64: finite in every float format.
    return torch.randint(0, 64, (nbytes,), dtype=torch.uint8).untyped_storage()


def of_dtype(dtype: torch.dtype, nbytes: int = SIZE) -> torch.Tensor:
    count = nbytes // dtype.itemsize
    if dtype in QUANTIZED:
        return torch.quantize_per_tensor(torch.randn(count), 0.1, 3, dtype)
    return torch.empty(0, dtype=dtype).set_(storage(nbytes), 0, (count,), (1,))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (1024, 1024)))


def tied() -> object:
    model = nn.ModuleDict({"embed": nn.Embedding(1024, 1024), "head": nn.Linear(1024, 1024, bias=False)})
    model["head"].weight = model["embed"].weight
    return model, model["embed"].weight.data, model["embed"].weight.detach().T


def views() -> object:
    base = floats()
    return {"strided": base[::2, 3:], "rows": base[:600], "late rows": base[500:], "t": base.t(), "element": base[1, 1]}


def flat_parameters() -> object:
    flat = floats(1 << 20)
    return [nn.Parameter(flat[i * 10_000 :].narrow(0, 0, 10_000)) for i in range(100)]


def overlapping_storages() -> object:
    # As memory-mapped checkpoints have it: two storages over the same bytes, neither knows of the other.
    data = np.frombuffer(np.random.default_rng(7).bytes(SIZE), np.uint8).copy()
    return torch.from_numpy(data[: SIZE // 2]), torch.from_numpy(data[64:])


def numpy_alias() -> object:
    tensor = floats()
    return {"tensor": tensor, "array": tensor.numpy()[3:, ::2], "other": torch.from_numpy(tensor.numpy()[5])}


def attributes() -> object:
    parameter = nn.Parameter(floats())
    parameter.note = {"scale": floats(8)}
    plain = floats()
    plain.note = parameter
    return plain


def sparse() -> object:
    dense = floats() * (floats() > 1)
    blocks = dense.to_sparse_bsr((32, 32))
    return dense.to_sparse(), dense.to_sparse().coalesce(), dense.to_sparse_csr(), dense.to_sparse_csc(), blocks


def per_channel() -> object:
    scales = torch.rand(1024, dtype=torch.double) + 0.1
    return torch.quantize_per_channel(floats(), scales, torch.arange(1024) % 100, 0, torch.qint8)


def inference_mode() -> object:
    with torch.inference_mode():
        return [floats(), floats().half()]


class Scaled(torch.Tensor):
    """A subclass that is a strided tensor."""


class Wrapped(torch.Tensor):
    """A subclass without storage, around two tensors that have some, as torchao's are."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.inner, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], *_: object) -> Wrapped:
        return cls(inner["inner"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner, args[0].scale)
        plain = [a.inner.to(a.scale.dtype) * a.scale if isinstance(a, Wrapped) else a for a in args]
        return func(*plain, **(kwargs or {}))


def wrapped() -> object:
    inner = Wrapped(torch.randint(-9, 9, (2048, 2048), dtype=torch.int8), torch.tensor(0.5))
    return nn.Parameter(inner, requires_grad=False)


def non_leaf() -> object:
    weight = nn.Parameter(floats())
    return [weight, weight * 2, (weight * 3)[5:]]


def with_grad() -> object:
    layer = nn.Linear(1024, 1024)
    layer(floats(1, 1024)).sum().backward()
    return layer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.register_buffer("kept", floats())
        self.register_buffer("passing", floats(), persistent=False)
        self.modern = nn.Buffer(floats(), persistent=False)
        self.constant = floats()
        self.frozen = nn.Parameter(floats(), requires_grad=False)
        self.absent = None
        self.register_parameter("no_bias", None)
        self.register_forward_hook(double)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x))).sum() + self.kept.sum() * self.frozen.mean() + self.passing.max()


def double(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output * 2


CASES: dict[str, Callable[[], object]] = {
    "tied": tied,
    "views": views,
    "flat_parameters": flat_parameters,
    "overlapping_storages": overlapping_storages,
    "numpy_alias": numpy_alias,
    "attributes": attributes,
    "sparse": sparse,
    "per_channel": per_channel,
    "inference_mode": inference_mode,
    "subclass": lambda: floats().as_subclass(Scaled),
    "wrapper_subclass": wrapped,
    "non_leaf": non_leaf,
    "transposed": lambda: floats().T,
    "channels_last": lambda: torch.randn(64, 16, 32, 32).to(memory_format=torch.channels_last),
    "ambiguous_strides": lambda: torch.randn(2048, 1, 512).as_strided((2048, 1, 512), (512, 7, 1)),
    "expanded": lambda: [floats(), floats(1, 4).expand(1000, 4), floats().expand(3, 1024, 1024)],
    "0-d": lambda: [
        floats(),
        torch.tensor(3.5),
        torch.tensor(2, dtype=torch.bfloat16),
        nn.Parameter(torch.tensor(1.0)),
    ],
    "empty": lambda: [
        floats(),
        torch.empty(0),
        torch.empty(3, 0, dtype=torch.float8_e5m2),
        nn.Parameter(torch.empty(0, 2)),
    ],
    "offset": lambda: floats(1 << 20)[17:],
    "requires_grad": lambda: [floats().requires_grad_(), floats().bfloat16().requires_grad_(), floats()[3:].detach()],
    "conjugated": lambda: torch.randn(SIZE // 8, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(SIZE // 8, dtype=torch.complex64).conj().imag,
    "nested": lambda: torch.nested.nested_tensor([floats(), floats(3, 4)]),
    "meta": lambda: [floats(), torch.empty(1 << 40, device="meta"), nn.Linear(9, 9, device="meta")],
    "storages": lambda: (t := floats(), t.untyped_storage(), t.storage())[:2],
    "dtypes_and_devices": lambda: [floats(), torch.float16, torch.device("cpu"), torch.Size([2]), torch.channels_last],
}
CASES |= {str(dtype): lambda dtype=dtype: of_dtype(dtype) for dtype in DTYPES}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore:.*(prototype|beta|TypedStorage is deprecated|quant)")
def test_round_trip_in_another_process(case: Callable[[], object], other_process: OtherProcess) -> None:
    obj = case()
    parts = take_apart(obj)
    after = fingerprint(obj)
    seen = other_process(parts, fingerprint)
    if obj_is_non_leaf(obj):  # pickling a tensor drops its history
        after, seen.result = without_leaves(after), without_leaves(seen.result)
    assert seen.result == after
    assert seen.attach_growth < MIB


def obj_is_non_leaf(obj: object) -> bool:
    return isinstance(obj, list) and any(isinstance(t, torch.Tensor) and not t.is_leaf for t in obj)


def without_leaves(found: object) -> str:
    return repr(found).replace("True, False, device", "True, True, device")


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([floats(), floats(3, 1024)], layout=torch.jagged)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "net": (lambda: Net().eval(), lambda: torch.ones(2, 3, 8, 8)),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024)),
        lambda: torch.ones(2, 1024),
    ),
    "bfloat16": (lambda: nn.Linear(2048, 1024).bfloat16(), lambda: torch.ones(2, 2048).bfloat16()),
    "lstm": (lambda: nn.LSTM(512, 512, 2, batch_first=True), lambda: torch.ones(1, 4, 512)),
    "attention": (lambda: nn.TransformerEncoderLayer(512, 8, batch_first=True).eval(), lambda: torch.ones(1, 4, 512)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(1024, 1024)), lambda: torch.ones(2, 1024)),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(1024, 1024)).eval(),
        lambda: torch.ones(2, 1024),
    ),
    "parametrized_lstm": (
        lambda: parametrizations.weight_norm(nn.LSTM(512, 512), "weight_hh_l0"),
        lambda: torch.ones(4, 512),
    ),
    "channels_last": (
        lambda: nn.Sequential(*[nn.Conv2d(256, 256, 3) for _ in range(2)]).to(memory_format=torch.channels_last),
        lambda: torch.ones(1, 256, 8, 8).to(memory_format=torch.channels_last),
    ),
    "wrapped": (
        lambda: nn.Sequential(nn.Linear(2048, 2048)).requires_grad_(requires_grad=False),
        lambda: torch.ones(1, 2048),
    ),
    "with_grad": (with_grad, lambda: torch.ones(1, 1024)),
}


@pytest.mark.parametrize(("build", "example"), MODULES.values(), ids=MODULES.keys())
def test_modules_compute_the_same_in_another_process(
    build: Callable[[], nn.Module], example: Callable[[], torch.Tensor], other_process: OtherProcess
) -> None:
    module, x = build(), example()

    def use(module: nn.Module) -> object:
        torch.set_num_threads(1)
        with torch.no_grad():
            output = module(x)
        names = [
            (name, type(p).__name__, p.requires_grad) for name, p in module.named_parameters(remove_duplicate=False)
        ]
        buffers = [(name, b.shape) for name, b in module.named_buffers()]
        return fingerprint([output]), names, buffers, list(module.state_dict()), module.training, str(module)

    threads = torch.get_num_threads()
    try:
        expected = use(module)
    finally:
        torch.set_num_threads(threads)
    seen = other_process(take_apart(module), use)
    assert seen.result == expected
    assert seen.attach_growth < MIB


def test_jagged_nested_tensors(other_process: OtherProcess) -> None:
    obj = jagged()
    seen = other_process(take_apart(obj), lambda nested: fingerprint([t.clone() for t in nested.unbind()]))
    assert seen.result == fingerprint([t.clone() for t in obj.unbind()])
    assert seen.attach_growth < MIB


def test_identity_is_kept() -> None:
    parameter, plain, whole = nn.Parameter(floats()), floats()[3:], floats()
    rebuilt = round_trip(take_apart([parameter, plain, whole, parameter, plain, whole, parameter.data]))
    assert all(rebuilt[i] is rebuilt[i + 3] for i in range(3))
    assert type(rebuilt[0]) is nn.Parameter
    assert rebuilt[6] is not rebuilt[0]
    assert rebuilt[6].data_ptr() == rebuilt[0].data_ptr()


def test_a_tied_weight_is_stored_once() -> None:
    weight = nn.Parameter(floats())
    parts = take_apart([weight, weight.detach()[2:], weight.T, weight.detach().numpy(), weight.untyped_storage()])
    assert parts.data_bytes == weight.nbytes


def test_writes_in_place_stay_private(other_process: OtherProcess) -> None:
    layer = nn.Linear(2048, 2048)
    parts = take_apart(layer)

    def step(layer: nn.Linear) -> float:
        with torch.no_grad():
            layer.weight[0] = 42
        return float(layer.weight.detach()[0].sum())

    seen = other_process(parts, step)
    assert seen.result == 42 * 2048
    assert seen.use_growth < MIB
    with segment(parts) as fd:
        mine = put_together(parts.skeleton, private_mapping(fd), DATA_START)
        theirs = put_together(parts.skeleton, private_mapping(fd), DATA_START)
        torch.optim.SGD(theirs.parameters(), 0.5)
        theirs(torch.ones(1, 2048)).sum().backward()
        torch.optim.SGD(theirs.parameters(), 0.5).step()
        assert not torch.equal(theirs.weight, layer.weight)
        assert torch.equal(mine.weight, layer.weight)
        mine.train()
        nn.init.zeros_(mine.bias)
        assert not torch.equal(mine.bias, layer.bias)


def test_batch_norm_trains_on_private_statistics() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.BatchNorm1d(1024))
    parts = take_apart(model)
    with segment(parts) as fd:
        mine, theirs = (put_together(parts.skeleton, private_mapping(fd), DATA_START) for _ in range(2))
        theirs.train()(torch.randn(8, 1024))
        assert int(theirs[1].num_batches_tracked) == 1
        assert int(mine[1].num_batches_tracked) == 0
        assert torch.equal(mine[1].running_mean, torch.zeros(1024))


def test_lazy_modules_stay_lazy() -> None:
    _, lazy = round_trip(take_apart([floats(), nn.LazyLinear(4)]))
    assert nn.parameter.is_lazy(lazy.weight)
    assert lazy(torch.ones(2, 3)).shape == (2, 4)


def test_saving_one_tensor_writes_that_tensor_only() -> None:
    layers = round_trip(take_apart(nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])))
    for tensor in (layers[3].weight, layers[3].weight.data, layers[5].bias):
        file = io.BytesIO()
        torch.save(tensor, file)
        assert file.tell() < tensor.nbytes + 4096


def test_views_are_no_autograd_views() -> None:
    # One made under no_grad could not be written in place where a gradient flows.
    for made in round_trip(take_apart([floats().bfloat16(), of_dtype(torch.float8_e4m3fn), floats()[3:]])):
        assert not made._is_view()


def test_inference_mode_does_not_mark_what_is_rebuilt() -> None:
    parts = take_apart([floats(), floats()[1:], nn.Parameter(floats().bfloat16()), floats().to_sparse()])
    with torch.inference_mode():
        rebuilt = round_trip(parts)
    assert not any(tensor.is_inference() for tensor in rebuilt)


def test_the_default_device_does_not_matter() -> None:
    parts = take_apart([floats(), floats()[1:]])
    with torch.device("meta"):
        assert [t.device.type for t in round_trip(parts)] == ["cpu", "cpu"]


def test_sparse_tensors_do_not_pile_up_in_torch() -> None:
    round_trip(take_apart([floats().to_sparse()]))
    assert not torch._utils._get_sparse_tensors_to_validate()


def test_hooks_on_tensors_are_not_kept_and_torch_says_so() -> None:
    tensor = floats().requires_grad_()
    tensor.register_hook(lambda grad: grad)
    with pytest.warns(UserWarning, match="hook"):
        rebuilt = round_trip(take_apart([tensor]))
    assert torch.equal(rebuilt[0], tensor)


def quantized_dynamically() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2048, 2048)), {nn.Linear})


def exported() -> object:
    return torch.export.export(nn.Linear(1024, 1024), (torch.ones(1, 1024),))


UNSHAREABLE: dict[str, tuple[Callable[[], object], str]] = {
    "mkldnn": (lambda: {"layer": {"weight": floats().to_mkldnn()}}, r"opaque mkldnn.*\(at \['layer'\]\['weight'\]\)"),
    "quantize_dynamic": (quantized_dynamically, "packed parameters.*torchao"),
    "quantized_convolution": (lambda: torch.ao.nn.quantized.Conv2d(64, 64, 3), "packed parameters.*torchao"),
    "script": (lambda: nn.Sequential(torch.jit.script(nn.Linear(1024, 1024))), r"eager module.*\(at \.0\)"),
    "trace": (lambda: torch.jit.trace(nn.Linear(1024, 1024), torch.ones(1, 1024)), "eager module"),
    "export": (exported, "ExportedProgram"),
}


@pytest.mark.parametrize(("build", "reason"), UNSHAREABLE.values(), ids=UNSHAREABLE.keys())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_what_cannot_be_shared_says_so(build: Callable[[], object], reason: str) -> None:
    with pytest.raises(Unshareable, match=reason) as raised:
        take_apart(build())
    assert not raised.value.silent


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_cannot_be_shared() -> None:
    with pytest.raises(Unshareable, match="only CPU tensors"):
        take_apart(nn.Linear(1024, 1024).cuda())
