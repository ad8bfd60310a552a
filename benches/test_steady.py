"""Row 7: inference on attached weights beside private ones, in one process, call by call in turn.

Each process is one observation: where its memory lies is a matter of chance that no number of calls evens out.
"""

import functools
import statistics
import time

import pytest
from children import Child
from company import room
from interval import interval
from peers import OURS
from rounds import ROUNDS
from shapes import BERT, MINILM, largest

PROCESSES = max(4, ROUNDS * 2)
#: Seconds in a process.
FOR = 4.0
SHAPES = list(dict.fromkeys([largest(BERT).name, MINILM.name]))


def both(shape, folder):
    """Plays in a child."""
    OURS.ready(None)
    yield None
    models = (OURS.attach(shape, folder, None), shape.model())
    assert all((one == other).all() for one, other in zip(*(m.state_dict().values() for m in models), strict=True))
    outputs = [shape.predict(model) for model in models]
    assert (outputs[0] == outputs[1]).all()
    spent = ([], [])
    end = time.perf_counter() + FOR
    number = 0
    while time.perf_counter() < end:
        number += 1
        # A B B A: whoever comes second finds the processor's cache as the other left it.
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            shape.predict(models[which])
            spent[which].append(time.perf_counter() - start)
    yield spent


@functools.cache
def measured(name):
    from company import putting
    from shapes import find

    shape = find(name)
    found = []
    with room() as folder, Child(putting, OURS, shape, folder) as putter:
        putter()
        for _ in range(PROCESSES):
            with Child(both, shape, folder) as child:
                child()
                found.append(child())
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("which", [0, 1], ids=["attached", "private"])
def test_steady(name, which, play):
    found = measured(name)
    medians = [[statistics.median(calls) for calls in process] for process in found]
    facts = {}
    if which == 0:
        # Of pairs, so what slows both does not count.
        ratios = [statistics.median(a / b for a, b in zip(*process, strict=True)) for process in found]
        facts = {
            "interval": interval(ratios),
            "pairs": sum(len(process[0]) for process in found),
            "processes": len(found),
        }
    play(
        f"steady {name}",
        "attached" if which == 0 else "private",
        [one[which] for one in medians],
        ours=[one[0] for one in medians],
        **facts,
    )
