"""Buffers that share bytes, come in another order, or lie over header, manifest and skeleton.

Attacker: a process of the same user. Must happen: CorruptError; two arrays never share memory that way.
"""

import numpy as np
import pytest


@pytest.fixture
def two(scene):
    arrays = [np.full(131072, value) for value in (1.0, 2.0)]
    lease = scene.store("posix").publish("model", arrays)
    assert scene.segment().header()["buffer_count"] == 2
    yield scene.segment()
    del arrays
    lease.release()


def test_buffers_over_each_other(scene, two):
    data, size, victim = two.header()["data_offset"], 1 << 20, scene.victim()
    for rows in (
        {1: {"offset": data}},  # the same one twice
        {1: {"offset": data + size - 64}},  # into the end of the other
        {0: {"offset": data + size}, 1: {"offset": data}},  # the other way round
        {0: {"bytes": 2 * size}},  # one that holds the other
    ):
        two.forge(rows=rows)
        scene.refuses(victim, "CorruptError", "buffer outside its place")


def test_a_buffer_over_what_is_not_data(scene, two):
    victim = scene.victim()
    header = two.header()
    for place in (0, header["manifest_offset"], header["skeleton_offset"] // 64 * 64, header["data_offset"] - 64):
        two.forge(rows={0: {"offset": place}})
        scene.refuses(victim, "CorruptError", "buffer outside its place")
