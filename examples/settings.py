"""Imported first: what this process and every worker it starts find in their environment."""

import logging
import os
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",  # N processes with N threads each would only fight for the CPUs
    "TOKENIZERS_PARALLELISM": "false",
    "USE_TF": "0",  # transformers would import TensorFlow, too
    "HF_HUB_OFFLINE": "1",  # everything is here
}
# Workers import the modules beside this one by name.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
logging.getLogger().addHandler(logging.NullHandler())
logging.getLogger().setLevel(logging.ERROR)
