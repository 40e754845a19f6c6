"""Shared set-up: the environment must be set before TensorFlow is imported, which it is not on another backend."""

import os
import signal
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

import keras
import pytest
from hypothesis import HealthCheck, settings

import keras_optkit as ok
from keras_optkit.testing import tools

ok.testing.prepare()
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it, and a shell has what it runs behind ignore it


def _without_autotuning():
    """Switches off the tuning of tf.data's buffers.

    Its thread sleeps for 10 ms, 20 ms and so on up to a minute, and an iterator that is deleted waits for it: one that
    an interrupted `fit` has left behind cost up to a minute of waiting, many of them several.
    """
    import tensorflow as tf

    iterate, options = tf.data.Dataset.__iter__, tf.data.Options()
    options.autotune.enabled = False
    tf.data.Dataset.__iter__ = lambda dataset: iterate(dataset.with_options(options))


if keras.config.backend() == "tensorflow":
    _without_autotuning()

# examples take as long as tracing takes, and no database: what fails is printed as a blob to reproduce it with
_common = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("share", max_examples=25, derandomize=True, **_common)
settings.register_profile("thorough", max_examples=500, derandomize=False, **_common)
settings.load_profile("share")


def pytest_collection_modifyitems(config, items):
    """Leaves out what is marked `only_on(backend, because=...)` for another backend than the present one."""
    here, elsewhere = [], []
    for item in items:
        mark = item.get_closest_marker("only_on")
        (here if mark is None or _backend(*mark.args, **mark.kwargs) == keras.config.backend() else elsewhere).append(
            item
        )
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = here


def _backend(backend, *, because):
    """Of a mark, which has to say why."""
    assert because
    return backend


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory):
    """What is made with `tempfile`, here or in a process that a test starts, is in pytest's own directory.

    A process that is killed leaves it behind, and so do workers of pytest-xdist, which run no exit handlers.
    """
    directory = str(tmp_path_factory.mktemp("temporary"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", directory)
        yield directory


@pytest.fixture(autouse=True)
def clean_keras():
    """Every test starts with float32 and a fixed seed."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def x64():
    """JAX has to be asked for float64."""
    with tools.float64():
        yield


@pytest.fixture
def float64():
    with tools.float64():
        keras.config.set_floatx("float64")  # Keras's learning rate variable has this dtype
        yield
