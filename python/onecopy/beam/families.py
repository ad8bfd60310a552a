"""Which handlers share their model, decided by looking at the handler alone: no framework is imported for it.

A family that is not named here is active: a model made of tensors or arrays is shared, anything else is found out
when it is published, and goes down the ladder.
"""

from apache_beam.ml.inference import base

# Modules of Beam whose handlers keep no weights in this process's own memory, or keep them where no adapter reaches.
_NO_ADAPTER = {
    "apache_beam.ml.inference.onnx_inference": "ONNX Runtime copies the weights into its session",
    "apache_beam.ml.inference.xgboost_inference": "XGBoost keeps its trees in memory of its own",
    "apache_beam.ml.inference.tensorrt_inference": "TensorRT engines live on the GPU",
    "apache_beam.ml.inference.vllm_inference": "vLLM runs the model in a server of its own",
    "apache_beam.ml.inference.agent_development_kit": "it calls a remote service",
}
# transformers' models for TensorFlow are Keras 2's, which keep their weights in their pickle.
_OF_KERAS_2 = "TensorFlow owns the memory of its weights"
# How Beam's pass-through handlers name the handler inside (KeyedModelHandler; with_preprocess_fn and its kin).
_INSIDE = ("_unkeyed", "_base")


def chain(handler: base.ModelHandler) -> list[base.ModelHandler]:
    """The handler and those that it merely passes through to, outermost first."""
    found = [handler]
    while inside := next((vars(found[-1])[name] for name in _INSIDE if name in vars(found[-1])), None):
        found.append(inside)
    return found


def why_transparent(handler: base.ModelHandler) -> str:
    """Why the wrapper must change nothing for this handler; empty where it shares the model."""
    from onecopy.beam.handler import SharedMemoryModelHandler

    for one in chain(handler):
        if isinstance(one, SharedMemoryModelHandler):
            return "it is wrapped already"
        if isinstance(one, getattr(base, "RemoteModelHandler", ())):  # came after Beam 2.60
            return "it calls a remote service"
        if not getattr(one, "_single_model", True):
            return "a KeyedModelHandler with many models keeps them in a process of Beam's own"
        for kind in type(one).__mro__:
            if reason := _NO_ADAPTER.get(kind.__module__, ""):
                return reason
        if reason := _by_parameters(one):
            return reason
    return ""


def model_path(handler: base.ModelHandler, updated: str = "") -> str:
    """What Beam's own families will load from, which is `updated` after `update_model_path(updated)`.

    Where a handler names its path in its own way, only `updated` is known; where the two differ, both are in the result.
    """
    innermost = vars(chain(handler)[-1])
    names = ("_torch_script_model_path", "_state_dict_path", "_model_uri", "_model")
    path = next((innermost[name] for name in names if innermost.get(name) and isinstance(innermost[name], str)), "")
    return " > ".join(filter(None, (path, updated if updated != path else "")))


def class_name(handler: base.ModelHandler) -> str:
    """The classes of the chain, outermost first: what a segment must have been loaded by, to be the same model."""
    return "/".join(f"{type(one).__module__}.{type(one).__qualname__}" for one in chain(handler))


def _by_parameters(handler: base.ModelHandler) -> str:
    have = vars(handler)
    if have.get("_torch_script_model_path"):
        return "TorchScript modules cannot be pickled"
    if have.get("_framework") == "tf" or getattr(have.get("_model_class"), "__name__", "").startswith("TF"):
        return _OF_KERAS_2
    load_args = [have.get(name) or {} for name in ("_load_pipeline_args", "_model_config_args")]
    if any(args.get("framework") == "tf" for args in load_args):
        return _OF_KERAS_2
    devices = [have.get("_device")] + [args.get(name) for args in load_args for name in ("device", "device_map")]
    for device in devices:
        if device is not None and not _is_cpu(device):
            return f"its device is {device}, and weights on a device belong to one process"
    return ""


def _is_cpu(device: object) -> bool:
    # A torch.device, 'CPU' and 'cpu' are words for it; a pipeline's device may also be -1, transformers' number for it.
    return device == -1 or str(device).lower() == "cpu"
