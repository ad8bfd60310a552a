"""A pytest plugin that wraps every handler given to RunInference.

Loaded into a run of Beam's own tests by `test_conformance.py`.
"""

import os

from apache_beam.ml.inference import base

from onecopy.beam import SharedMemoryModelHandler

_plain_init = base.RunInference.__init__


def _init(self, model_handler, *args, model_identifier=None, **kwargs):
    if isinstance(model_handler, base.ModelHandler) and not isinstance(model_handler, SharedMemoryModelHandler):
        # A pipeline that gives RunInference an identifier gives the same one to the wrapper, as docs/beam.md says.
        model_handler = SharedMemoryModelHandler(
            model_handler, model_identifier=model_identifier, namespace=os.environ["ONECOPY_TEST_NAMESPACE"]
        )
    return _plain_init(self, model_handler, *args, model_identifier=model_identifier, **kwargs)


base.RunInference.__init__ = _init
