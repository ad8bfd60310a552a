"""`SharedMemoryModelHandler`: any ModelHandler of Beam, with one copy of its model per machine."""

import functools
import inspect
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from apache_beam.ml.inference.base import ModelHandler

from onecopy import process
from onecopy.beam import families, loaded, metrics, sharing, state, switch, threads
from onecopy.errors import UnshareableError
from onecopy.store import Store

ExampleT = TypeVar("ExampleT")
PredictionT = TypeVar("PredictionT")
ModelT = TypeVar("ModelT")

logger = logging.getLogger(__name__)
_setup_lock = threading.RLock()
_set_up: set[tuple[int, str]] = set()


class SharedMemoryModelHandler(ModelHandler[ExampleT, PredictionT, ModelT]):
    """Wraps `base` so that all processes of a machine map one copy of its weights, and each runs inference by itself.

    *Active*, it answers False to `share_model_across_processes`, because the model that it returns is local to the
    process. *Transparent* (`base` keeps its weights on a GPU, in a remote service or in memory that no adapter
    reaches, or ONECOPY=off), every method gives `base`'s own answer.

    There are never more copies than `base` alone would make. A model that cannot be shared is private to each process
    as in Beam, unless `base` asked for one copy (`large_model=True`): then Beam's own MultiProcessShared holds it.

    Args:
        base: the handler whose model is shared.
        model_identifier: the name under which it is shared, also between steps and jobs: the same for the same
            model. Default: a name of this handler's own, made now.
        on_unshareable: "warn" goes down the ladder with one warning, "raise" raises UnshareableError.
        timeout: seconds to wait for another process that loads the model before going down the ladder. Not used
            with `large_model=True`: not to wait would make a second copy.
        linger: seconds that a process keeps its claim on the model after the last use; None until it exits.
        torch_num_threads: torch's threads in each process; "auto" is the CPUs over the SDK worker processes; None
            leaves them alone.
        process_setup_fn: called once in each process before the model is there, for what `load_model` of `base`
            does to the process rather than to the model (op libraries, `sys.path`): an attacher does not call it.
        namespace, backend, huge: as in `onecopy.Store`.
        map_weights: let Beam's own torch handlers load a local state dict from its mapped file, in the memory of one
            model instead of two, wherever the outcome is the same (docs/beam.md).
    """

    def __init__(
        self,
        base: ModelHandler[ExampleT, PredictionT, ModelT],
        *,
        model_identifier: str | None = None,
        on_unshareable: Literal["warn", "raise"] = "warn",
        timeout: float | None = None,
        linger: float | None = None,
        torch_num_threads: int | Literal["auto"] | None = None,
        process_setup_fn: Callable[[], object] | None = None,
        namespace: str = "default",
        backend: str = "auto",
        huge: str = "auto",
        map_weights: bool = True,
    ) -> None:
        # Not `super().__init__()`: what it would set on us (`_env_vars`, batching) is the inner handler's to answer.
        if not isinstance(base, ModelHandler):
            raise TypeError(f"SharedMemoryModelHandler wraps a ModelHandler of Beam, not {base!r}")
        if model_identifier is not None and (not isinstance(model_identifier, str) or not model_identifier):  # type: ignore[redundant-expr]
            raise ValueError(f"model_identifier must be a non-empty string, not {model_identifier!r}")
        if model_identifier is not None:
            process.check_tag("model_identifier", model_identifier, "The model's path is told apart by itself")
        if on_unshareable not in ("warn", "raise"):
            raise ValueError(f"on_unshareable must be 'warn' or 'raise', not {on_unshareable!r}")
        process.check_seconds("timeout", timeout)
        process.check_seconds("linger", linger)
        if torch_num_threads not in (None, "auto") and not (
            isinstance(torch_num_threads, int) and torch_num_threads > 0
        ):
            raise ValueError(f"torch_num_threads must be a number above 0, 'auto' or None, not {torch_num_threads!r}")
        self._base = base
        # For `onecopy ls`, a name that says something; 50 characters, because a tag has 255 bytes at most.
        self._own_name = f"{type(base).__name__[:50]}-{uuid.uuid4().hex}"
        self._model_identifier = model_identifier
        self._on_unshareable = on_unshareable
        self._timeout = timeout
        self._linger = linger
        self._torch_num_threads = torch_num_threads
        self._process_setup_fn = process_setup_fn
        self._map_weights = map_weights
        self._place = Store(namespace, backend=backend, huge=huge).place
        self._why_transparent = families.why_transparent(base)
        self._updated_path = ""
        self._metrics_namespace = ""
        self._looks_as: object = None  # token of the `Loaded` whose state `base` took on in this process
        if self._why_transparent:
            logger.info("%r changes nothing: %s", self, self._why_transparent)

    # What Beam calls. Every method that is not here is `base`'s own, see the end of the file.

    def load_model(self) -> ModelT:
        """The model: attached where a process of this machine has it, else loaded by `base` and published.

        Raises what `base.load_model` raises; with `on_unshareable="raise"` or ONECOPY=require any OneCopyError that
        kept the model from being shared.
        """
        self._set_up_process()
        if self._active():
            model = self._share()
        elif switch.position() == "require":
            raise UnshareableError(
                f"{self._wish('').words} is not shared: {self._why_transparent}. ONECOPY=require makes this an error; "
                "ONECOPY=auto goes on with the handler as it is without the wrapper"
            )
        else:
            model = self._base.load_model()
        threads.apply(self._torch_num_threads)
        return model  # type: ignore[no-any-return]

    def run_inference(
        self, batch: Sequence[ExampleT], model: ModelT, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionT]:
        """`base.run_inference`, on a `base` that looks as if it had loaded the model itself."""
        # Every call pays for what stands here: of a small model's that is a part.
        came_with = loaded.find(model)
        if came_with is not None:
            model = self._before_inference(came_with, model)
        elif self._active():  # not from our load_model, as the proxies of use_model_manager
            model = loaded.unwrap(model)
        return self._base.run_inference(batch, model, inference_args)  # type: ignore[no-any-return]

    def update_model_path(self, model_path: str | None = None) -> None:
        # As Beam's families do: no path means the one before.
        self._updated_path = model_path or self._updated_path
        self._base.update_model_path(model_path)

    def update_model_paths(self, model: ModelT, model_paths: Any = None) -> None:
        self._base.update_model_paths(loaded.unwrap(model), model_paths)

    def override_metrics(self, metrics_namespace: str = "") -> bool:
        self._metrics_namespace = metrics_namespace
        return self._base.override_metrics(metrics_namespace)  # type: ignore[no-any-return]

    def set_environment_vars(self) -> None:
        self._base.set_environment_vars()
        self._set_up_process()

    def share_model_across_processes(self) -> bool:
        return False if self._active() else self._base.share_model_across_processes()

    def model_copies(self) -> int:
        return 1 if self._active() else self._base.model_copies()

    def should_garbage_collect_on_timeout(self) -> bool:
        return False if self._active() else self._base.should_garbage_collect_on_timeout()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._base!r})"

    def __getattr__(self, name: str) -> Any:
        # Beam's wrappers read attributes (`_env_vars`) as well as methods; `_base` is missing while unpickling.
        if name == "_base" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._base, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_looks_as": None}

    # How it is done.

    def _active(self) -> bool:
        return not self._why_transparent and switch.position() != "off"

    def _set_up_process(self) -> None:
        if self._process_setup_fn is None:
            return
        with _setup_lock:
            if (me := (os.getpid(), self._own_name)) not in _set_up:
                self._process_setup_fn()
                _set_up.add(me)

    def _share(self) -> Any:
        word = switch.position()
        must = ""
        if word == "require":
            must = "ONECOPY=require"
        elif word is None and self._on_unshareable == "raise":
            must = 'on_unshareable="raise"'
        wish = self._wish(must)
        model = sharing.share(self._base, wish)
        if self._model_identifier:
            sharing.warn_of_namesakes(wish)
        return model

    def _wish(self, must: str) -> sharing.Wish:
        return sharing.Wish(
            place=self._place,
            tag=self._model_identifier or self._own_name,
            owner=families.class_name(self._base),
            path=families.model_path(self._base, self._updated_path),
            timeout=self._timeout,
            linger=self._linger,
            must=must,
            map_weights=self._map_weights,
        )

    def _before_inference(self, came_with: loaded.Loaded, given: Any) -> Any:
        model = loaded.unwrap(given)
        if self._looks_as is not came_with.token:
            state.apply(self._base, came_with.state, model)
            self._looks_as = came_with.token
        if not came_with.reported and metrics.inside_bundle():
            loaded.report(came_with, self._metrics_namespace or self._base.get_metrics_namespace())
        return model


def _answered_by_base(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(ModelHandler, name))
    def method(self: SharedMemoryModelHandler[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        return getattr(self._base, name)(*args, **kwargs)

    return method


# The methods that return a handler around this one are inherited: they must wrap us. All others that this version of
# Beam has, and that are not defined above, are the inner handler's.
_AROUND_US = {"with_preprocess_fn", "with_postprocess_fn", "with_no_batching"}
for _name, _method in vars(ModelHandler).items():
    _is_ours = _name in vars(SharedMemoryModelHandler) or _name in _AROUND_US or _name.startswith("_")
    if inspect.isfunction(_method) and not _is_ours:
        setattr(SharedMemoryModelHandler, _name, _answered_by_base(_name))
