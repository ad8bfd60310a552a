"""Re-pointing: while it is published, an object moves from its own memory to the mapping, buffer by buffer."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from apart import DATA_START, fingerprint
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations

from onecopy.skeleton import Buffer, Parts, take_apart


def shared_window(parts: Parts) -> mmap.mmap:
    """A mapping of an unsealed memfd, as the publisher has it."""
    fd = os.memfd_create("onecopy-test")
    try:
        os.ftruncate(fd, DATA_START + parts.data_bytes)
        return mmap.mmap(fd, DATA_START + parts.data_bytes, flags=mmap.MAP_SHARED)
    finally:
        os.close(fd)


def fill(parts: Parts, window: mmap.mmap, buffer: Buffer) -> None:
    start = DATA_START + buffer.offset
    window[start : start + buffer.nbytes] = memoryview(buffer.source)


def publish(obj: object) -> tuple[Parts, mmap.mmap]:
    parts = take_apart(obj, least_shared=0)
    window = shared_window(parts)
    for buffer in parts.buffers:
        fill(parts, window, buffer)
        if buffer.repoint is not None:
            buffer.repoint(window, DATA_START + buffer.offset)
            buffer.source = None
    return parts, window


def address_of(window: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(window))


def tied() -> list[torch.Tensor]:
    weight = nn.Parameter(torch.randn(64, 64))
    return [weight, weight.T, weight.detach()[3:], weight.data]


def views_of_a_hidden_base() -> list[torch.Tensor]:
    base = torch.randn(64, 64)
    return [base[3:7], base[::2, ::3], base.view(torch.int32)]


def quantized() -> list[torch.Tensor]:
    scales = torch.rand(64, dtype=torch.double) + 0.1
    per_channel = torch.quantize_per_channel(torch.randn(64, 32), scales, torch.arange(64), 0, torch.qint8)
    per_tensor = torch.quantize_per_tensor(torch.randn(64, 32), 0.1, 3, torch.quint8)
    return [per_tensor, per_channel, per_channel.q_per_channel_scales()]


def grown() -> list[torch.Tensor]:
    weight = nn.Parameter(torch.randn(64, 64))
    return [weight, weight * 2, (weight * 3)[5:]]


def complexes() -> list[torch.Tensor]:
    plain = torch.randn(64, dtype=torch.complex64)
    return [plain, plain.conj(), plain.imag]


def noted() -> list[torch.Tensor]:
    weight = nn.Parameter(torch.randn(64, 64))
    weight.note = "x"
    return [weight, nn.Buffer(torch.randn(9)), torch.randn(9).as_subclass(type("Sub", (torch.Tensor,), {}))]


MOVABLE: dict[str, Callable[[], list[torch.Tensor]]] = {
    "tied": tied,
    "views_of_a_hidden_base": views_of_a_hidden_base,
    "quantized": quantized,
    "non_leaf": grown,
    "complex": complexes,
    "attributes_and_subclasses": noted,
    "bfloat16": lambda: [
        torch.randn(64).bfloat16(),
        nn.Parameter(torch.randn(64).to(torch.float8_e5m2), requires_grad=False),
    ],
    "no_grad_view": lambda: [torch.randn(64, 64).requires_grad_().detach()[5:]],
    "jagged": lambda: [torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged)],
    "module": lambda: list(parametrizations.weight_norm(nn.Linear(64, 64)).parameters()),
}


@pytest.mark.parametrize("build", MOVABLE.values(), ids=MOVABLE.keys())
def test_tensors_look_at_the_mapping_and_their_memory_goes(build: Callable[[], list[torch.Tensor]]) -> None:
    with torch.no_grad() if build is not grown else torch.enable_grad():
        tensors = build()
    before = fingerprint(tensors)
    strided = [tensor.values() if tensor.layout is torch.jagged else tensor for tensor in tensors]
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in strided]
    del strided
    parts = take_apart(tensors, least_shared=0)
    window = shared_window(parts)
    gc.disable()  # memory must go by reference count
    try:
        for buffer in parts.buffers:
            assert buffer.repoint is not None
            fill(parts, window, buffer)
            buffer.repoint(window, DATA_START + buffer.offset)
            buffer.source = None
        assert [storage.expired() for storage in storages] == [True] * len(storages)
    finally:
        gc.enable()
    assert fingerprint(tensors) == before
    start = address_of(window)
    for tensor in [tensor.values() if tensor.layout is torch.jagged else tensor for tensor in tensors]:
        assert start <= tensor.data_ptr() < start + len(window)
        if tensor._base is not None:
            assert start <= tensor._base.data_ptr() < start + len(window)


def test_training_goes_on_after_the_move() -> None:
    torch.manual_seed(1)
    moved, stayed = nn.Linear(64, 64), nn.Linear(64, 64)
    stayed.load_state_dict(moved.state_dict())
    outputs = [layer(torch.ones(2, 64)) for layer in (moved, stayed)]
    publish(moved)
    for layer, output in zip((moved, stayed), outputs, strict=True):
        output.sum().backward()  # a graph recorded before the move
        layer(torch.ones(2, 64)).sum().backward()
        torch.optim.Adam(layer.parameters()).step()
    assert torch.equal(moved.weight, stayed.weight)


def test_an_alias_that_was_not_met_keeps_the_old_memory() -> None:
    layer = nn.Linear(64, 64)
    array, detached = layer.weight.detach().numpy(), layer.weight.detach()
    before = array.copy()
    _, window = publish(layer)
    gc.collect()
    assert (array == before).all()
    with torch.no_grad():
        layer.weight.zero_()
    assert (array == before).all()
    assert torch.equal(detached, torch.from_numpy(before))
    assert layer.weight.data_ptr() >= address_of(window)


def inference_mode() -> object:
    with torch.inference_mode():
        return torch.randn(64)


KEPT: dict[str, Callable[[], object]] = {
    "numpy_alias": lambda: (t := torch.randn(64), t.numpy()[3:]),
    "inference_mode": inference_mode,
    "sparse": lambda: torch.eye(64).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(3), torch.randn(4)]),
    "storage": lambda: torch.randn(64).untyped_storage(),
}


@pytest.mark.parametrize("build", KEPT.values(), ids=KEPT.keys())
def test_what_cannot_be_moved_keeps_its_memory_and_says_so(build: Callable[[], object]) -> None:
    obj = build()
    before = fingerprint(obj)
    parts, _ = publish([obj, torch.randn(64)])
    assert parts.buffers[0].repoint is None
    assert parts.buffers[0].source is not None
    assert parts.buffers[-1].source is None
    assert fingerprint(obj) == before


def test_a_failure_in_the_middle_leaves_the_object_whole() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    expected = model(torch.ones(1, 64))
    parts = take_apart(model, least_shared=0)
    window = shared_window(parts)
    for buffer in parts.buffers[:3]:
        fill(parts, window, buffer)
        assert buffer.repoint is not None
        buffer.repoint(window, DATA_START + buffer.offset)
        buffer.source = None
    with pytest.raises(TypeError):  # the next buffer lies outside the mapping
        parts.buffers[3].repoint(window, len(window))
    del parts
    gc.collect()
    assert torch.equal(model(torch.ones(1, 64)), expected)


def test_a_storage_moves_wholly_or_not_at_all() -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    obj = [weight, weight.detach(), weight.detach()[3:]]
    old = weight.data_ptr()

    class Stubborn(torch.Tensor):
        @property
        def data(self) -> torch.Tensor:
            return self.detach()

        @data.setter
        def data(self, _new: torch.Tensor) -> None:
            raise MemoryError("in the middle")

    obj.append(weight.detach().as_subclass(Stubborn))
    with pytest.raises(MemoryError):
        publish(obj)
    assert [t.data_ptr() - t.storage_offset() * 4 for t in obj] == [old] * 4


def test_an_attached_object_can_be_published_again() -> None:
    layer = nn.Linear(64, 64)
    expected = fingerprint(layer)
    _, first = publish(layer)
    again, second = publish(layer)
    assert again.data_bytes == len(second) - DATA_START
    del first
    gc.collect()
    assert fingerprint(layer) == expected


PEAK = f"""
import ctypes, gc, os, sys
import torch
sys.path[:0] = {sys.path!r}
from test_torch_move import DATA_START, fill, shared_window
from onecopy.skeleton import take_apart

def private():
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

MIB = 1 << 20
torch.nn.Linear(8, 8)(torch.ones(1, 8))
take_apart(torch.nn.Linear(600, 600))
gc.collect()
gc.disable()
before = private()
model = torch.nn.Sequential(*[torch.nn.Linear(2048, 4096) for _ in range(8)])   # 32 MiB each
whole = private() - before
assert whole >= 256 * MIB, whole
x = torch.ones(1, 2048)
expected = model[7](x)
parts = take_apart(model)
assert private() - before < whole + 4 * MIB
window = shared_window(parts)
left = sum(buffer.nbytes for buffer in parts.buffers)
for buffer in parts.buffers:
    fill(parts, window, buffer)
    buffer.repoint(window, DATA_START + buffer.offset)
    buffer.source = None
    left -= buffer.nbytes
    assert private() - before < left + 8 * MIB, (private() - before, left)
assert torch.equal(model[7](x), expected)
"""


def test_the_peak_is_one_model_and_one_tensor() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", PEAK], check=True, env=environment)
