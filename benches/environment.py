"""What libraries read from the environment when they are imported: to be imported first."""

import os
import uuid

os.environ.update(
    USE_TF="0",
    USE_TORCH="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    OPENBLAS_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    # Our cluster alone, for this run alone: a token of its own, not the one that Ray would leave in the home folder.
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=uuid.uuid4().hex + uuid.uuid4().hex,
)
