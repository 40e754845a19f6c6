"""What is installed is what is meant to be: a light import, one version, a typed and licensed wheel."""

import json
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import keras_optkit as ok

ROOT = Path(__file__).parent.parent


def python(code):
    """Runs `code` in a fresh interpreter and returns the JSON that it prints last."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_nothing_that_keras_does_not_and_needs_no_optional_package():
    """Keras itself imports some of the latter where they are installed, which would hide an import of ours."""
    loaded, rooms = python(
        "import sys, json, keras\n"
        "for name in ('torch', 'jax', 'matplotlib', 'optuna', 'keras_tuner', 'sklearn', 'pandas', 'pytest'):\n"
        "    for module in [m for m in sys.modules if m.partition('.')[0] == name]:\n"
        "        del sys.modules[module]\n"
        "    sys.modules[name] = None  # importing it now raises ImportError\n"
        "before = set(sys.modules)\n"
        "import keras_optkit as ok\n"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "rooms = [n for n in ok.__all__ if n not in ('testing', 'tuning') and getattr(ok, n) is not None]\n"
        "print(json.dumps([sorted(added), rooms]))"
    )
    assert loaded == ["keras_optkit"]
    assert {"callbacks", "initializers", "layers", "optimizers", "regularizers", "schedules"} <= set(rooms)


@pytest.mark.long
def test_a_callback_that_is_made_in_the_call_of_fit_can_change_it(tmp_path):
    """`fit` is looked up before its arguments are made, so that it must be ours by then."""
    files = python(
        "import json, os, keras, numpy as np\n"
        "import keras_optkit as ok\n"
        "model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])\n"
        "model.compile(optimizer='sgd', loss='mse')\n"
        f"directory = {str(tmp_path)!r}\n"
        "data = ok.data.Shuffled(np.ones((4, 1)), np.ones((4, 1)), batch_size=2)\n"
        "model.fit(data, callbacks=[ok.callbacks.Resume(directory)], verbose=0)\n"
        "print(json.dumps(sorted(os.listdir(directory))))"
    )
    assert files == ["bundle-00000001.npz", "finished.npz", "lock"]


def test_lazy_rooms_are_found_and_a_misspelt_one_is_not():
    assert set(ok.__all__) <= set(dir(ok))
    assert all(hasattr(ok, name) for name in ok.__all__)
    with pytest.raises(AttributeError, match="optimisers"):
        ok.optimisers  # noqa: B018


def test_version_is_said_once():
    assert version("keras-optkit") == ok.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = target.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    info = f"keras_optkit-{ok.__version__}.dist-info/"
    files = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("keras_optkit/**/*.py")}
    assert {name for name in wheel if not name.startswith(info)} == files | {"keras_optkit/py.typed"}


def test_wheel_carries_licence_and_metadata(wheel):
    info = f"keras_optkit-{ok.__version__}.dist-info"
    assert wheel[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    metadata = Parser().parsestr(wheel[f"{info}/METADATA"].decode())
    assert metadata["Version"] == ok.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    base = {Requirement(line).name for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert base == {"filelock", "keras", "keras-tuner", "ml-dtypes", "numpy", "tensorboard", "tensorflow"}


def test_constraints_pin_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines if line[:1] != "#")}
    wanted = [Requirement(line) for line in requires("keras-optkit")]
    allowed = {
        w.name: w.specifier.contains(pins[canonicalize_name(w.name)]) for w in wanted if w.name != "keras-optkit"
    }
    assert len(allowed) > 10
    assert all(allowed.values()), allowed
    assert pins["torch"] == "2.13.0"
