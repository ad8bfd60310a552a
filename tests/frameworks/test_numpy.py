"""NumPy arrays, taken apart and put together over a real mapping, in this process and in another."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from apart import MIB, OtherProcess, fingerprint, other_process, private_mapping, round_trip, segment
from hypothesis import given, settings
from hypothesis import strategies as st

from onecopy.skeleton import Unshareable, put_together, take_apart

__all__ = ["other_process"]  # a fixture

RNG = np.random.default_rng(7)


def array(megabytes: int = 4, dtype: str = "f8") -> np.ndarray[Any, Any]:
    return np.frombuffer(RNG.bytes(megabytes * MIB), dtype).copy()


def overlapping() -> object:
    base = array()
    return [base[: len(base) // 2], base[100:], base[::3]]


def same_twice() -> object:
    one = array()
    return {"a": one, "b": [one, one.reshape(64, -1)]}


def interleaved() -> object:
    table = array().reshape(-1, 16)
    return [table[:, :3], table[:, 2:9]]


def read_only() -> object:
    one = array()
    one.flags.writeable = False
    return one


def with_objects() -> object:
    cells = np.empty(2, object)
    cells[0], cells[1] = array(), {"x": array(1)}
    return cells


def memory_mapped() -> object:
    with tempfile.TemporaryFile() as file:
        file.write(array().tobytes())
        file.flush()
        return np.memmap(file, "f4", "r")


def structured() -> object:
    return array().view([("when", "M8[us]"), ("value", ">f4"), ("flags", "u1", (4,))])


class Labelled(np.ndarray[Any, Any]):
    """A subclass with an attribute, which NumPy's own pickling forgets."""

    label: str = ""


def labelled() -> object:
    one = array().view(Labelled)
    one.label = "weights"
    return one


CASES: dict[str, Callable[[], object]] = {
    "plain": array,
    "same_twice": same_twice,
    "overlapping": overlapping,
    "interleaved": interleaved,
    "fortran": lambda: np.asfortranarray(array().reshape(256, -1)),
    "transposed_4d": lambda: array().reshape(8, 16, 32, -1).transpose(2, 0, 3, 1),
    "0-d": lambda: [array(), np.array(3.5), np.array(7, ">i4")],
    "empty": lambda: [array(), np.empty((0, 3)), np.empty((2, 0), "M8[s]"), np.empty(3, "V0")],
    "read_only": read_only,
    "broadcast": lambda: np.broadcast_to(array(), (8, 4 * MIB // 8)),
    "big_endian": lambda: array().astype(">f8"),
    "structured": structured,
    "datetime": lambda: array(dtype="i8").view("m8[ns]"),
    "strings": lambda: np.array(["ab", "äöü"] * MIB),
    "matrix": lambda: np.asmatrix(array().reshape(64, -1)),
    "recarray": lambda: array().view([("a", "f4"), ("b", "i4")]).view(np.recarray),
    "subclass": labelled,
    "objects": with_objects,
    "long double": lambda: np.arange(MIB, dtype="g"),
    "none": lambda: [None, array(), None],
}
CASES |= {
    code: lambda code=code: array(dtype=code)
    for code in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16")
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_round_trip_in_another_process(case: Callable[[], object], other_process: OtherProcess) -> None:
    obj = case()
    seen = other_process(take_apart(obj), fingerprint)
    assert seen.result == fingerprint(obj)
    assert seen.attach_growth < MIB


def test_masked_arrays(other_process: OtherProcess) -> None:
    data = array()
    obj = [np.ma.masked_where(data > 0, data), np.ma.array(data), np.ma.array(array(), fill_value=3.0)]

    def look(arrays: list[np.ma.MaskedArray[Any, Any]]) -> list[object]:
        return [(a.mask is np.ma.nomask, fingerprint([a.data, a.filled()]), a.fill_value, type(a)) for a in arrays]

    seen = other_process(take_apart(obj), look)
    assert seen.result == look(obj)
    assert seen.attach_growth < MIB


def test_memory_maps_become_plain_arrays(other_process: OtherProcess) -> None:
    obj = memory_mapped()
    parts = take_apart(obj)
    assert type(round_trip(parts)) is np.ndarray
    seen = other_process(parts, lambda array: fingerprint(np.asarray(array)))
    assert seen.result == fingerprint(np.asarray(obj))


def test_strided_array_that_overlaps_nothing_is_stored_compact() -> None:
    table = array(8).reshape(-1, 8)
    parts = take_apart({"rows": table[::2], "negative": array()[::-2]})
    assert parts.data_bytes == table.nbytes // 2 + 2 * MIB
    rebuilt = round_trip(parts)
    np.testing.assert_array_equal(rebuilt["rows"], table[::2])


def test_strided_array_over_a_kept_one_stays_a_view() -> None:
    base = array()
    parts = take_apart([base, base[::-2]])
    assert parts.data_bytes == base.nbytes
    whole, view = round_trip(parts)
    whole[-1] = 42
    assert view[0] == 42


def test_identity_is_kept() -> None:
    one = array()
    rebuilt = round_trip(take_apart({"a": one, "b": one, "view": one[:]}))
    assert rebuilt["a"] is rebuilt["b"]
    assert rebuilt["view"] is not rebuilt["a"]
    assert np.shares_memory(rebuilt["view"], rebuilt["a"])


def test_writes_in_place_stay_private(other_process: OtherProcess) -> None:
    obj = array()
    parts = take_apart(obj)

    def write(array: np.ndarray[Any, Any]) -> float:
        array[0] = 42
        return float(array[0])

    with segment(parts) as fd:
        mine = put_together(parts.skeleton, private_mapping(fd), 4096)
        before = mine[0]
        theirs = put_together(parts.skeleton, private_mapping(fd), 4096)
        theirs[0] = 42
        assert mine[0] == before
    seen = other_process(parts, write)
    assert seen.result == 42
    assert seen.use_growth < MIB


def test_arrays_keep_the_mapping_alive() -> None:
    parts = take_apart([array(), array()[::2], array().view(Labelled), pickle.PickleBuffer(array())])
    with segment(parts) as fd:
        mapping = private_mapping(fd)
        rebuilt = put_together(parts.skeleton, mapping, 4096)
    for made in rebuilt:
        base: Any = made
        while not hasattr(base, "madvise"):
            base = base.obj if isinstance(base, memoryview) else base.base
        assert base is mapping


def test_numpy_memory_cannot_be_repointed() -> None:
    assert [buffer.repoint for buffer in take_apart(array()).buffers] == [None]


def test_pickle_buffers_are_shared(other_process: OtherProcess) -> None:
    class Opaque:
        """As Arrow's buffers do it."""

        def __init__(self, data: object) -> None:
            self.data = memoryview(data).cast("B")

        def __reduce_ex__(self, _protocol: object) -> Any:
            return Opaque, (pickle.PickleBuffer(self.data),)

    data = array()
    obj = [Opaque(data), Opaque(data.tobytes())]
    parts = take_apart(obj)
    assert parts.shared_bytes == 2 * data.nbytes
    seen = other_process(parts, lambda made: [(bytes(o.data), o.data.readonly) for o in made])
    assert seen.result == [(data.tobytes(), False), (data.tobytes(), True)]
    assert seen.attach_growth < MIB


def test_too_little_to_share_is_refused_silently() -> None:
    with pytest.raises(Unshareable, match="less than") as raised:
        take_apart([np.zeros(100, "u1")] * 20_000 + [np.zeros(MIB - 1, "u1")])
    assert raised.value.silent
    assert take_apart(np.zeros(MIB, "u1")).shared_bytes == MIB


@st.composite
def views(draw: st.DrawFn) -> list[tuple[slice, ...]]:
    def cut(size: int) -> st.SearchStrategy[slice]:
        ends = st.integers(-size, size)
        return st.builds(slice, ends, ends, st.sampled_from([1, 1, 2, 3, -1, -2]))

    return draw(st.lists(st.tuples(cut(12), cut(7)), min_size=1, max_size=6))


@given(views(), st.sampled_from(["u1", "i2", "f8", "c16"]), st.integers(0, 2))
@settings(deadline=None, max_examples=300)
def test_any_views_of_one_array_stay_views(cuts: list[tuple[slice, ...]], dtype: str, bases: int) -> None:
    def build() -> list[np.ndarray[Any, Any]]:
        base = np.arange(84, dtype=dtype).reshape(12, 7)
        return [base[cut] for cut in cuts] + [base] * bases

    mine = build()
    theirs = round_trip(take_apart(mine, least_shared=0))
    for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        np.testing.assert_array_equal(one, other)
        np.add(one, number, out=one, casting="unsafe")
        np.add(other, number, out=other, casting="unsafe")
    for one, other in zip(mine, theirs, strict=True):  # the same writes reached the same views
        np.testing.assert_array_equal(one, other)
