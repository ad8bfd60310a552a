"""Row 6: what N processes take together that all have the model and have predicted.

Each has read every page of the weights before. Counted is Pss, in which a page that several have counts once, one of a file
in a tmpfs too where it is mapped; less what the same processes had before. A model that is inherited counts with the parent
that loaded it. Who loads once and for all needs the file no more: it does not count with those.
"""

import functools
import statistics
import time

import pytest
import torch
from children import Child, children, together
from machine import rollup, status
from peers.ours import wait_for_collapse
from rounds import ROUNDS, shuffled
from shapes import BERT, every_page, largest, read
from users import USERS, file, lacking_for, load, namespace_in

SHAPE = largest(BERT)
COUNTS = (1, 2, 4, 8, 16)
FORKED = "fork after load"
ARMS = (*USERS, FORKED)


def using(name, shape, folder):
    """Plays in a child."""
    yield None
    yield from predicting(shape, lambda: USERS[name](folder))


def loading(shape, folder):
    yield None
    inheriting.model = load(folder)
    shape.predict(inheriting.model)
    yield None


def inheriting(shape):
    yield None
    yield from predicting(shape, lambda: inheriting.model)


def predicting(shape, get):
    """Its first output, then the bytes of its page tables."""
    page_tables = status("VmPTE")
    model = get()
    yield shape.predict(model).numpy()
    # Collapsing has taken the pages from the page tables, and a proxy has none.
    if isinstance(model, torch.nn.Module):
        read(every_page(model))
    yield status("VmPTE") - page_tables


def idle():
    yield None


def pss(those):
    return sum(rollup("Pss", child.pid) for child in those)


def of_users(name, count, folder):
    """What each says, and bytes in all."""
    with namespace_in(folder) as mine, children([(using, name, SHAPE, mine)] * count) as those:
        together(those)
        before = pss(those)
        # One after another: how long a crowd takes is another row.
        outputs = [child() for child in those]
        if name == "onecopy":
            wait_for_collapse(SHAPE.size, those[0].pid)
        return outputs, together(those), pss(those) - before


def of_family(count, folder):
    with children([(idle,)] * (count + 1)) as those:
        together(those)
        before = pss(those)
    with Child(loading, SHAPE, folder) as parent:
        parent()
        parent()
        those = [Child(inheriting, SHAPE, parent=parent) for _ in range(count)]
        try:
            together(those)
            outputs = [child() for child in those]
            return outputs, together(those), pss([parent, *those]) - before
        finally:
            for child in those:
                child.end()


@functools.cache
def measured():
    """By arm and number of processes: a (seconds, bytes, page tables) each round; and why there are none."""
    found = {(arm, count): [] for arm in ARMS for count in COUNTS}
    cannot = {}
    expected = None
    with file(SHAPE) as folder:
        for number in range(min(ROUNDS, 2)):
            for arm, count in shuffled(found, number):
                if reason := lacking_for(arm, count, SHAPE.size):
                    cannot[arm, count] = reason
                    continue
                start = time.perf_counter()
                outputs, tables, total = of_family(count, folder) if arm == FORKED else of_users(arm, count, folder)
                expected = outputs[0] if expected is None else expected
                assert all((output == expected).all() for output in outputs), arm
                # The first has loaded it, where there is another.
                of_attacher = statistics.median((arm != FORKED and tables[1:]) or tables)
                found[arm, count].append((time.perf_counter() - start, total, of_attacher))
    return found, cannot


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("arm", ARMS)
def test_memory(arm, count, play):
    found, cannot = measured()
    group, case = f"memory {SHAPE.name}", f"{arm}, {count}"
    if not found[arm, count]:
        play(group, case, cannot[arm, count])
    seconds, total, tables = zip(*found[arm, count], strict=True)
    play(group, case, list(seconds), size=SHAPE.size, memory=list(total), page_tables=list(tables))
