"""Buffers, skeleton or data area behind the end of the object; an object that is not as long as it says.

Attacker: a process of the same user, or a disk that is full. Must happen: CorruptError where the object contradicts itself.
Where it is not as long as the registry says, it is not the registered one: its name is dropped, and the next `acquire` loads.
"""

import os

import pytest
from processes import Failed


def test_buffers_and_offsets(scene):
    lease = scene.publish()
    segment, victim = scene.segment(), scene.victim()
    header = segment.header()
    end = header["total_bytes"]
    for rows in ({0: {"offset": end}}, {0: {"bytes": end}}, {0: {"offset": end - 64, "bytes": 4096}}):
        segment.forge(rows=rows)
        scene.refuses(victim, "CorruptError", "buffer outside its place")
    for fields in (
        {"skeleton_offset": end},
        {"manifest_offset": end},
        {"data_offset": end, "data_bytes": 0},
        {"data_bytes": header["data_bytes"] + 4096},
        {"total_bytes": end + 4096, "data_bytes": header["data_bytes"] + 4096},
    ):
        segment.forge(**fields)
        scene.refuses(victim, "CorruptError", "offsets")
    lease.release()


@pytest.mark.parametrize("length", [0, 95, 4096, 1 << 20, 1 << 40])
def test_another_length_is_another_object(scene, length):
    lease = scene.publish()
    segment, victim = scene.segment(), scene.victim()
    os.truncate(segment.path, length)
    with pytest.raises(Failed, match="ModelNotFoundError"):
        victim("attach", "attacked", "model")
    value, role, *_ = victim("acquire", "attacked", "model", str(scene.log), value=3.0, mib=1)
    assert (value, role) == (3.0 * 131072, "publisher")
    victim("release", "model")
    lease.release()
