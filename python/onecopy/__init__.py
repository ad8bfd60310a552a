"""One copy of a model's weights per machine, shared by every process that runs it.

    holder = onecopy.Holder(load_t5, "t5-large")
    model = holder.acquire()    # one process on the machine runs load_t5(); the others map its weights

`onecopy.beam.SharedMemoryModelHandler` does the same for Apache Beam's RunInference.
"""

from contextlib import suppress as _suppress
from importlib import import_module as _import_module

from onecopy import _interpreter
from onecopy.errors import OneCopyError
from onecopy.holder import Holder
from onecopy.info import ModelInfo, StoredModel
from onecopy.store import Lease, Store

__all__ = ["Holder", "Lease", "ModelInfo", "OneCopyError", "Store", "StoredModel"]
__version__ = "0.1.0"

_interpreter.refuse_subinterpreters()


def __getattr__(name: str) -> object:
    # Reached by the first `from onecopy import _core`, to which Python would only say that it cannot.
    if name == "_core":
        try:
            return _import_module("onecopy._core")
        except ModuleNotFoundError as error:
            raise _interpreter.why_no_native_part() from error
    message = f"module 'onecopy' has no attribute {name!r}"
    raise AttributeError(message)


# What the first acquire needs is imported here and not there. A handler for Beam is also made and pickled where the
# extension does not exist.
with _suppress(ImportError):
    from onecopy import _acquire as _acquire
