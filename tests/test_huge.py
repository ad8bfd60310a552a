"""Which pages a segment is made of."""

from __future__ import annotations

import pytest

import onecopy
from onecopy import _core
from onecopy.errors import BadNameError

MIB = 1 << 20
needs_them = pytest.mark.skipif(_core.no_huge_pages() is not None, reason=f"the kernel: {_core.no_huge_pages()}")


@needs_them
@pytest.mark.parametrize(("huge", "expected"), [("auto", 4 * MIB), ("always", 6 * MIB), ("never", 0)])
def test_a_segment_is_huge_when_it_is_ready(namespace, hatch, huge, expected):
    publisher, attacher = hatch(), hatch()
    publisher("publish", namespace, "t", mib=5, huge=huge)
    attacher("attach", namespace, "t")
    for process in publisher, attacher:
        assert process("huge_bytes", "t") == expected
        process("total", "t")
        assert process("memory")["ShmemPmdMapped"] == expected
        assert process("memory")["Anonymous"] == 0


@needs_them
def test_a_write_in_place_copies_one_small_page(namespace, hatch):
    publisher, attacher = hatch(), hatch()
    total, _ = publisher("publish", namespace, "t", mib=8)
    attacher("attach", namespace, "t")
    attacher("write_in_place", "t")  # 8,000 bytes at the beginning of the data
    assert 0 < attacher("memory")["Anonymous"] <= 16384
    assert publisher("total", "t") == total


def test_where_the_kernel_gives_none_the_model_is_shared_all_the_same(namespace, hatch):
    publisher, attacher = hatch(), hatch()
    publisher("no_huge_pages")
    expected = publisher("publish", namespace, "t", mib=8)
    assert attacher("attach", namespace, "t") == expected
    assert publisher("huge_bytes", "t") == attacher("huge_bytes", "t") == 0


def test_other_words_are_refused():
    with pytest.raises(BadNameError, match="huge 'yes': one of auto, always, never"):
        onecopy.Store(huge="yes")
