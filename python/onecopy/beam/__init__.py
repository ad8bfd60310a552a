"""One copy of a RunInference model per machine.

    examples | RunInference(PytorchModelHandlerTensor(...))                              # before
    examples | RunInference(SharedMemoryModelHandler(PytorchModelHandlerTensor(...)))    # after

The pipeline is built where no native extension need exist: it is imported by the workers, when they load the model.
"""

from onecopy.beam.handler import SharedMemoryModelHandler
from onecopy.beam.switch import OneCopyOptions

__all__ = ["OneCopyOptions", "SharedMemoryModelHandler"]
