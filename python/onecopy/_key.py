"""What must be equal for two processes to share bytes, and who says how they are made."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib import metadata
from types import CodeType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onecopy.process import ModelKey

#: Of the skeleton's format.
FORMAT = 1

#: Bytes that the table has for a constructor's name: a longer one comes back cut, and must not look like another one.
MAX_NAME = 143


@functools.lru_cache(maxsize=1)
def compatibility() -> str:
    """Versions that make bytes incompatible, from their metadata: nothing is imported for it."""
    words = [f"format {FORMAT}", f"python {'.'.join(platform.python_version_tuple()[:2])}"]
    # TensorFlow without CUDA comes under a name of its own.
    for package, *others in (("numpy",), ("torch",), ("tensorflow", "tensorflow-cpu"), ("keras",)):
        version = next(filter(None, map(_version, (package, *others))), None)
        words.append(f"{package} {version}" if version else f"no {package}")
    return ", ".join(words)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def of(key: ModelKey) -> tuple[str, str, str]:
    """Tag, version and compatibility, as the core has them."""
    return key.tag, key.version or "", compatibility()


def describe(constructor: Any) -> tuple[str, int]:
    """Qualified name and code hash of a constructor; the hash is the same in every process that runs the same code."""
    function = _function(constructor)
    named = function if hasattr(function, "__qualname__") else type(function)
    module = getattr(named, "__module__", None) or "?"
    if module == "__mp_main__":  # the same script, as a spawned child of multiprocessing has it
        module = "__main__"
    name = f"{module}.{named.__qualname__}"
    code = getattr(function, "__code__", None)
    digest = hashlib.blake2b(name.encode() if code is None else _code_bytes(code), digest_size=8)
    name = name.encode(errors="replace")[:MAX_NAME].decode(errors="ignore")
    return name, int.from_bytes(digest.digest(), "little")


def code_of(constructor: Any) -> object:
    """What two constructors that do the same have in common, without describing them: their code, or their class."""
    function = _function(constructor)
    code = getattr(function, "__code__", None)
    if code is not None:
        return code
    return function if hasattr(function, "__qualname__") else type(function)


def _function(constructor: Any) -> Any:
    while isinstance(constructor, functools.partial):
        constructor = constructor.func
    return getattr(constructor, "__func__", constructor)


def _code_bytes(code: CodeType) -> bytes:
    # Neither file nor line: the same code may lie elsewhere. Constants by kind: the order of a frozenset is random.
    parts = [code.co_code, repr(code.co_names).encode()]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            parts.append(_code_bytes(constant))
        elif isinstance(constant, frozenset):
            parts.append(repr(sorted(map(repr, constant))).encode())
        else:
            parts.append(repr(constant).encode())
    return b"\0".join(parts)


# Here rather than in the first call, where somebody waits for the model: to find the packages takes milliseconds.
compatibility()
