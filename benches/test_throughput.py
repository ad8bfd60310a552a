"""Row 11: how many inferences a second all processes do together."""

import functools
import time

import pytest
from children import children, together
from rounds import ROUNDS, in_common, shuffled
from shapes import BERT, largest
from users import USERS, file, lacking_for, namespace_in

SHAPE = largest(BERT)
COUNTS = (1, 2, 4)
FOR = 2.0
#: Between the first inference and the clock, for everybody: meanwhile onecopy's publisher collapses.
PAUSE = 2.0


def working(name, shape, folder):
    """Plays in a child."""
    model = USERS[name](folder)
    output = shape.predict(model)
    yield output.numpy()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < FOR:
        shape.predict(model)
        done += 1
    yield done / (time.perf_counter() - start)


@functools.cache
def measured():
    """By arm and number of processes: inferences a second, by round; and why there are none."""
    found = {(arm, count): {} for arm in USERS for count in COUNTS}
    cannot = {}
    expected = None
    with file(SHAPE) as folder:
        for number in range(max(2, ROUNDS // 2)):
            for arm, count in shuffled(found, number):
                if reason := lacking_for(arm, count, SHAPE.size):
                    cannot[arm, count] = reason
                    continue
                with namespace_in(folder) as mine, children([(working, arm, SHAPE, mine)] * count) as those:
                    outputs = together(those)
                    time.sleep(PAUSE)
                    found[arm, count][number] = sum(together(those))
                expected = outputs[0] if expected is None else expected
                assert all((output == expected).all() for output in outputs), arm
    return found, cannot


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("arm", USERS)
def test_throughput(arm, count, play):
    found, cannot = measured()
    rates, ours = in_common(found[arm, count], found["onecopy", count])
    seconds = [1 / rate for rate in rates] or cannot[arm, count]
    play(f"throughput {SHAPE.name}", f"{arm}, {count}", seconds, ours=[1 / rate for rate in ours])
