"""Skeletons with checksums that fit and contents that do not: cyclic, deep, cut, with tensors outside the data area.

Attacker: a process of the same user by accident (who writes pickles on purpose can run code anyway). Must happen: an
object that is cyclic is a fine object; everything else is an error in the victim, which goes on with its own model. No
array ever reaches beyond the segment.
"""

import pickle
import struct

import numpy as np
import pytest


def split(skeleton):
    lengths = struct.unpack_from("<QQQ", skeleton, 8)
    parts, at = [], 32
    for length in lengths:
        parts.append(skeleton[at : at + length])
        at += length
    return parts


def join(parts, length):
    """The rest is behind the STOP of the last pickle."""
    parts = [*parts[:2], parts[2].ljust(length - 32 - len(parts[0]) - len(parts[1]), b"\0")]
    return b"1CSK" + struct.pack("<IQQQ", 1, *map(len, parts)) + b"".join(parts)


@pytest.fixture
def published(scene):
    lease = scene.store("posix").publish("model", [np.ones(1 << 17), "room" * 4000])
    yield scene.segment()
    lease.release()


def test_a_cycle_is_a_fine_object(scene):
    knot = [np.full(1 << 17, 2.0)]
    knot.append(knot)
    lease = scene.store("posix").publish("model", knot)
    victim = scene.victim()
    assert victim("attached_cycle", "attacked", "model") == (True, 2.0 * (1 << 17))
    lease.release()


@pytest.mark.parametrize(
    "hostile",
    [
        b"(" * 3000 + b".",  # marks without an end
        b"]" + b"]a" * 500 + b"h\xff.",  # a memo that nobody made
        b"\x80\x05K\x07Q.",  # a tensor that the table does not have
        b"\x80\x05K\x00Q0K\x00QQ.",  # one as the number of another
        b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b".",  # bytes without end
        b"\x80\x05\x95" + struct.pack("<Q", 2**63) + b"N.",  # a frame without end
    ],
)
def test_a_pickle_that_is_none(scene, published, hostile):
    table, _, _ = split(published.skeleton())
    published.forge(skeleton=join([table, b"", hostile], len(published.skeleton())))
    victim = scene.victim()
    scene.goes_private(victim, "it cannot be rebuilt in this process")


def test_arrays_outside_the_data(scene, published):
    """The first number of the table's row: shapes, offsets and strides as numpy is asked to make them."""
    table, _, _ = split(published.skeleton())
    data_bytes, columns, *rest = pickle.loads(table)
    numbers, shapes, dtypes, offsets, strides, *others = columns["numpy"]
    lies = [
        (numbers, shapes, dtypes, [1 << 40], strides, *others),
        (numbers, shapes, dtypes, [-(1 << 21)], strides, *others),
        (numbers, shapes, dtypes, [64], strides, *others),
        (numbers, [(1 << 17, 2)], dtypes, offsets, strides, *others),
        (numbers, [(2**62,)], dtypes, offsets, strides, *others),
        (numbers, [(2,)], dtypes, offsets, [(1 << 40,)], *others),
        (numbers, [(2,)], dtypes, offsets, [(-(1 << 20),)], *others),
        (numbers, shapes, dtypes, offsets, strides, [], [(9, 1 << 40, 8, True)]),
        (numbers, shapes, dtypes, offsets, strides, [], [(9, -(1 << 21), 8, True)]),
        (numbers, shapes, [np.dtype(object)], offsets, strides, *others),
    ]
    victim = scene.victim()
    for tables in [(1 << 62, columns), *((data_bytes, {"numpy": lie}) for lie in lies), (data_bytes, {"os": lies[0]})]:
        forged = pickle.dumps((*tables, *rest), protocol=5)
        published.forge(skeleton=join([forged, b"", b"\x80\x05K\x00Q."], len(published.skeleton())))
        scene.goes_private(victim, "it cannot be rebuilt in this process")
