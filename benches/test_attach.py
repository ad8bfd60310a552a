"""Rows 1, 8 and 10: attaching in a fresh process, the first inference beside a steady one, and letting go."""

import pytest
from attaching import Measured, measure
from company import Cannot
from peers import ALL
from shapes import BERT, MOST, SIZES, T5, T5_SMALL, find, largest

NAMES = [largest(T5, T5_SMALL).name, BERT.name, *(f"{mib} MiB" for mib in SIZES)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("peer", [peer.name for peer in ALL])
def test_attach(name, peer, play):
    shape = find(name)
    found = Cannot("larger than BENCH_MIB") if shape.size > MOST else measure(shape)[peer]
    if isinstance(found, Cannot):
        play(f"attach {name}", peer, found)
    ours = found.ours or found
    play(
        f"attach {name}",
        peer,
        until_steady(found),
        ours=until_steady(ours),
        size=shape.size,
        parts={
            of: {part: getattr(these, part) for part in ("attach", "first", "steady", "pages", "release")}
            for of, these in (("peer", found), ("ours", ours))
        },
        anonymous=found.anonymous,
        page_tables=found.page_tables,
        huge=found.huge,
        company=found.company,
        exact=found.exact,
        limit=found.limit,
    )


def until_steady(found: Measured) -> list[float]:
    """Attaching, and what the first inference took longer than a steady one; by chance, less than nothing."""
    each = zip(found.attach, found.first, found.steady, strict=True)
    return [attach + first - steady for attach, first, steady in each]
