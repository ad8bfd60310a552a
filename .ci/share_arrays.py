"""Run with a namespace where the wheel is and nothing else: two processes, one copy of some numpy arrays."""

import subprocess
import sys
from pathlib import Path

import numpy as np

import onecopy

TAG = "arrays"
NAMESPACE = sys.argv[1]
FRAMEWORKS = ("torch", "tensorflow", "apache_beam", "sklearn", "pandas")
OTHER = """
import sys
import onecopy
lease = onecopy.Store(sys.argv[1]).attach(sys.argv[2])
print(lease.info.role, lease.info.shared_bytes, int(lease.object["a"].sum()), lease.object["b"].dtype)
"""


def main() -> None:
    assert not any(name in sys.modules for name in FRAMEWORKS), "import onecopy must load no framework"
    assert (Path(onecopy.__file__).parent / "py.typed").exists(), "the wheel must say that it is typed"
    arrays = {"a": np.arange(1 << 20), "b": np.ones((1024, 1024), np.float32)}
    size = sum(array.nbytes for array in arrays.values())
    store = onecopy.Store(NAMESPACE)
    lease = store.publish(TAG, arrays)
    with lease:
        command = Path(sys.executable).parent / "onecopy"
        subprocess.run([command, "--namespace", NAMESPACE, "show", TAG], check=True)
        told = subprocess.run(
            [sys.executable, "-c", OTHER, NAMESPACE, TAG], check=True, capture_output=True, text=True
        ).stdout.split()
        assert told[0] == "attacher", told
        assert int(told[1]) == lease.info.shared_bytes >= size, told
        assert told[2:] == [str(int(arrays["a"].sum())), "float32"], told
    print(f"two processes, one copy of {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
