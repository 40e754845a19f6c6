"""Searches that stop, pause and promote trials, and that end where their budget does."""

import math

import keras
import keras_tuner
import numpy as np
import pytest

import keras_optkit as ok
from keras_optkit.tuning import Choice, Float, Int, Space, Trial, Values
from keras_optkit.tuning.pruners import ASHA, PASHA, Hyperband, Standing, is_consistent, noise
from keras_optkit.tuning.trials import ranked

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
        (
            [paused(1, 4), paused(2, 3), paused(3, 5), paused(4), paused(5), paused(6), *[paused(7)] * 3],
            9,
            1,
        ),  # top first
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
    """A model whose score depends on weights, dropout, the order of the data, the schedule and slots."""
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


def line(start):
    """A model whose val_loss is |start| in every epoch, and at once."""
    kernel = keras.initializers.Constant(start)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer=kernel)])
    model.compile(keras.optimizers.SGD(0.0), "mae", run_eagerly=True)
    return model


ONES, ZEROS = np.ones((2, 1), "float32"), np.zeros((2, 1), "float32")
LINES = (ONES, ZEROS, ONES, ZEROS)


def lines(starts, **arguments):
    """A search over models of known scores, in the order that is given."""
    return search(lambda hp: line(hp.x), Space(x=Choice(starts)), data=LINES, **arguments)


def told(result):
    return [(trial.status, trial.epochs, trial.score) for trial in result.trials]


def test_an_interrupted_search_with_pauses_is_continued_exactly(tmp_path):
    def run(directory, stop_at=None):
        calls = []

        def build(hp):
            calls.append(hp)
            if len(calls) == stop_at:
                raise keras_tuner.errors.FatalRuntimeError
            return line(hp.x)

        space = Space(x=Choice([4.0, 3.0, 2.0, 1.0]))
        return search(build, space, data=LINES, pruner=ASHA(1, 2), directory=directory, epochs=3), calls

    whole, calls = run(tmp_path / "whole")
    assert len(calls) == 9
    for stop_at in (3, 4):  # in a promoted trial, and in the first part of one
        with pytest.raises(keras_tuner.errors.FatalRuntimeError):
            run(tmp_path / str(stop_at), stop_at)
        again, rest = run(tmp_path / str(stop_at))
        assert told(again) == told(whole)
        assert len(rest) == len(calls) - stop_at + 1
        assert [trial.history for trial in again.trials] == [trial.history for trial in whole.trials]
    assert len(run(tmp_path / "whole")[1]) == 0


def test_rows_tables_figures_and_logs_of_pruned_trials(tmp_path):
    result = lines([3.0, 1.0, 2.0], pruner="asha", epochs=2, log_dir=tmp_path / "logs", directory=tmp_path)
    assert told(result) == [("pruned", 1, 3.0), ("completed", 2, 1.0), ("pruned", 1, 2.0)]
    assert result.best_trial.number == 1
    assert [row["status"] for row in result.rows()] == ["pruned", "completed", "pruned"]
    assert result.trials[0].message == "not promoted after 1 epochs"
    text = result.table()
    assert "2 (pruned)" in text
    assert "failed" not in text
    result.report(tmp_path / "report.html")
    assert "of which 0 failed and 2 were pruned" in (tmp_path / "report.html").read_text()
    result.to_csv(tmp_path / "trials.csv")
    assert (tmp_path / "trials.csv").read_text().splitlines()[1].startswith("0,pruned,3.0,")
    result.plot()
    for trial in result.trials:
        summaries = events(tmp_path / "logs" / f"trial_{trial.number}")
        assert [tag for tag in summaries if "session" in tag] == [
            "_hparams_/session_start_info",
            "_hparams_/session_end_info",
        ]
        assert summaries["best_val_loss"] == [0]
        assert summaries["_hparams_/session_end_info"] == ["SUCCESS"]


def events(directory):
    """The steps of each tag of a run; of the end of an HParams session its status."""
    import tensorflow as tf
    from tensorboard.plugins.hparams import plugin_data_pb2

    found = {}
    for path in sorted(directory.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                what = event.step
                if value.tag.endswith("session_end_info"):
                    data = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    what = {1: "SUCCESS", 2: "FAILURE"}[data.session_end_info.status]
                found.setdefault(value.tag, []).append(what)
    return found


def test_failures_and_maximising():
    space = Space(x=Choice([1.0, 9.0, 3.0, 2.0]))

    def build(hp):
        return line(inf if hp.x == 9 else hp.x)

    result = search(build, space, data=LINES, pruner=ASHA(1, 2), direction="max", epochs=2)
    # the failed one is worse than the first, one of two, which so is promoted
    assert told(result) == [("completed", 2, 1.0), ("failed", 1, None), ("completed", 2, 3.0), ("completed", 2, 2.0)]


@pytest.mark.long
def test_hyperband_in_a_search():
    result = lines([4.0, 3.0, 2.0, 1.0], pruner=Hyperband(1, 2), epochs=2)
    assert told(result) == [("pruned", 1, 4.0), ("completed", 2, 3.0), ("completed", 2, 2.0), ("completed", 2, 1.0)]


class Ends(keras.callbacks.Callback):
    """Ends a run by itself."""

    stateless = True

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


def test_a_run_that_ends_by_itself_is_complete():
    result = lines([2.0, 1.0], pruner=ASHA(2, 2), callbacks=lambda: [Ends()])
    assert told(result) == [("completed", 1, 2.0), ("completed", 1, 1.0)]


@pytest.mark.long
def test_executions_are_paused_together():
    result = lines([3.0, 1.0], pruner=ASHA(1, 2), epochs=2, executions_per_trial=2)
    assert told(result) == [("pruned", 2, 3.0), ("completed", 4, 1.0)]
    assert [run["epochs"] for run in result.best_trial.history] == [[1, 2], [1, 2]]


# Optuna's pruners


@pytest.mark.few(1)
@pytest.mark.parametrize("executions", [1, 2])
def test_pruners_of_optuna_stop_a_trial(executions, tmp_path):
    import optuna

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=1)
    starts = [2.0, 3.0, 4.0, 1.0, 5.0]
    result = lines(starts, pruner=pruner, executions_per_trial=executions, directory=tmp_path)
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=1))
    for start, trial in zip(starts, result.trials, strict=True):
        told_by = study.ask()
        epochs = 0
        for epoch in range(1, 5):
            told_by.report(start, epoch - 1)
            epochs = epoch
            if epoch < 4 and told_by.should_prune():
                study.tell(told_by, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(told_by, start)
        assert trial.history[0]["epochs"] == list(range(1, epochs + 1))
    assert [trial.status for trial in result.trials] == ["completed", "completed", "pruned", "completed", "pruned"]
    assert result.trials[2].message == "stopped by MedianPruner after epoch 2"


@pytest.mark.long
def test_a_search_with_the_median_is_continued(tmp_path):
    def run(starts_of, **arguments):
        import optuna

        pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
        return lines([2.0, 3.0, 4.0, 1.0], pruner=pruner, epochs=2, directory=tmp_path / starts_of, **arguments)

    whole = run("whole")
    run("parts", max_trials=2)
    assert told(run("parts")) == told(whole)
    assert told(whole)[2] == ("pruned", 1, 4.0)


@pytest.mark.long
@pytest.mark.parametrize("name", ["median", "wilcoxon"])
def test_pruners_by_name(name):
    from keras_optkit.tuning.epoch_pruners import Judge, pruner_of

    judge = Judge(pruner_of(name), "max", 0)
    for trial in range(6):
        judge.begin()
        values = [0.5 + epoch / 100 + trial / 1000 for epoch in range(12)]
        assert not any(judge.stops(epoch, value) for epoch, value in enumerate(values, 1))
        judge.end(values[-1], "completed")
    judge.begin()
    assert any(judge.stops(epoch, 0.1 + epoch / 1000) for epoch in range(1, 13))
    judge.end(None, "pruned")


def test_tpe_is_told_what_was_pruned():
    import optuna

    space = Space(x=Float(0.1, 4.0))
    seen = []

    class Looking(optuna.samplers.TPESampler):
        def infer_relative_search_space(self, study, trial):
            seen.append([(t.state.name, t.intermediate_values, t.value) for t in study.get_trials(deepcopy=False)])
            return super().infer_relative_search_space(study, trial)

    strategy = Looking(seed=0, n_startup_trials=2)
    arguments = {"data": LINES, "strategy": strategy, "pruner": ASHA(1, 3)}
    result = search(lambda hp: line(hp.x), space, epochs=2, max_trials=5, **arguments)
    before = seen[-1][:4]
    assert {state for state, _, _ in before} <= {"PRUNED", "COMPLETE"}
    for (state, values, value), trial in zip(before, result.trials, strict=False):
        assert (state == "COMPLETE") == (trial.status == "completed")
        assert values.get(1, value) == pytest.approx(trial.score)


@pytest.mark.long
def test_other_samplers_are_told_what_was_pruned():
    result = search(
        lambda hp: line(hp.x), Space(x=Float(0.1, 4.0), y=Float(0.1, 1.0)), data=LINES, strategy="cma", epochs=2,
        pruner="asha", max_trials=4,
    )  # fmt: skip
    assert sorted(trial.status for trial in result.trials) == ["completed", "pruned", "pruned", "pruned"]


# Budgets


def test_an_epoch_budget_ends_a_search():
    result = lines([3.0, 2.0, 1.0], epochs=2, max_epochs=3)
    assert told(result) == [("completed", 2, 3.0), ("pruned", 1, 2.0)]
    assert result.trials[1].message == "max_epochs=3 is used up after epoch 1"
    assert result.best_trial.number == 0
    assert lines([3.0, 2.0], max_epochs=1).best_trial.status == "pruned"


def test_a_time_limit_counts_what_was_used_before(tmp_path):
    lines([3.0, 2.0, 1.0], epochs=1, max_trials=1, time_limit=1000, directory=tmp_path)
    again = lines([3.0, 2.0, 1.0], epochs=1, time_limit=1e-6, directory=tmp_path)
    assert told(again) == [("completed", 1, 3.0)]
    assert len(lines([3.0, 2.0, 1.0], epochs=1, time_limit=1000, directory=tmp_path).trials) == 3


@pytest.mark.long
def test_a_budget_leaves_trials_paused_for_a_larger_one(tmp_path):
    def run(directory, **arguments):
        return lines([4.0, 3.0, 2.0, 1.0], pruner=ASHA(1, 2), epochs=3, directory=tmp_path / directory, **arguments)

    part = run("part", max_epochs=2)
    assert told(part) == [("pruned", 1, 4.0), ("pruned", 1, 3.0)]
    assert part.best_score == 3.0
    assert told(run("part")) == told(run("whole"))


def test_patience():
    result = lines([3.0, 4.0, 2.0, 5.0, 6.0, 1.0], epochs=1, patience=2)
    assert len(result.trials) == 5


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"pruner": "best"}, ValueError, r"pruner must be one of 'asha', 'pasha', .* got 'best'"),
        ({"pruner": 3}, TypeError, r"pruner must be a name, a pruner of keras_optkit or of Optuna, or None, got 3"),
        ({"pruner": "asha", "objective": ["val_loss", "loss"]}, ValueError, r"pruner must be None .* several obj"),
        ({"pruner": ASHA(5)}, ValueError, r"min_epochs must be at most epochs=4, got 5"),
        ({"pruner": Hyperband(5)}, ValueError, r"min_epochs must be at most epochs=4, got 5"),
        ({"pruner": "asha", "fit_arguments": {"initial_epoch": 1}}, ValueError, r"initial_epoch must be 0 .* got 1"),
        ({"pruner": ASHA}, TypeError, r"call the class"),
        (
            {"pruner": "asha", "fit_arguments": {"validation_freq": 2}, "objective": "val_loss"},
            ValueError,
            r"min_epochs must be at least 2, since trials have no val_loss before .*validation_freq=2.*, got 1",
        ),
        ({"time_limit": 0}, ValueError, r"time_limit must be a finite number in \(0, inf\) or None, got 0"),
        ({"max_epochs": 0}, ValueError, r"max_epochs must be an integer at least 1 or None, got 0"),
        ({"patience": 1.5}, TypeError, r"patience must be an integer at least 1 or None, got 1.5"),
    ],
)  # fmt: skip
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        lines([1.0, 2.0], **changed)


def test_pruners_set_the_epochs():
    with pytest.raises(ValueError, match=r"epochs must not be a parameter of the space where pruner is ASHA"):
        search(lambda hp: line(hp.epochs), Space(epochs=Int(1, 2)), data=LINES, epochs=None, pruner="asha")
    with pytest.raises(ValueError, match=r"min_epochs must be an integer at least 1, got 0"):
        ASHA(0)


def test_another_pruner_is_another_search(tmp_path):
    lines([1.0], epochs=1, directory=tmp_path, pruner="asha")
    with pytest.raises(ValueError, match=r"pruner was 'ASHA\(min_epochs=1, reduction_factor=3\)' and is None"):
        lines([1.0], epochs=1, directory=tmp_path)
