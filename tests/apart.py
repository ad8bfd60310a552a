"""What the tests of the skeleton share: a real sealed memfd, another process, and a fingerprint of any object."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import mmap
import multiprocessing
import os
import pickle
import socket
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from onecopy.skeleton import Parts, put_together

DATA_START = 4096
MIB = 1 << 20
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@contextmanager
def segment(parts: Parts) -> Iterator[int]:
    """A sealed memfd with the buffers in it."""
    fd = os.memfd_create("onecopy-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, DATA_START + parts.data_bytes)
        end = 0
        for buffer in parts.buffers:
            assert buffer.offset % 64 == 0
            assert buffer.offset >= end
            end = buffer.offset + buffer.nbytes
            view = memoryview(buffer.source)
            assert (view.nbytes, view.c_contiguous) == (buffer.nbytes, True)
            written = 0
            while written < view.nbytes:  # one call writes 2 GiB at most
                written += os.pwrite(fd, view[written:], DATA_START + buffer.offset + written)
        assert end == parts.data_bytes
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        yield fd
    finally:
        os.close(fd)


def private_mapping(fd: int) -> mmap.mmap:
    size = max(os.fstat(fd).st_size, 1)
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def round_trip(parts: Parts) -> Any:
    """Put together in this process."""
    with segment(parts) as fd:
        return put_together(parts.skeleton, private_mapping(fd), DATA_START)


@dataclass
class Seen:
    """What another process saw."""

    result: Any
    attach_growth: int  # bytes of private memory
    use_growth: int


class OtherProcess:
    """A process that maps what it is sent, and calls a function with the object."""

    def __init__(self) -> None:
        self._here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()
        self._stream = self._here.makefile("rwb")

    def __call__(self, parts: Parts, function: Callable[[Any], Any]) -> Seen:
        with segment(parts) as fd:
            socket.send_fds(self._here, [b"x"], [fd])
            pickle.dump((parts.skeleton, cloudpickle.dumps(function)), self._stream)
            self._stream.flush()
            answer = cloudpickle.loads(pickle.load(self._stream))
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Seen)
        return answer

    def close(self) -> None:
        self._stream.close()
        self._here.close()
        self._process.join()


@pytest.fixture(scope="module")
def other_process() -> Iterator[OtherProcess]:
    process = OtherProcess()
    yield process
    process.close()


def _serve(connection: socket.socket) -> None:
    sys.path.append(str(Path(__file__).parents[1]))  # for classes of the tests, as pytest names their modules
    stream = connection.makefile("rwb")
    while True:
        _, fds, _, _ = socket.recv_fds(connection, 1, 1)
        if not fds:
            return
        skeleton, function = pickle.load(stream)
        try:
            answer: Any = _see(fds[0], skeleton, cloudpickle.loads(function))
        except Exception as error:
            answer = error
        try:
            message = cloudpickle.dumps(answer)
        except Exception:
            message = cloudpickle.dumps(RuntimeError(repr(answer)))
        pickle.dump(message, stream)
        stream.flush()


def _see(fd: int, skeleton: bytes, function: Callable[[Any], Any]) -> Seen:
    mapping = private_mapping(fd)
    os.close(fd)
    put_together(skeleton, mapping, DATA_START)  # the modules that it imports are not what is measured
    before = anonymous()
    obj = put_together(skeleton, mapping, DATA_START)
    attached = anonymous()
    result = function(obj)
    used = anonymous()
    return Seen(result, attached - before, used - attached)


def anonymous() -> int:
    """Bytes of private memory. `Private_*` would count shared pages of which this process is the only mapper."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with Path("/proc/self/smaps_rollup").open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def fingerprint(obj: object) -> object:
    """Everything that must be the same in another process: types, values to the bit, geometry, who shares memory
    with whom, and who is whom. Plain data, to be compared."""
    return _Fingerprint().of(obj)


class _Fingerprint:
    def __init__(self) -> None:
        self._met: dict[int, int] = {}  # id -> how many were met before
        self._kept: list[object] = []
        self._memory: list[tuple[int, int]] = []

    def of(self, obj: Any) -> object:
        if obj is None or isinstance(obj, (bool, int, float, complex, str, bytes)):
            return obj
        if isinstance(obj, (type, types.BuiltinFunctionType, types.FunctionType, types.MethodType)):
            return obj.__qualname__
        number = self._met.setdefault(id(obj), len(self._met))
        self._kept.append(obj)
        if number != len(self._met) - 1:
            return f"#{number}"
        return number, type(obj).__name__, self._content(obj)

    def _content(self, obj: Any) -> object:
        if isinstance(obj, dict):
            return [(self.of(key), self.of(value)) for key, value in obj.items()]
        if isinstance(obj, (list, tuple)):
            return [self.of(value) for value in obj]
        if isinstance(obj, (set, frozenset)):
            return sorted(map(repr, obj))
        if isinstance(obj, (np.ndarray, np.generic)):
            return self._array(np.asarray(obj)), self.of(getattr(obj, "__dict__", None))
        if type(obj).__module__.partition(".")[0] == "torch":
            import torch

            if isinstance(obj, torch.Tensor):
                return self._tensor(obj), self.of(vars(obj))
            if isinstance(obj, torch.nn.Module):
                return self.of(vars(obj))
            if torch.is_storage(obj):
                return obj.nbytes(), _hash(bytes(memoryview(_bytes_of(obj.untyped()))))
            return repr(obj)
        if hasattr(obj, "__dict__"):
            return self.of(vars(obj))
        return repr(obj)

    def _array(self, array: np.ndarray[Any, Any]) -> object:
        if array.dtype.hasobject:
            return array.shape, array.strides, [self.of(value) for value in array.ravel().tolist()]
        flags = array.flags.writeable, array.flags.c_contiguous, array.flags.f_contiguous
        geometry = array.shape, array.strides if array.size else None, array.dtype.str, repr(array.dtype.descr), flags
        start, stop = np.lib.array_utils.byte_bounds(array)
        return geometry, _hash(array.tobytes()), self._shares(start, stop - start)

    def _tensor(self, tensor: Any) -> object:
        import torch

        if tensor.is_nested:
            return tensor.dtype, [self._tensor(part) for part in tensor.unbind()]
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            return tensor.dtype, tensor.shape, names, context  # the attributes themselves are in its __dict__
        traits = tensor.dtype, tensor.shape, tensor.layout, tensor.requires_grad, tensor.is_leaf, tensor.device
        if tensor.layout is torch.sparse_coo:
            return traits, tensor.is_coalesced(), self._tensor(tensor._indices()), self._tensor(tensor._values())
        if tensor.layout is not torch.strided:
            parts = torch.sparse_csr, torch.sparse_bsr
            rows = (tensor.crow_indices, tensor.col_indices)
            columns = (tensor.ccol_indices, tensor.row_indices) if tensor.layout not in parts else rows
            return traits, [self._tensor(part()) for part in (*columns, tensor.values)]
        if tensor.device.type == "meta":
            return traits, tensor.stride()
        quantizer: object = None
        if tensor.is_quantized:
            if tensor.qscheme() is torch.per_tensor_affine:
                quantizer = tensor.q_scale(), tensor.q_zero_point()
            else:
                scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
                quantizer = self._tensor(scales), self._tensor(zeros), tensor.q_per_channel_axis()
        storage = tensor.untyped_storage()
        content = _hash(bytes(memoryview(_bytes_of(storage))))
        geometry = tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()
        return traits, geometry, quantizer, content, self._shares(storage.data_ptr(), storage.nbytes())

    def _shares(self, start: int, nbytes: int) -> object:
        """Which of the memories met before overlap this one, and where."""
        if not nbytes:
            return None
        self._memory.append((start, nbytes))
        return [
            (number, start - other, length)
            for number, (other, length) in enumerate(self._memory[:-1])
            if start < other + length and other < start + nbytes
        ]


def _bytes_of(storage: Any) -> Any:
    import torch

    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
