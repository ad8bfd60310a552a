"""Beam's own tests of RunInference, with every handler wrapped.

The slowest tests (they sleep, on timeouts and retries) run with ONECOPY_BEAM_TESTS=all only.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import apache_beam.ml.inference
import pytest

# Both a longer and a shorter list of failures is a failure.
DIFFERENCES = {
    # Asserts that a large_model is deleted when a batch runs into the timeout. Ours stays: other processes use it.
    "test_run_inference_timeout_does_garbage_collection",
}
MODULES = ["base_test", "pytorch_inference_test"]
SLOW = {
    "test_run_inference_timeout_does_garbage_collection",
    "test_run_inference_timeout_on_inference_dlq",
    "test_run_inference_timeout_on_load_dlq",
    "test_run_inference_timeout_not_hit",
    "test_model_status_provides_valid_garbage_collection",
    "test_works_on_retry",
    "test_repeated_requests_fail",
    "test_run_inference_impl_with_model_manager",
    "test_run_inference_impl_with_model_manager_args",
}


@pytest.mark.beam
@pytest.mark.timeout(1200)
def test_beam_tests_with_every_handler_wrapped(tmp_path, namespace):
    everything = os.environ.get("ONECOPY_BEAM_TESTS") == "all"
    # Not this project's pytest configuration, and not in site-packages/apache_beam, whose `yaml` hides PyYAML.
    config = tmp_path / "pytest.ini"
    config.write_text("[pytest]\n")
    command = [
        sys.executable, "-m", "pytest", "-c", config, "--rootdir", tmp_path, "-p", "conformance_plug",
        "-p", "no:cacheprovider", "-W", "ignore", "--tb=native", "-q", "-rfE",
        "-k", "" if everything else " and ".join(f"not {name}" for name in sorted(SLOW)),
        *(Path(apache_beam.ml.inference.__file__).parent / f"{module}.py" for module in MODULES),
    ]  # fmt: skip
    environment = {**os.environ, "ONECOPY_TEST_NAMESPACE": namespace, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    failed = set(re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)", done.stdout, re.MULTILINE))
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(passed[1]) > 100
    assert failed == (DIFFERENCES if everything else DIFFERENCES - SLOW), done.stdout[-6000:]
