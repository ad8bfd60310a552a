"""Row 11: how many inferences a second all processes do together."""

import functools
import time

import pytest
from children import children, together
from company import SPARE, Cannot
from machine import available
from peers.ours import wait_for_collapse
from rounds import ROUNDS
from shapes import BERT, largest
from users import BEAM, USERS, file, namespace_in

SHAPE = largest(BERT)
COUNTS = (1, 2, 4)
FOR = 2.0


def working(name, shape, folder):
    """Plays in a child."""
    model = USERS[name](folder)
    shape.predict(model)
    yield None
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < FOR:
        shape.predict(model)
        done += 1
    yield done / (time.perf_counter() - start)


@functools.cache
def measured():
    found = {(arm, count): [] for arm in BEAM for count in COUNTS}
    with file(SHAPE) as folder:
        for number in range(max(2, ROUNDS // 2)):
            for count in COUNTS:
                for at in range(len(BEAM)):
                    arm = BEAM[(at + number) % len(BEAM)]
                    if (count + 1) * SHAPE.size > available() - SPARE:
                        found[arm, count] = Cannot(f"{count} x {SHAPE.size} bytes are not free")
                        continue
                    with namespace_in(folder) as mine, children([(working, arm, SHAPE, mine)] * count) as those:
                        together(those)
                        if arm == "onecopy":
                            wait_for_collapse(SHAPE.size)
                        found[arm, count].append(sum(together(those)))
    return found


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("arm", BEAM)
def test_throughput(arm, count, play):
    found = measured()
    case = f"{arm}, {count}"
    if isinstance(found[arm, count], Cannot):
        play(f"throughput {SHAPE.name}", case, found[arm, count])
    seconds = [1 / rate for rate in found[arm, count]]
    play(f"throughput {SHAPE.name}", case, seconds, ours=[1 / rate for rate in found["onecopy", count]])
