"""Searches whose trials run with a `concurrent.futures.Executor`."""

import os
import signal
import threading
from concurrent import futures

import keras
import numpy as np
import pytest

import keras_optkit as ok
from keras_optkit.tuning import Float, Int

X = np.random.default_rng(0).normal(size=(24, 2)).astype("float32")
DATA = X, (X[:, 0] > X[:, 1]).astype("float32")
RATE = {"rate": Float(1e-2, 1.0, log=True)}


class LastFirst(futures.Executor):
    """Runs what it is given in one thread, the last first, so that trials end in another order than they begin in.

    It waits until there is as much as the search gives at a time; at the end of the search, that no longer comes.
    """

    def __init__(self, width=1, fails_at=None):
        self.waiting, self.order, self.width, self.fails_at = [], [], width, fails_at
        self.is_closed = self.is_broken = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def submit(self, function, /, *args, **kwargs):
        future = futures.Future()
        with self._changed:
            self.waiting.append((future, function, args, kwargs))
            self._changed.notify()
        return future

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self.is_closed)
                self._changed.wait_for(lambda: len(self.waiting) >= self.width or self.is_closed, timeout=1)
                if self.is_closed and not self.waiting:
                    return
                future, function, args, kwargs = self.waiting.pop()
            number = args[-1].number
            if not future.set_running_or_notify_cancel():
                continue
            self.is_broken |= number == self.fails_at
            if self.is_broken:
                future.set_exception(futures.BrokenExecutor("a process has ended"))
                continue
            self.order.append(number)
            future.set_result(function(*args, **kwargs))

    def shutdown(self, wait=True, *, cancel_futures=False):
        with self._changed:
            self.is_closed = True
            self._changed.notify()
        self._thread.join()


def build(hp):
    start = keras.initializers.Constant(0.5)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid", kernel_initializer=start)])
    model.compile(keras.optimizers.SGD(hp.get("rate", 0.1)), "binary_crossentropy", run_eagerly=True)
    return model


def search(space=None, **arguments):
    arguments = {"objective": "val_loss", "max_trials": 4, "epochs": 2, "seed": 0, "verbose": 0} | arguments
    return ok.tuning.search(build, space or RATE, DATA, **arguments)


def rows(result):
    return [(t.number, dict(t.values), t.score, t.epochs, t.status, t.message) for t in result.trials]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"strategy": "qmc"}, {"pruner": ok.tuning.pruners.Hyperband(), "max_trials": 5}],
    ids=["random", "qmc", "hyperband"],
)  # fmt: skip
def test_the_trials_do_not_depend_on_the_order_in_which_they_end(arguments):
    with LastFirst(width=3) as executor:
        several = search(executor=executor, workers=3, **arguments)
    assert executor.order[0] == 2
    assert rows(several) == rows(search(**arguments))


def test_a_broken_executor_ends_the_search_which_is_continued(tmp_path):
    with (
        LastFirst(fails_at=2) as executor,
        pytest.raises(RuntimeError, match=r"trial \d: BrokenExecutor: a"),
    ):
        search(executor=executor, workers=2, directory=tmp_path)
    ended = executor.order
    with LastFirst() as executor:
        again = search(executor=executor, workers=2, directory=tmp_path)
    assert sorted(ended + executor.order) == [0, 1, 2, 3]
    assert rows(again) == rows(search())


def test_budgets_are_kept():
    with LastFirst() as executor:
        result = search(executor=executor, workers=1, max_epochs=5)
    assert sum(trial.epochs for trial in result.trials) == 5
    assert result.trials[-1].message == "max_epochs is used up after epoch 1"


def test_an_error_of_the_trial_is_its_own():
    def odd(hp):
        if hp.x % 2:
            raise ValueError("odd")
        return build(hp)

    with LastFirst() as executor:
        result = ok.tuning.search(
            odd, {"x": Int(1, 3)}, DATA, objective="val_loss", strategy="grid", epochs=1, seed=0, verbose=0,
            executor=executor, workers=2,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="All 1 trials failed") as raised:
            ok.tuning.search(
                odd, {"x": Int(1, 1)}, DATA, objective="val_loss", epochs=1, seed=0, verbose=0, executor=executor
            )
    assert [trial.reason for trial in result.trials] == ["ValueError: odd (x=1)", "", "ValueError: odd (x=3)"]
    assert isinstance(raised.value.__cause__, ValueError)
    assert "in odd" in raised.value.__cause__.__notes__[0]  # the traceback


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trial_time_limit": 5}, "trial_time_limit must be None where executor is given, .*, got 5."),
        ({"trial_memory_limit": 5}, "trial_memory_limit must be None where executor is given, .*, got 5."),
        ({"pruner": "median"}, "pruner must be one that pauses trials, .*, got MedianPruner, which looks at each"),
    ],
)
def test_what_takes_a_process_of_the_search_is_refused(arguments, message):
    with LastFirst() as executor, pytest.raises(ValueError, match=message):
        search(executor=executor, **arguments)


def test_threads_are_refused():
    with futures.ThreadPoolExecutor() as executor, pytest.raises(ValueError, match="must train trials in processes"):
        search(executor=executor)


@pytest.mark.long
@pytest.mark.once
def test_a_cluster_of_dask_one_of_whose_workers_is_killed(tmp_path):
    import distributed

    killed = tmp_path / "killed"

    def once(hp):
        if len(hp) and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return build(hp)

    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        result = ok.tuning.search(
            once, RATE, DATA, objective="val_loss", max_trials=4, epochs=2, seed=0, verbose=0,
            executor=client.get_executor(), workers=2,
        )  # fmt: skip
    assert killed.exists()
    expected = search()
    assert [t.values for t in result.trials] == [t.values for t in expected.trials]
    np.testing.assert_allclose([t.score for t in result.trials], [t.score for t in expected.trials], rtol=1e-5)
