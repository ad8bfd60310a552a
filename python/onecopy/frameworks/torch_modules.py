"""How torch's modules are pickled where torch's own way is slow or refuses."""

# ruff: noqa: SLF001 (what torch's own reducers use has no public name)
from __future__ import annotations

import copyreg
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from onecopy.frameworks import Reducer

#: ``SET_STATE(module, state)``, in C: sets the module's `__dict__`. The stock `Module.__setstate__` costs a Python
#: frame and eleven look-ups per module, all for checkpoints of older versions of torch.
SET_STATE = Module.__dict__["__dict__"].__set__

_STOCK = {
    "__setstate__": Module.__setstate__,
    "__getstate__": Module.__getstate__,
    "__reduce__": object.__reduce__,
    "__reduce_ex__": object.__reduce_ex__,
    "__new__": object.__new__,
}


def refusal(cls: type) -> str | None:
    """Why instances of a class cannot be shared, and what to share instead."""
    if issubclass(cls, (torch.jit.ScriptModule, torch.jit.ScriptFunction, torch._C.ScriptModule)):
        return (
            "TorchScript keeps its weights out of Python's reach: share the eager module, and script or trace it after"
        )
    quantized_convolution = any(base.__module__ == "torch.ao.nn.quantized.modules.conv" for base in cls.__mro__)
    if issubclass(cls, torch.ScriptObject) or quantized_convolution:
        return (
            "packed parameters (torch.ao.quantization) are packed anew by whoever unpickles them: "
            "share weights quantized by torchao, or the float model"
        )
    if cls.__module__ == "torch.export.exported_program" and cls.__name__ == "ExportedProgram":
        return "torch.export's ExportedProgram cannot be pickled: share the eager module, and export it after"
    return None


def reducer(cls: type[Module]) -> Reducer | None:
    if "__getstate__" in vars(cls) and cls.__name__.startswith("Parametrized"):
        return _reduce_parametrized
    if all(getattr(cls, name, None) is stock for name, stock in _STOCK.items()):
        return _reduce_module
    return None


def _reduce_module(module: Module) -> Any:
    return copyreg.__newobj__, (type(module),), module.__getstate__(), None, None, SET_STATE  # type: ignore[attr-defined]


def _reduce_parametrized(module: Module) -> Any:
    # torch refuses to pickle these for the sake of a class that it makes at run time, and that can be made again.
    if not parametrize.is_parametrized(module):
        return NotImplemented
    base: Any = type(module).__bases__[0]
    return _new, (base,), base.__getstate__(module), None, None, _set_parametrized


def _new(cls: type[Module]) -> Module:  # __newobj__ would have to name the class that the module now has
    return cls.__new__(cls)


def _set_parametrized(module: Any, state: dict[str, object]) -> None:
    module.__setstate__(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)
