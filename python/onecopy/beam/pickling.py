"""The pickler that shipped the handler.

A class of `__main__` arrives on a worker by value, and cloudpickle finds it again by the number that it gave the class
when it first pickled it. Beam brings a cloudpickle of its own: with any other one the attacher's model would be of a
class that only looks like the handler's `model_class`, and `isinstance` would be False.
"""

import functools
import threading
from collections import ChainMap
from typing import Any

_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())


def pickler_class() -> type:
    """A class like `pickle.Pickler`: Beam's cloudpickle, or dill where the pipeline was shipped with dill."""
    from apache_beam.internal import pickler

    shipped_by: Any = pickler.desired_pickle_lib
    if shipped_by.__name__.endswith("dill_pickler"):
        import dill

        return dill.Pickler  # type: ignore[no-any-return]
    return _with_locks(shipped_by.cloudpickle.CloudPickler)


@functools.cache
def _with_locks(parent: Any) -> type:
    # As with Beam's own `pickler.dumps`, a lock becomes a new lock.
    locks = {_LOCK: lambda _: (threading.Lock, ()), _RLOCK: lambda _: (threading.RLock, ())}
    return type("BeamPickler", (parent,), {"dispatch_table": ChainMap(locks, parent.dispatch_table)})
