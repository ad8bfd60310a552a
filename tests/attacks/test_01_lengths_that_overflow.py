"""Lengths and offsets at the ends of 64 bits, in a header and a manifest whose checksums fit.

Attacker: a process of the same user, by accident or on purpose (nobody else can write to the file).
Must happen: CorruptError that names the file, before anything is allocated for it; `acquire` loads privately.
"""

import pytest
from forge import U64

#: Each wraps another sum: count x 24, the end of the skeleton, rounding up, the end of a buffer.
HUGE = (U64, U64 - 23, 2**63, 2**63 - 1, 2**64 // 24 + 1, 2**32)


@pytest.mark.parametrize("field", ["buffer_count", "skeleton_bytes", "data_bytes", "total_bytes"])
def test_a_size_of_the_header(scene, field):
    lease = scene.publish()
    segment, victim = scene.segment(), scene.victim()
    for value in HUGE:
        segment.forge(**{field: value})
        scene.refuses(victim, "CorruptError", "offsets|limits")
    segment.forge()
    assert victim("attach", "attacked", "model") == (131072.0, 1)
    lease.release()


def test_an_offset_or_a_length_of_a_buffer(scene):
    lease = scene.publish()
    segment, victim = scene.segment(), scene.victim()
    for value in HUGE:
        for change in ({"offset": value}, {"bytes": value}, {"offset": value, "bytes": U64 - value + 65}):
            segment.forge(rows={0: change})
            scene.refuses(victim, "CorruptError", "buffer outside its place")
    lease.release()
