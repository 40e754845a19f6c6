"""Searches that stop, pause and promote trials, and that end where their budget does."""

import math

import keras
import keras_tuner
import numpy as np
import pytest

import keras_optkit as ok
from keras_optkit.tuning import Choice, Float, Int, Space, Trial, Values
from keras_optkit.tuning.pruners import ASHA, PASHA, Hyperband, Standing, is_consistent, noise
from keras_optkit.tuning.result import ranked

inf = math.inf


def paused(*costs):
    return Standing(costs, True)


def ended(*costs):
    return Standing(costs, False)


# Decisions, by hand


@pytest.mark.parametrize(
    ("pruner", "epochs", "rungs"),
    [
        (ASHA(), 27, (1, 3, 9, 27)),
        (ASHA(), 10, (1, 3, 9, 10)),
        (ASHA(2, 4), 31, (2, 8, 31)),
        (ASHA(5), 5, (5,)),
        (Hyperband(), 1, (1,)),
    ],
)
def test_rungs(pruner, epochs, rungs):
    assert pruner.rungs(epochs) == rungs


@pytest.mark.parametrize(
    ("trials", "left", "promoted"),
    [
        ([], 9, None),
        ([paused(3), paused(2)], 9, None),  # floor(2 / 3) = 0
        ([paused(3), paused(2), paused(4)], 9, 1),
        ([paused(3), paused(2, 5), paused(4)], 9, None),  # the best one was promoted
        ([paused(3), ended(2, inf), paused(4)], 9, None),  # also where it has failed since
        ([paused(3), paused(2, 5), paused(4), paused(1), paused(6), paused(7)], 9, 3),
        ([paused(2), paused(2), paused(2)], 9, 0),  # of equals the first
        ([paused(inf), paused(inf), paused(inf)], 9, None),  # without an objective
        ([paused(3), ended(inf), ended(inf)], 9, 0),  # failed ones count
        ([paused(1, 4), paused(2, 3), paused(3, 5), paused(4), paused(5), paused(6), *[paused(7)] * 3], 9, 1),  # top first
        ([paused(3), paused(2)], 0, 1),  # at the end one is trained until the end
        ([paused(3), paused(2, 9)], 0, 1),
        ([paused(3), ended(2, 9, 9)], 0, None),
        ([ended(inf)], 0, None),
    ],
)
def test_promotions_of_asha(trials, left, promoted):
    assert ASHA().promoted(trials, 9, 2, left) == promoted


def test_asha_keeps_what_may_be_promoted():
    three = [paused(3), paused(2), paused(4)]
    assert ASHA().hopeless(three, 9, 2, left=6) == []  # three of nine will be
    assert ASHA().hopeless(three, 9, 2, left=3) == [2]  # two of six
    assert ASHA().hopeless(three, 9, 2, left=None) == []
    assert ASHA().hopeless([paused(3), ended(2, 1, 1), paused(4)], 9, 2, left=0) == [0, 2]
    assert ASHA().hopeless([paused(inf), paused(1)], 9, 2, left=None) == [0]


@pytest.mark.parametrize("pruner", [ASHA(), ASHA(1, 2), PASHA(1, 2), Hyperband(), Hyperband(1, 2)])
@pytest.mark.parametrize("most", [1, 7, 30])
def test_a_simulated_search_never_misses_a_trial_that_it_has_ended(pruner, most):
    """Trials that are ended early would not have been promoted: without that the decisions are the same.

    Where trials fail, ASHA may miss them at its end, when the last one that it trains fails, too.
    """
    failing = 0.1 if isinstance(pruner, Hyperband) else 0.0

    def run(ends):
        rng = np.random.default_rng(most)
        scores = rng.normal(size=(most, 6)).cumsum(axis=1)  # ranks change from rung to rung
        trials, order, top = [], [], 1
        for _ in range(1000):
            left = most - len(trials)
            i = pruner.promoted(trials, 9, top, left)
            if i is None and not left:
                return order
            if i is None:
                i = len(trials)
                trials.append(Standing((), True))
            rung = len(trials[i].costs)
            costs = (*trials[i].costs, float(scores[i, rung]) if rng.random() >= failing else inf)
            open_ = math.isfinite(costs[-1]) and len(costs) < len(pruner.rungs(9, i))
            trials[i] = Standing(costs, open_)
            order.append((i, rung))
            top = pruner.grown(top, trials, 9)
            for j in pruner.hopeless(trials, 9, top, most - len(trials)) if ends else ():
                trials[j] = Standing(trials[j].costs, False)
        raise AssertionError

    assert run(True) == run(False)


def test_brackets_of_hyperband():
    # Table 1 of Li et al. 2018, R = 81 and eta = 3
    sizes = [(81, 1), (34, 3), (15, 9), (8, 27), (5, 81)]  # the paper has 27, 9, 6, 5 for another rounding
    assert [(n, rungs[0]) for n, rungs in Hyperband().brackets(81)] == sizes
    assert Hyperband().brackets(81)[0][1] == (1, 3, 9, 27, 81)
    assert Hyperband().rungs(9, 0) == (1, 3, 9)
    assert Hyperband().rungs(9, 9) == (3, 9)
    assert Hyperband().rungs(9, 16) == (9,)
    assert Hyperband().rungs(9, 17) == (1, 3, 9)


def test_hyperband_waits_for_the_bracket():
    scores = [paused(cost) for cost in (5, 3, 8, 1, 9, 2, 7, 6)]
    assert Hyperband().promoted(scores, 9, 2, left=1) is None
    assert Hyperband().hopeless(scores, 9, 2, left=1) == [0, 2, 4, 6, 7]
    full = [*scores, paused(4)]
    assert Hyperband().promoted(full, 9, 2, left=1) == 3
    full[3] = paused(1, 9)
    assert Hyperband().promoted(full, 9, 2, left=1) == 5
    full[5], full[1] = ended(2, inf), paused(3, 7)
    assert Hyperband().promoted(full, 9, 2, left=1) == 1  # all have come to the second rung
    assert Hyperband().promoted(scores[:2], 9, 2, left=0) == 1  # a bracket cut short


def test_pasha_opens_a_rung_where_the_order_changes():
    same = [paused(1, 1), paused(2, 2), paused(3)]
    swapped = [paused(1, 2), paused(2, 1), paused(3)]
    assert PASHA().grown(1, [paused(1)], 27) == 1
    assert PASHA().grown(1, same, 27) == 1
    assert PASHA().grown(1, swapped, 27) == 2
    assert PASHA().grown(3, [paused(1, 1, 1, 2), paused(2, 2, 2, 1)], 27) == 3  # there is no further one
    assert PASHA().promoted([paused(1, 1), paused(2, 2), paused(3, 3)], 27, 1, left=5) is None
    assert PASHA().promoted([paused(1, 1), paused(2, 2), paused(3, 3)], 27, 2, left=5) == 0
    assert is_consistent(swapped, 1, [0, 1], epsilon=1.0)
    assert not is_consistent(swapped, 1, [0, 1], epsilon=0.9)


def test_noise_is_that_of_curves_that_cross_twice():
    one, once, twice = {1: 0.0, 2: 0.0, 3: 0.0}, {1: 1.0, 2: 1.0, 3: -1.0}, {1: 1.0, 2: -1.0, 3: 0.25}
    assert noise([one, once]) == 0.0
    assert noise([one, twice]) == 0.25
    assert noise([]) == 0.0


def test_pruned_trials_are_best_only_without_complete_ones():
    whole, part = Trial(0, Values(x=1), 2.0), Trial(1, Values(x=2), 1.0, status="pruned")
    assert ranked([whole, part], "min") == [whole]
    assert ranked([part], "min") == [part]


# Searches


def noisy(hp):
    """A model whose score depends on weights, dropout, the order of the data, the schedule and the optimizer's slots."""
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dropout(0.3), keras.layers.Dense(1)]
    )
    schedule = ok.schedules.Cosine(hp.learning_rate, 12)
    model.compile(ok.optimizers.Adam(schedule), "mse")
    return model


RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype("float32")
Y = X @ np.array([[1.0], [2.0], [-1.0]], "float32")
SPACE = Space(learning_rate=Choice([0.3, 0.1, 0.03, 0.01]))


def search(build=noisy, space=SPACE, **arguments):
    defaults = {"objective": "val_loss", "epochs": 4, "seed": 0, "verbose": 0, "strategy": "grid", "batch_size": 8}
    data = arguments.pop("data", (X, Y, X, Y))
    return ok.tuning.search(build, space, data, **{**defaults, **arguments})


class Smoothed(keras.callbacks.Callback):
    """Has state: a mean of all losses, which it logs."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(float(logs["val_loss"]))
        logs["smoothed"] = float(np.mean(self.losses))

    def state_dict(self):
        return {"losses": self.losses}

    def load_state_dict(self, state):
        self.losses = list(state["losses"])


def test_a_promoted_trial_is_bitwise_that_which_was_never_paused(tmp_path):
    def run(pruner, directory):
        return search(pruner=pruner, callbacks=lambda: [Smoothed()], directory=directory, log_dir=directory / "logs")

    never = run(ASHA(min_epochs=4), tmp_path / "whole")
    found = run(ASHA(reduction_factor=2), tmp_path / "parts")
    assert {trial.status for trial in never.trials} == {"completed"}
    assert [trial.status for trial in found.trials].count("completed") == 1
    assert {trial.epochs for trial in found.trials} >= {1, 4}
    for trial, whole in zip(found.trials, never.trials, strict=True):
        (run,), (of_whole,) = trial.history, whole.history
        assert run["metrics"] == {name: values[: trial.epochs] for name, values in of_whole["metrics"].items()}
        assert len(run["epochs"]) == trial.epochs
    best = found.best_trial
    assert best.score == never.trials[best.number].score
    if never.best_trial.number == best.number:
        for one, other in zip(found.best_model.get_weights(), never.best_model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
    assert not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("run_*"))
