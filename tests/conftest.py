"""Shared set-up: the environment must be set before the backend is imported."""

import collections
import gc
import os
import pathlib
import signal
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("MPLBACKEND", "Agg")
# most programs that JAX compiles here occur in several tests, and in both workers
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have what their parent has set
    os.environ["TESTS_ARE_THOROUGH"] = str(int("--all" in sys.argv))
    if "--all" not in sys.argv:
        # what is compiled here runs for a moment: without most of its optimization it is the same arithmetic, sooner
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import pytest
from hypothesis import HealthCheck, settings

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it, and a shell has what it runs behind ignore it


def _without_tuning():
    """Has TensorFlow run what is traced here as it is: it runs for a moment, and rewriting it takes longer.

    The thread that tunes tf.data's buffers, besides, sleeps for 10 ms, 20 ms and so on up to a minute, and an iterator
    that is deleted waits for it: one that an interrupted `fit` has left behind cost up to a minute of waiting, many of
    them several.
    """
    import tensorflow as tf

    tf.debugging.disable_traceback_filtering()
    iterate, options = tf.data.Dataset.__iter__, tf.data.Options()
    options.autotune.enabled = False
    if os.environ["TESTS_ARE_THOROUGH"] == "0":
        options.experimental_optimization.apply_default_optimizations = False
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    tf.data.Dataset.__iter__ = lambda dataset: iterate(dataset.with_options(options))


def pytest_configure(config):
    """Imports Keras, which takes ten seconds, but not where tests are only handed out to workers."""
    if "PYTEST_XDIST_WORKER" not in os.environ and config.getoption("numprocesses"):
        return
    import keras

    import keras_optkit as ok

    ok.testing.prepare()
    keras.config.disable_traceback_filtering()  # whose wrappers take a twentieth of the time that tracing takes
    if keras.config.backend() == "tensorflow":
        _without_tuning()


# examples take as long as tracing takes, and no database: what fails is printed as a blob to reproduce it with
_common = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("share", max_examples=8, derandomize=True, **_common)
settings.register_profile("thorough", max_examples=500, derandomize=False, **_common)
settings.load_profile("share")


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="run what is marked `long`, too, and all combinations of `each_once`"
    )


def pytest_collection_modifyitems(config, items):
    """Leaves out tests of another backend, and combinations that repeat what others show.

    `only_on(backend, because=...)` marks what is not for other backends than that one. Of a test with several
    parameters that is marked `each_once`, as many combinations are run as it takes to have every value of each, and of
    one that is marked `few(n)` the first n. What is marked `long` shows at length what others show as well; what is
    marked `once` runs on TensorFlow.
    """
    import keras

    kept = [item for item in items if _is_for(item, keras.config.backend())]
    if not config.getoption("all"):
        left_out = {"long"} if keras.config.backend() == "tensorflow" else {"long", "once"}
        kept = _each_once(_few([item for item in kept if not any(map(item.get_closest_marker, left_out))]))
    left_out = set(items) - set(kept)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = kept


def _is_for(item, backend):
    mark = item.get_closest_marker("only_on")
    return mark is None or _backend(*mark.args, **mark.kwargs) == backend


def _few(items):
    """Of tests marked `few(n)` the first n combinations."""
    counts = collections.Counter()
    kept = []
    for item in items:
        mark = item.get_closest_marker("few")
        counts[item.function] += 1
        if mark is None or counts[item.function] <= mark.args[0]:
            kept.append(item)
    return kept


def _each_once(items):
    """The first combination with all values new, and so on in turn; then what is left of the longest parameters."""
    seen, kept = {}, []
    combinations = [item for item in items if item.get_closest_marker("each_once")]
    values = {item: _values(item) for item in combinations}
    for fewest in range(max((len(each) for each in values.values()), default=0), 0, -1):
        for item in combinations:
            if sum(value not in seen for value in values[item]) >= fewest:
                seen |= dict.fromkeys(values[item])
                kept.append(item)
    chosen = set(kept)
    return [item for item in items if item not in values or item in chosen]


def _values(item):
    """What identifies each mark's row of values among those of a test."""
    rows = [mark.args[0] for mark in item.iter_markers("parametrize")]
    rows = [row.replace(",", " ").split() if isinstance(row, str) else row for row in rows]
    return {(item.function, *(id(item.callspec.params[name]) for name in row)) for row in rows}


def _backend(backend, *, because):
    """Of a mark, which has to say why."""
    assert because
    return backend


gc.disable()


@pytest.fixture(autouse=True)
def collected_garbage():
    """Garbage is collected after each test, in this thread, and at no other time.

    A collection that happens to run in the thread which makes the batches of an interrupted `fit` deletes the iterator
    of these batches, which waits for that thread. It never ends, and there is no other one in the process any more.
    """
    yield
    gc.collect(1)


@pytest.fixture(autouse=True, scope="module")
def frozen_objects():
    """What a module leaves behind is not looked through again by each collection of garbage."""
    gc.collect()
    gc.freeze()


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
    import keras

    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def x64():
    """JAX has to be asked for float64."""
    from keras_optkit.testing import tools

    with tools.float64():
        yield


@pytest.fixture
def float64(x64):  # noqa: ARG001 (in which the test runs)
    import keras

    keras.config.set_floatx("float64")  # Keras's learning rate variable has this dtype
