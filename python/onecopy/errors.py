"""Every error of onecopy: one tree, each also a fitting built-in, each picklable.

The binding raises them from one table (`rust/python/src/errors.rs`), but for the one which says that it is missing.
"""


class OneCopyError(Exception):
    """Base of everything that onecopy raises by itself. A constructor's own exception is never wrapped."""


class BadNameError(OneCopyError, ValueError):
    """A tag, namespace or directory that cannot be used as given."""


class ModelNotFoundError(OneCopyError, LookupError):
    """Nothing is published under this tag."""


class ModelExistsError(OneCopyError, FileExistsError):
    """`publish` over an existing tag without `replace=True`."""


class ModelTimeoutError(OneCopyError, TimeoutError):
    """The caller's `timeout` is up while another process loads."""


class CorruptError(OneCopyError, ValueError):
    """Registry or segment bytes that are not what they claim to be. Nothing was unpickled."""


class UntrustedError(OneCopyError, PermissionError):
    """Owner, mode or type of a file forbids its use."""


class NoRoomError(OneCopyError, MemoryError):
    """The model does not fit where it was to go; the message gives need and free in bytes."""


class StoreFullError(OneCopyError, MemoryError):
    """A table of the registry is full."""


class StoreStuckError(OneCopyError, TimeoutError):
    """The registry's lock did not move: its holder is stopped."""


class LoaderKilledError(OneCopyError, MemoryError):
    """Two loaders of this model in a row were killed for lack of memory."""


class UnshareableError(OneCopyError, TypeError):
    """The object cannot be shared; the message says why and what would help."""


class RefusedError(OneCopyError, PermissionError):
    """A living process has the model, and this one may not open it."""


class RecursionInConstructorError(OneCopyError, RuntimeError):
    """A constructor asked for its own tag."""


class NativePartError(OneCopyError, ImportError):
    """The extension module does not load in this Python; the message says why and what would help."""


class SystemCallError(OneCopyError, OSError):
    """The kernel refused a call."""

    def __str__(self) -> str:
        # Rust's words for the errno end with its number, and OSError's begin with it: neither helps a reader.
        return (self.strerror or super().__str__()).replace(f" (os error {self.errno})", "")


__all__ = [name for name, thing in list(globals().items()) if isinstance(thing, type)]
