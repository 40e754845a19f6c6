"""`keras.distribution`: eight devices train like one, and no device holds more state than the layouts say.

What is checked is in `tests/meshes.py`, which is run once, in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import keras_optkit as ok

pytestmark = pytest.mark.only_on("jax", because="Keras distributes variables there")

SCRIPT = Path(__file__).parent / "meshes.py"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(ok.__file__).parent.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_eight_devices_train_like_one(request):
    lines = run(*(["--all"] if request.config.getoption("all") else []))
    assert all(line.startswith("passed ") for line in lines), lines
    for kind in ("model_parallel", "spread_state", "data_parallel"):
        assert any(line.startswith(f"passed {kind}_equals_one_device[") for line in lines), kind
    assert len(lines) >= 20


@pytest.mark.long
def test_planted_bugs_are_caught():
    lines = run("--planted")
    assert len(lines) == 6
    assert all(line.startswith("caught ") for line in lines), lines
