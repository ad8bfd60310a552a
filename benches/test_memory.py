"""Row 6: what N processes take together that all have the model and have predicted.

Counted is Pss, in which a page that several have counts once; less what the same processes had before. A model that is
inherited counts with the parent that loaded it.
"""

import functools
import time

import pytest
from children import Child, children, together
from company import SPARE, Cannot
from machine import available, rollup, status
from rounds import ROUNDS
from shapes import BERT, largest
from users import USERS, file, load, namespace_in

SHAPE = largest(BERT)
COUNTS = (1, 2, 4, 8, 16)
FORKED = "fork after load"
ARMS = (*USERS, FORKED)


def using(name, shape, folder):
    """Plays in a child."""
    page_tables = status("VmPTE")
    yield None
    model = USERS[name](folder)
    output = shape.predict(model)
    yield status("VmPTE") - page_tables, output.numpy()


def loading(shape, folder):
    yield None
    inheriting.model = load(folder)
    shape.predict(inheriting.model)
    yield None


def inheriting(shape):
    yield None
    page_tables = status("VmPTE")
    output = shape.predict(inheriting.model)
    yield status("VmPTE") - page_tables, output.numpy()


def idle():
    yield None


def pss(those):
    return sum(rollup("Pss", child.pid) for child in those)


def of_users(name, count, folder):
    """Bytes, seconds, and what each says."""
    with namespace_in(folder) as mine, children([(using, name, SHAPE, mine)] * count) as those:
        together(those)
        before, start = pss(those), time.perf_counter()
        # One after another: how long a crowd takes is another row.
        said = [child() for child in those]
        return pss(those) - before, time.perf_counter() - start, said


def of_family(count, folder):
    with children([(idle,)] * (count + 1)) as those:
        together(those)
        before = pss(those)
    with Child(loading, SHAPE, folder) as parent:
        parent()
        start = time.perf_counter()
        parent()
        those = [Child(inheriting, SHAPE, parent=parent) for _ in range(count)]
        try:
            together(those)
            said = [child() for child in those]
            return pss([parent, *those]) - before, time.perf_counter() - start, said
        finally:
            for child in those:
                child.end()


@functools.cache
def measured():
    """By arm and number of processes: (bytes, seconds, page tables), a round each."""
    found = {(arm, count): [] for arm in ARMS for count in COUNTS}
    expected = None
    with file(SHAPE) as folder:
        for _ in range(min(ROUNDS, 2)):
            for count in COUNTS:
                for arm in ARMS:
                    needed, free = SHAPE.size * (count if arm == "Beam Shared" else 2), available() - SPARE
                    if needed > free:
                        found[arm, count] = Cannot(f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
                        continue
                    total, seconds, said = of_family(count, folder) if arm == FORKED else of_users(arm, count, folder)
                    expected = said[0][1] if expected is None else expected
                    assert all((output == expected).all() for _, output in said), arm
                    found[arm, count].append((total, seconds, max(tables for tables, _ in said)))
    return found


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("arm", ARMS)
def test_memory(arm, count, play):
    group = f"memory {SHAPE.name}"
    found = measured()[arm, count]
    if isinstance(found, Cannot):
        play(group, f"{arm}, {count}", found)
    total, seconds, tables = zip(*found, strict=True)
    play(group, f"{arm}, {count}", list(seconds), size=SHAPE.size, memory=list(total), page_tables=list(tables))
