"""Buffers that begin anywhere: TensorFlow aborts and JAX copies where that is not a multiple of 64.

Attacker: a process of the same user, or a writer of another build. Must happen: CorruptError.
"""


def test_a_buffer_that_is_not_aligned(scene):
    lease = scene.publish()
    segment, victim = scene.segment(), scene.victim()
    data = segment.header()["data_offset"]
    for shift in (1, 8, 32, 63):
        segment.forge(rows={0: {"offset": data + shift, "bytes": 4096}})
        scene.refuses(victim, "CorruptError", "buffer outside its place.*aligned to 64")
    segment.forge(rows={0: {"offset": data + 64, "bytes": (1 << 20) - 64}})
    # A lawful one is taken, so it was the alignment.
    assert victim("attach", "attacked", "model") == (131072.0, 1)
    lease.release()
