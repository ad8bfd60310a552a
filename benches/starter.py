"""One of the processes that start together (test_together.py): a fresh interpreter, which says how long the model took it,
and a digest of what that predicted.

    python benches/starter.py ARM SHAPE FOLDER

ARM "nothing" imports the same, and no model.
"""

import environment  # noqa: F401 isort: skip (before anything that reads it)

import hashlib
import sys
import time
from pathlib import Path


def main() -> None:
    arm, name, folder = sys.argv[1:]
    import torch
    from shapes import find
    from users import USERS, load

    torch.set_num_threads(1)
    shape = find(name)
    start = time.perf_counter()
    output = None
    if arm == "one load":
        output = shape.predict(load(Path(folder)))
    elif arm != "nothing":
        kept = USERS[arm](Path(folder))
        output = shape.predict(kept)
    spent = time.perf_counter() - start
    print(spent, "" if output is None else hashlib.sha256(output.numpy()).hexdigest(), flush=True)
    # Until all are there.
    sys.stdin.read()


if __name__ == "__main__":
    main()
