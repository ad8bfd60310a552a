"""Beam's torch handlers at one model of memory instead of two.

`_load_model` of `apache_beam.ml.inference.pytorch_inference` makes the module, reads the state dict beside it, and copies one
into the other. Here the file is mapped (`torch.load(mmap=True)`), its tensors take the place of the module's own
(`load_state_dict(assign=True)`), and those are not filled with random numbers first. Whatever would make the outcome differ
from Beam's is found out before anybody has the model, which Beam then loads in its own way.
"""

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

from apache_beam.io.filesystems import FileSystems
from apache_beam.io.localfilesystem import LocalFileSystem
from apache_beam.ml.inference import base

from onecopy.beam import families

logger = logging.getLogger(__name__)

_BEAMS = "apache_beam.ml.inference."
#: Models whose weights are the pages of a file.
_mapped: weakref.WeakSet[Any] = weakref.WeakSet()


def constructor(handler: base.ModelHandler) -> Callable[[], Any]:
    """`handler.load_model`, or what does the same at half the memory."""
    chain = families.chain(handler)
    where = [type(one).load_model.__module__ for one in chain]
    if where[-1] != _BEAMS + "pytorch_inference" or not all(module.startswith(_BEAMS) for module in where):
        return handler.load_model  # type: ignore[no-any-return]
    if not _is_local(chain[-1]):
        return handler.load_model  # type: ignore[no-any-return]

    def load_model() -> Any:
        from onecopy.beam import torch_mapped

        try:
            model = torch_mapped.load(chain[-1])
        except Exception as why:  # whatever it is, Beam's own way works, or says it in Beam's words
            logger.info("%s is read into memory: %s", chain[-1]._state_dict_path, why)  # noqa: SLF001
            return handler.load_model()
        _mapped.add(model)
        return model

    return load_model


def unmapped(model: Any) -> Any:
    """`model` with its weights in memory of its own: who keeps it for long shall not depend on the file."""
    if any(model is one for one in _mapped):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        _mapped.discard(model)
    return model


def _is_local(inner: Any) -> bool:
    path = getattr(inner, "_state_dict_path", None)
    if "mmap" in (getattr(inner, "_load_model_args", None) or {}):  # who says it has made up his mind
        return False
    if not isinstance(path, str) or not os.path.isfile(path):  # noqa: PTH113
        return False
    return isinstance(FileSystems.get_filesystem(path), LocalFileSystem)
