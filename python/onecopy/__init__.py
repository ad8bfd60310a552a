"""One copy of a model's weights per machine, shared by every process that runs it.

    holder = onecopy.Holder(load_t5, "t5-large")
    model = holder.acquire()    # one process on the machine runs load_t5(); the others map its weights

`onecopy.beam.SharedMemoryModelHandler` does the same for Apache Beam's RunInference.
"""

from contextlib import suppress as _suppress

from onecopy.errors import OneCopyError
from onecopy.holder import Holder
from onecopy.info import ModelInfo, StoredModel
from onecopy.store import Lease, Store

__all__ = ["Holder", "Lease", "ModelInfo", "OneCopyError", "Store", "StoredModel"]
__version__ = "0.1.0"

# What the first acquire needs is imported here and not there. A handler for Beam is also made and pickled where the
# extension does not exist.
with _suppress(ImportError):
    from onecopy import _acquire as _acquire
