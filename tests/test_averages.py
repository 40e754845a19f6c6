"""Averaged weights: Lookahead and Schedule-Free, AveragedWeights in real fits, recalibration."""

import functools
import itertools
import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from torch_references import Made, defaults_of, in_torch, optimizer_run, recalibrated

import keras_optkit as ok
from keras_optkit.callbacks import AveragedWeights
from keras_optkit.optimizers import Lookahead, ScheduleFree, ScheduleFreeAdamW, ScheduleFreeSGD
from keras_optkit.testing import problems

SHAPES = [(3, 4), (5,), (), (2, 3, 2, 4)]
START = problems.start(SHAPES)
GRADS = problems.gradients(60, SHAPES)


def values(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def same(got, expected, what=""):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"{what} {i}")


def close(got, expected, tolerance, what=""):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"{what} {i}")


# -- Schedule-Free ----------------------------------------------------------------------------------------------------


def test_defaults_are_the_authors():
    for ours, name in ((ScheduleFreeSGD(), "SGDScheduleFree"), (ScheduleFreeAdamW(), "AdamWScheduleFree")):
        theirs = in_torch(defaults_of, Made(f"schedulefree:{name}Reference"))
        expected = theirs | {"learning_rate": theirs["lr"]}
        if "betas" in expected:
            expected |= dict(zip(("beta_1", "beta_2"), expected["betas"], strict=True)) | {"epsilon": expected["eps"]}
        config = ours.get_config()
        common = sorted(config.keys() & expected.keys() - {"weight_decay"})
        assert {name: config[name] for name in common} == {name: expected[name] for name in common}
        assert {"learning_rate", "warmup_steps", "r", "weight_lr_power"} < set(common)
        assert not config["weight_decay"]
        assert not expected["weight_decay"]


def test_schedule_free_sgd_and_adamw_are_the_wrapper_around_their_rules():
    for own, wrapped in (
        (ScheduleFreeSGD(0.05, warmup_steps=9), ScheduleFree(ok.optimizers.SGD(0.05), warmup_steps=9)),
        (ScheduleFreeAdamW(0.05), ScheduleFree(ok.optimizers.Adam(0.05, beta_1=0.0))),
    ):
        a, b = (problems.train(o, GRADS[:20], values=START) for o in (own, wrapped))
        close(a[-1], b[-1], 1e-14)


def test_schedule_free_keeps_no_more_than_the_efficient_version():
    assert set(ScheduleFreeSGD().rule.slots()) == {"anchor"}
    assert set(ScheduleFreeAdamW().rule.slots()) == {"anchor", "v"}


def test_groups_with_rates_of_their_own_are_torchs_parameter_groups():
    optimizer = ScheduleFreeSGD(0.05, warmup_steps=9, groups=[ok.Group("weight_1$", lr_scale=0.1)])
    weights = problems.variables(START)
    theirs = Made("schedulefree:SGDScheduleFreeReference", {"lr": 0.05, "warmup_steps": 9})
    expected = in_torch(optimizer_run, theirs, START, GRADS[:30], {1: 0.005})
    for arrays in GRADS[:30]:
        optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
    close(values(weights), expected[-1], 1e-10)


# -- Lookahead --------------------------------------------------------------------------------------------------------

INNER = {
    "SGD": lambda: ok.optimizers.SGD(0.01),
    "SGD nesterov": lambda: ok.optimizers.SGD(0.01, momentum=0.9, nesterov=True, rate_in_velocity=False),
    "AdamW": lambda: ok.optimizers.AdamW(0.01, weight_decay=0.1, decay_mask="all"),
}


@pytest.mark.each_once
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("inner", INNER)
def test_lookahead_with_a_whole_step_is_the_inner_optimizer(inner, mode):
    make = INNER[inner]
    plain = problems.train(make(), GRADS[:12], values=START, mode=mode)
    whole = problems.train(Lookahead(make(), 3, 1.0), GRADS[:12], values=START, mode=mode)
    for a, b in zip(whole, plain, strict=True):
        same(a, b) if mode == "eager" else close(a, b, 1e-15)


def test_lookahead_keeps_its_weights_in_half_precision_within_rounding():
    optimizer, weights = Lookahead("SGD", 2, learning_rate=0.01), problems.variables(START, "bfloat16")
    for arrays in GRADS[:5]:
        optimizer.apply([ops.convert_to_tensor(g, dtype="bfloat16") for g in arrays], weights)
    before = values(weights)
    for evaluating in (True, False):
        optimizer.swap_weights(evaluating)
    same(values(weights), before)


# -- what inner and outer optimizer share -----------------------------------------------------------------------------


def test_settings_of_the_inner_optimizer_are_taken_over():
    schedule = ok.schedules.Cosine(0.1, 10)
    groups = [ok.Group("bias", lr_scale=0.1)]
    inner = ok.optimizers.AdamW(
        schedule, weight_decay=0.3, global_clipnorm=1.0, decay_mask="all", groups=groups, skip_nonfinite=3
    )
    for outer in (Lookahead(inner, 4), ScheduleFree(inner, warmup_steps=4)):
        config = outer.get_config()
        for name in ("weight_decay", "global_clipnorm", "decay_mask", "groups", "skip_nonfinite", "learning_rate"):
            assert config[name] == inner.get_config()[name], name
            assert name not in outer.inner["config"]
        assert outer.inner_rule == inner.rule
        assert outer.name != inner.name


def test_a_keyword_of_the_wrapper_counts_where_the_inner_optimizer_has_its_default():
    optimizer = Lookahead(ok.optimizers.AdamW(beta_1=0.8), learning_rate=0.5, weight_decay=None, clipnorm=1.0)
    assert float(optimizer.learning_rate) == 0.5
    assert optimizer.weight_decay is None
    assert optimizer.clipnorm == 1.0
    assert optimizer.inner_rule.beta_1 == 0.8
    agreeing = Lookahead(ok.optimizers.AdamW(0.5, weight_decay=0.3), learning_rate=0.5, weight_decay=0.3)
    assert (float(agreeing.learning_rate), agreeing.weight_decay) == (0.5, 0.3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Lookahead(ok.optimizers.SGD(0.5), learning_rate=0.2), ValueError, "learning_rate is given twice.*0.2"),
        (lambda: ScheduleFree(ok.optimizers.SGD(clipnorm=1.0), clipnorm=2.0), ValueError, "clipnorm is given twice"),
        (
            lambda: Lookahead(
                ok.optimizers.SGD(ok.schedules.Cosine(1.0, 5)), learning_rate=ok.schedules.Cosine(1.0, 6)
            ),
            ValueError,
            "learning_rate is given twice",
        ),
        (lambda: Lookahead("AdamX"), ValueError, r"got 'AdamX'\. Did you mean 'Adam'\?"),
        (lambda: Lookahead(keras.optimizers.SGD()), TypeError, "optimizer of keras_optkit, its name or its config"),
        (lambda: Lookahead({"config": {}}), TypeError, "its config"),
        (lambda: Lookahead("ScheduleFreeSGD"), ValueError, "without an average of its own"),
        (lambda: ScheduleFree(Lookahead("SGD")), ValueError, "without an average of its own"),
        (lambda: ScheduleFree(ok.optimizers.SGD(use_ema=True)), ValueError, "use_ema must be False"),
        (lambda: Lookahead("SGD", sync_period=0), ValueError, "sync_period"),
        (lambda: Lookahead("SGD", slow_step_size=0.0), ValueError, r"slow_step_size.*\(0, 1\]"),
        (lambda: ScheduleFreeSGD(momentum=1.0), ValueError, r"momentum.*\(0, 1\)"),
        (lambda: ScheduleFreeAdamW(beta_1=ok.schedules.Linear(0.5, 3)), TypeError, "beta_1"),
        (lambda: ScheduleFreeSGD(warmup_steps=-1), ValueError, "warmup_steps"),
        (lambda: ScheduleFreeSGD(r=-1.0), ValueError, "r must be"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_optimizer_that_has_been_used_is_refused():
    inner = ok.optimizers.SGD()
    inner.build(problems.variables(START))
    with pytest.raises(ValueError, match="fresh optimizer, got 'sgd"):
        Lookahead(inner)


@pytest.mark.each_once
@pytest.mark.parametrize("outer", [Lookahead, ScheduleFree])
@pytest.mark.parametrize(
    "inner",
    [
        "adam",
        "keras_optkit>Adam",
        {"class_name": "Adam", "config": {"beta_1": 0.7}},
        lambda: ok.optimizers.Adam(ok.schedules.Cosine(0.1, 9), beta_2=ok.schedules.Linear(0.5, 9, final=0.9)),
    ],
    ids=["name", "registered name", "config", "schedules inside"],
)
def test_config_holds_the_inner_optimizer(outer, inner):
    optimizer = outer(inner() if callable(inner) else inner)
    written = json.dumps(keras.optimizers.serialize(optimizer))
    again = keras.optimizers.deserialize(json.loads(written))
    assert json.dumps(keras.optimizers.serialize(again)) == written
    assert again.inner["registered_name"] == "keras_optkit>Adam"
    a, b = (problems.train(o, GRADS[:6], values=START, mode="graph") for o in (optimizer, again))
    same(a[-1], b[-1])


def test_present_values_are_what_is_saved():
    optimizer = Lookahead(ok.optimizers.SGD(0.1, momentum=0.9))
    optimizer.learning_rate = 0.02
    optimizer.inner_rule = ok.optimizers.SGD(momentum=0.5).rule
    again = Lookahead.from_config(optimizer.get_config())
    assert float(again.learning_rate) == 0.02
    assert again.inner_rule.momentum == 0.5


@pytest.mark.parametrize("make", [lambda: Lookahead("SGD", 3, learning_rate=0.1), lambda: ScheduleFreeSGD(0.1)])
def test_weights_that_are_set_between_build_and_the_first_update_are_the_start(make):
    optimizer, weights = make(), problems.variables([np.ones_like(p) for p in START])
    optimizer.build(weights)
    for weight, value in zip(weights, START, strict=True):
        weight.assign(value)
    for arrays in GRADS[:4]:
        optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
    same(values(weights), problems.train(make(), GRADS[:4], values=START)[-1])


# -- AveragedWeights --------------------------------------------------------------------------------------------------

X, Y = problems.regression()
OPTIMIZERS = {
    "ema": lambda: ok.optimizers.AdamW(0.02, use_ema=True, ema_momentum=0.8),
    "lookahead": lambda: Lookahead(ok.optimizers.SGD(0.05, momentum=0.9), 3),
    "schedule-free sgd": lambda: ScheduleFreeSGD(0.2, warmup_steps=5),
    "schedule-free adamw": lambda: ScheduleFreeAdamW(0.02, global_clipnorm=1.0),
    "keras": lambda: keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True, ema_momentum=0.8),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(ScheduleFreeAdamW(0.02), initial_scale=8.0),
    "loss scale keras": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.8), initial_scale=8.0
    ),
}
#: One of each kind of average, our own EMA, a rule's, Keras's, and one inside of another optimizer.
KINDS = ["ema", "schedule-free sgd", "keras", "loss scale"]
every_optimizer = pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=[] if name in KINDS else pytest.mark.long) for name, make in OPTIMIZERS.items()],
)
each_kind = pytest.mark.parametrize("make", [OPTIMIZERS[name] for name in KINDS], ids=KINDS)


def compiled(make=OPTIMIZERS["ema"], **arguments):
    model = problems.network()
    model.compile(make(), loss="mse", **arguments)
    return model


def fit(model, *callbacks, epochs=3, **arguments):
    arguments = {"validation_data": (X[:20], Y[:20]), "batch_size": 16, "shuffle": False} | arguments
    return model.fit(X, Y, epochs=epochs, verbose=0, callbacks=list(callbacks), **arguments)


def everything(model):
    """All that training goes on from."""
    metrics = {id(v) for v in model.metrics_variables}
    return values([v for v in [*model.variables, *model.optimizer.variables] if id(v) not in metrics])


class Probe(keras.callbacks.Callback):
    """Notes the weights at the named moments, or what a function of the model returns."""

    def __init__(self, *moments, look=lambda model: values(model.trainable_variables)):
        super().__init__()
        self.seen = {moment: [] for moment in moments}
        for moment in moments:
            setattr(self, moment, lambda *_, m=moment, **__: self.seen[m].append(look(self.model)))


@functools.cache
def without(make, epochs=3, **arguments):
    """A model that was trained without the callback; not to be changed."""
    model = compiled(make)
    fit(model, epochs=epochs, **arguments)
    return model


@pytest.mark.few(1)
@every_optimizer
def test_averaged_weights_are_shown_where_training_is_judged_and_nowhere_else(make):
    plain, hidden = compiled(make), Probe("on_epoch_begin", "on_train_batch_end")
    fit(plain, hidden)
    expected = [values(without(make, epochs).trainable_variables) for epochs in (1, 2, 3)]
    first, last = (Probe("on_epoch_end", "on_test_batch_end", "on_train_batch_end", "on_epoch_begin") for _ in range(2))
    model = compiled(make)
    fit(model, first, AveragedWeights(), last)
    for probe in (first, last):
        for shown, average in zip(probe.seen["on_epoch_end"], expected, strict=True):
            same(shown, average)
        for i, shown in enumerate(probe.seen["on_test_batch_end"]):
            same(shown, expected[i // 2])
        for moment in ("on_train_batch_end", "on_epoch_begin"):
            for got, raw in zip(probe.seen[moment], hidden.seen[moment], strict=True):
                same(got, raw, moment)
    same(everything(model), everything(plain))
    assert any(np.any(a != b) for a, b in zip(expected[0], hidden.seen["on_train_batch_end"][3], strict=True))


@pytest.mark.long
@each_kind
def test_validation_measures_what_the_checkpoint_holds(make, tmp_path):
    model, path = compiled(make), str(tmp_path / "{epoch}.keras")
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    history = fit(model, checkpoint, AveragedWeights()).history["val_loss"]
    for epoch, measured in enumerate(history, 1):
        loaded = keras.models.load_model(path.format(epoch=epoch))
        assert loaded.evaluate(X[:20], Y[:20], verbose=0) == pytest.approx(measured, rel=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize(("save_freq", "place"), [("epoch", 0), ("epoch", 1), (3, 1)])
@each_kind
def test_checkpoints_hold_the_averaged_weights_wherever_they_are_made(make, save_freq, place, tmp_path):
    seen = []

    class Saved(keras.callbacks.ModelCheckpoint):
        def _save_model(self, *args, **kwargs):
            seen.append(int(self.model.optimizer.iterations))
            super()._save_model(*args, **kwargs)

    path = tmp_path / "{epoch}-{batch}.weights.h5" if save_freq == 3 else tmp_path / "{epoch}.weights.h5"
    checkpoint = Saved(str(path), save_freq=save_freq, save_weights_only=True)
    callbacks = [AveragedWeights()]
    callbacks.insert(place, checkpoint)
    model = compiled(make)
    fit(model, *callbacks, epochs=2)
    same(everything(model), everything(without(make, 2)))
    files = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == len(seen)
    for file, updates in zip(files, seen, strict=True):
        epochs, rest = divmod(updates, 4)
        if (
            rest
        ):  # fit ends with the averaged weights; the rest of an epoch is trained on from there where both are kept
            if not isinstance(make(), ok.optimizers.Optimizer):
                continue
            stopped = compiled(make)
            if epochs:
                fit(stopped, epochs=epochs)
            fit(stopped, epochs=1, steps_per_epoch=rest)
        else:
            stopped = without(make, epochs)
        loaded = compiled(make)
        loaded.optimizer.build(loaded.trainable_variables)  # Keras's own refuse to be loaded otherwise
        loaded.load_weights(file)
        close(values(loaded.trainable_variables), values(stopped.trainable_variables), 1e-6, file.name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "keras" not in name])
def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(name, tmp_path):
    make = OPTIMIZERS[name]
    model, path = compiled(make), str(tmp_path / "{epoch}.keras")
    fit(model, AveragedWeights(), keras.callbacks.ModelCheckpoint(path))
    loaded = keras.models.load_model(path.format(epoch=1))
    fit(loaded, epochs=2)
    close(values(loaded.trainable_variables), values(model.trainable_variables), 1e-5)


class Judge(keras.callbacks.Callback):
    """Evaluates, predicts and saves in the middle of an epoch."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.found = Path(folder), []

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            self.model.save_weights(self.folder / "now.weights.h5")
            self.model.save(self.folder / "now.keras")
            self.found.append(
                (
                    self.model.evaluate(X, Y, verbose=0),
                    float(self.model.test_on_batch(X, Y)),
                    self.model.predict(X, verbose=0),
                    self.model.predict_on_batch(X),
                    keras.models.load_model(self.folder / "now.keras").predict(X, verbose=0),
                )
            )


@pytest.mark.long
@each_kind
def test_other_callbacks_judge_the_averaged_weights_and_leave_no_trace(make, tmp_path):
    model, judge = compiled(make), Judge(tmp_path)
    fit(model, judge, AveragedWeights())
    same(everything(model), everything(without(make)))
    for evaluated, tested, predicted, batch, saved in judge.found:
        assert evaluated == pytest.approx(tested, rel=1e-5)
        assert evaluated == pytest.approx(np.mean((predicted - Y) ** 2), rel=1e-5)
        np.testing.assert_allclose(batch, predicted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(saved, predicted, rtol=1e-5, atol=1e-6)
    undisturbed = compiled(make)
    raw = Probe("on_train_batch_end", look=lambda model: model(X).numpy())
    fit(undisturbed, raw)
    assert np.abs(raw.seen["on_train_batch_end"][1] - judge.found[0][2]).max() > 1e-4


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["ema", "schedule-free adamw", "keras", "loss scale"])
def test_passed_to_evaluate_and_predict_it_acts_for_that_call(name):
    make = OPTIMIZERS[name]
    model = compiled(make)
    for i in range(4):
        model.train_on_batch(X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16])
    before = everything(model)
    raw = model.evaluate(X, Y, verbose=0)
    averaged = model.evaluate(X, Y, verbose=0, callbacks=[AveragedWeights()])
    predicted = model.predict(X, verbose=0, callbacks=[AveragedWeights()])
    same(everything(model), before)
    assert averaged == pytest.approx(np.mean((predicted - Y) ** 2), rel=1e-5)
    assert averaged != pytest.approx(raw, rel=1e-3)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(averaged, rel=1e-6)


# -- exceptions -------------------------------------------------------------------------------------------------------


class Fails(keras.callbacks.Callback):
    """Raises at one moment, when it comes for the n-th time."""

    def __init__(self, moment, n, error):
        super().__init__()
        self.calls = itertools.count(1)
        setattr(self, moment, lambda *_, **__: self._count(n, error))

    def _count(self, n, error):
        if next(self.calls) == n:
            raise error


HOOKED = ("evaluate", "predict", "save", "save_weights", "export", "test_on_batch", "predict_on_batch")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("moment", "n", "error"),
    [
        ("on_train_batch_end", 6, RuntimeError("boom")),
        ("on_test_batch_end", 2, KeyboardInterrupt()),
        ("on_test_begin", 2, SystemExit(3)),
        ("on_test_end", 2, RuntimeError("boom")),
        ("on_epoch_end", 2, KeyboardInterrupt()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
@pytest.mark.parametrize("name", ["ema", "schedule-free sgd", "keras", "loss scale"])
def test_after_an_exception_training_goes_on_bitwise(name, moment, n, error):
    make = OPTIMIZERS[name]
    model, plain = compiled(make), compiled(make)
    for trained, averaged in ((model, [AveragedWeights()]), (plain, [])):
        with pytest.raises(type(error)):
            fit(trained, Fails(moment, n, error), *averaged)
    same(everything(model), everything(plain), "after the exception")
    assert not set(vars(model)) & set(HOOKED)
    for trained, averaged in ((model, [AveragedWeights()]), (plain, [])):
        fit(trained, *averaged, epochs=2)
    same(everything(model), everything(plain), "after going on")


@pytest.mark.long
@pytest.mark.parametrize("name", ["ema", "schedule-free sgd", "keras"])
def test_an_exception_that_a_callback_catches_leaves_the_weights_of_training(name):
    make = OPTIMIZERS[name]

    class Careful(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            for method, moment in (("evaluate", "on_test_begin"), ("predict", "on_predict_batch_end")):
                arguments = (X, Y) if method == "evaluate" else (X,)
                try:
                    failing = [Fails(moment, 1, KeyboardInterrupt())]
                    getattr(self.model, method)(*arguments, verbose=0, callbacks=failing)
                except KeyboardInterrupt:
                    pass

    model = compiled(make)
    fit(model, Careful(), AveragedWeights())
    same(everything(model), everything(without(make)))


@pytest.mark.long
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "^C"])
@pytest.mark.parametrize("method", ["evaluate", "predict"])
@pytest.mark.parametrize("name", ["ema", "schedule-free sgd", "keras"])
def test_exceptions_in_a_single_evaluation(name, method, error):
    model = compiled(OPTIMIZERS[name])
    model.train_on_batch(X, Y)
    model.train_on_batch(X, Y)
    before = everything(model)
    moment = "on_test_batch_end" if method == "evaluate" else "on_predict_batch_end"
    arguments = (X, Y) if method == "evaluate" else (X,)
    averaged = AveragedWeights()
    seen = Probe(moment)
    with pytest.raises(type(error)):
        getattr(model, method)(*arguments, verbose=0, callbacks=[averaged, seen, Fails(moment, 1, error)])
    assert any(np.any(a != b) for a, b in zip(seen.seen[moment][0], values(model.trainable_variables), strict=True))
    same(everything(model), before)
    fit(model, averaged, epochs=1)


# -- together with other callbacks ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("place", [0, 1])
@each_kind
def test_backup_and_restore_goes_on_bitwise(make, place, tmp_path):
    """It is given the weights of training, both ways: a Schedule-Free run from the others would be off by rounding."""
    whole = without(make, 4)

    def with_backup(model, *more):
        callbacks = [AveragedWeights()]
        backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
        callbacks.insert(place, backup)
        fit(model, *callbacks, *more, epochs=4)

    with pytest.raises(RuntimeError):
        with_backup(compiled(make), Fails("on_train_batch_end", 10, RuntimeError("power cut")))
    resumed = compiled(make)
    with_backup(resumed)
    close(everything(resumed), everything(whole), 1e-7 if "keras" in type(whole.optimizer).__module__ else 0.0)


@pytest.mark.few(1)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", ["ema", "keras"])
def test_a_rate_that_is_lowered_meanwhile_stays(name, place):
    callbacks = [AveragedWeights()]
    callbacks.insert(place, keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e6))
    model = compiled(OPTIMIZERS[name])
    rates = [float(r) for r in fit(model, *callbacks, epochs=4).history["learning_rate"]]
    start = rates[0]
    np.testing.assert_allclose(rates, [start, start, start / 2, start / 4], rtol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("stopping", [keras.callbacks.EarlyStopping, ok.callbacks.EarlyStopping], ids=["keras", "ours"])
@each_kind
def test_early_stopping_restores_the_averaged_weights_it_has_measured(make, stopping, place):
    callbacks = [AveragedWeights()]
    callbacks.insert(place, stopping("val_loss", patience=2, restore_best_weights=True, mode="max"))
    model = compiled(make)
    history = fit(model, *callbacks, epochs=6).history["val_loss"]
    assert len(history) < 6
    assert model.evaluate(X[:20], Y[:20], verbose=0) == pytest.approx(max(history), rel=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["ema", "lookahead", "schedule-free sgd"])
def test_weights_that_a_callback_sets_meanwhile_stay(name):
    class Sets(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                self.model.set_weights([np.full_like(w, 0.25) for w in self.model.get_weights()])

    model = compiled(OPTIMIZERS[name])
    fit(model, Sets(), AveragedWeights())
    for weight in model.trainable_variables:
        np.testing.assert_array_equal(weight, np.full(weight.shape, 0.25))


def test_a_callback_that_owns_its_methods_gets_them_back():
    calls = []
    mine = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, _: calls.append(epoch))
    method = mine.on_epoch_end
    fit(compiled(), mine, AveragedWeights(), epochs=2)
    assert calls == [0, 1]
    assert mine.on_epoch_end is method


@pytest.mark.long
def test_a_callback_list_and_a_single_callback_will_do():
    for callbacks in (AveragedWeights(), keras.callbacks.CallbackList([AveragedWeights()], add_history=True)):
        model = compiled()
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.set_model(model)
        model.fit(
            X,
            Y,
            validation_data=(X[:20], Y[:20]),
            batch_size=16,
            shuffle=False,
            epochs=3,
            verbose=0,
            callbacks=callbacks,
        )
        same(everything(model), everything(without(OPTIMIZERS["ema"])))


@pytest.mark.long
def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    model, plain = compiled(OPTIMIZERS["schedule-free adamw"]), compiled(OPTIMIZERS["schedule-free adamw"])
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    fit(model, AveragedWeights())
    fit(plain)
    same(everything(model), everything(plain))


@pytest.mark.long
def test_replicas():
    def run(*callbacks):
        with problems.two_replicas().scope():
            model = compiled(OPTIMIZERS["lookahead"])
        history = fit(model, *callbacks, epochs=2)
        return history.history["val_loss"], everything(model)

    losses, weights = run(AveragedWeights())
    raw_losses, plain = run()
    close(weights, plain, 1e-6)
    assert losses[0] != pytest.approx(raw_losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "make", [lambda: ok.optimizers.AdamW(), lambda: keras.optimizers.Adam(), lambda: OPTIMIZERS["loss scale"]]
)
def test_an_optimizer_without_an_average_is_refused(make):
    optimizer = make()
    if callable(optimizer) and not isinstance(optimizer, keras.optimizers.Optimizer):
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    model = compiled(lambda: optimizer)
    with pytest.raises(ValueError, match=r"needs an optimizer that averages weights, got <.*use_ema=True"):
        fit(model, AveragedWeights())
    with pytest.raises(ValueError, match="needs an optimizer that averages weights"):
        model.evaluate(X, Y, verbose=0, callbacks=[AveragedWeights()])
    assert not set(vars(model)) & set(HOOKED)


# -- with batch normalisation -----------------------------------------------------------------------------------------


def statistics(model):
    return values(v for v in model.variables if "moving" in v.path)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["ema", "schedule-free sgd", "keras"])
def test_batch_normalisation_fits_the_averaged_weights_while_they_are_shown(name):
    make = OPTIMIZERS[name]
    plain, hidden = compiled(make), Probe("on_epoch_begin", look=statistics)
    fit(plain, hidden)
    model = compiled(make)
    begin, shown = Probe("on_epoch_begin", look=statistics), Probe("on_epoch_end", look=statistics)
    weights = Probe("on_epoch_end")
    history = fit(model, begin, shown, weights, AveragedWeights(batch_norm_data=X)).history["val_loss"]
    for got, expected in zip(begin.seen["on_epoch_begin"], hidden.seen["on_epoch_begin"], strict=True):
        same(got, expected)
    same(values(model.trainable_variables), values(plain.trainable_variables))
    fresh = compiled(make)
    for epoch, trained in enumerate(weights.seen["on_epoch_end"]):
        for variable, value in zip(fresh.trainable_variables, trained, strict=True):
            variable.assign(value)
        ok.recalibrate_batch_norm(fresh, X, batch_size=16, verbose=0)
        close(shown.seen["on_epoch_end"][epoch], statistics(fresh), 1e-6)
        assert fresh.evaluate(X[:20], Y[:20], verbose=0) == pytest.approx(history[epoch], rel=1e-5)
    close(statistics(model), statistics(fresh), 1e-6)  # and so fit ends
    assert np.abs(statistics(model)[0] - statistics(plain)[0]).max() > 1e-3


@pytest.mark.long
def test_one_pass_for_each_state_that_is_looked_at():
    passes = []

    class Counted(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            passes.append(index)
            return X[16 * index : 16 * index + 16], Y[16 * index : 16 * index + 16]

    fit(compiled(), AveragedWeights(batch_norm_data=Counted()))
    assert passes.count(3) == 3 + 1  # Keras looks at the first batches more than once


@pytest.mark.long
def test_batch_norm_data_that_fail_leave_everything_as_it_was():
    model, plain = compiled(), compiled()
    bad = np.full_like(X, np.nan)
    with pytest.raises(ValueError, match="not finite"):
        fit(model, AveragedWeights(batch_norm_data=bad))
    fit(plain, epochs=1)
    plain.optimizer.swap_weights(evaluating=False)
    same(everything(model), everything(plain))


def test_batch_norm_data_without_batch_normalisation_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(OPTIMIZERS["ema"](), loss="mse")
    with pytest.raises(ValueError, match=r"batch_norm_data must be None.*no batch normalisation"):
        fit(model, AveragedWeights(batch_norm_data=X))


# -- recalibrate_batch_norm -------------------------------------------------------------------------------------------

DATA = np.random.default_rng(5).normal(2.0, 3.0, size=(70, 4)).astype("float32")


def two_norms(**second):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.BatchNormalization(name="one"),
            keras.layers.Dense(3, activation="tanh"),
            keras.layers.BatchNormalization(name="two", **second),
            keras.layers.Dense(1),
        ]
    )


def mean_of_batches(x, size):
    parts = [x[i : i + size] for i in range(0, len(x), size)]
    share = np.array([len(part) for part in parts]) / len(x)
    axes = tuple(range(x.ndim - 1))
    return [sum(s * f(part, axis=axes) for s, part in zip(share, parts, strict=True)) for f in (np.mean, np.var)]


def test_recalibration_is_torchs_update_bn():
    """With batches of one size; torch averages unbiased variances, larger by n/(n-1)."""
    x, n = DATA[:64], 16
    model = two_norms()
    mean, variance, second_mean, second_variance = in_torch(recalibrated, values(model.trainable_variables), x, n)
    assert ok.recalibrate_batch_norm(model, x, batch_size=n, verbose=0) == 2
    for layer, expected in ((0, (mean, variance)), (2, (second_mean, second_variance))):
        close((model.layers[layer].moving_mean, model.layers[layer].moving_variance), expected, 1e-5)


def test_recalibration_is_exact_with_a_smaller_last_batch():
    model = two_norms()
    ok.recalibrate_batch_norm(model, DATA, batch_size=32, verbose=0)
    mean, variance = mean_of_batches(DATA.astype("float64"), 32)
    np.testing.assert_allclose(model.layers[0].moving_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(model.layers[0].moving_variance, variance, rtol=1e-5)
    assert not np.allclose(variance, np.mean([DATA[i : i + 32].var(0) for i in (0, 32, 64)], axis=0), rtol=1e-3)


def test_recalibration_is_one_pass_of_training_in_slow_motion():
    """A training step on each batch with rate 0 and momentum 1 - 1/i gives the same mean of equal batches."""
    model, trained = two_norms(), two_norms()
    ok.recalibrate_batch_norm(model, DATA[:64], batch_size=16, verbose=0)
    for i in range(4):
        for name in ("one", "two"):
            trained.get_layer(name).momentum = 1 - 1 / (i + 1)
        trained(DATA[16 * i : 16 * i + 16], training=True)
    close(statistics(model), statistics(trained), 1e-6)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return DATA[32 * index : 32 * index + 32], np.zeros(len(DATA[32 * index : 32 * index + 32]))


def generator():
    for i in range(3):
        yield DATA[32 * i : 32 * i + 32], np.zeros(len(DATA[32 * i : 32 * i + 32]))


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (lambda: DATA, {"batch_size": 32}),
        (lambda: DATA, {}),
        (lambda: tf.data.Dataset.from_tensor_slices((DATA, np.zeros(70))).batch(32), {}),
        (lambda: tf.data.Dataset.from_tensor_slices(DATA).batch(32).repeat(), {"steps": 3}),
        (Batches, {}),
        (generator, {}),
    ],
    ids=["array", "default batch size", "dataset", "endless dataset", "PyDataset", "generator"],
)
def test_recalibration_takes_what_predict_takes(data, arguments):
    model = two_norms()
    assert ok.recalibrate_batch_norm(model, data(), verbose=0, **arguments) == 2
    mean, variance = mean_of_batches(DATA, 32)
    np.testing.assert_allclose(model.layers[0].moving_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(model.layers[0].moving_variance, variance, rtol=1e-5)


def test_recalibration_leaves_everything_else():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dropout(0.5),
            keras.layers.SpectralNormalization(keras.layers.Dense(4)),
            keras.layers.BatchNormalization(momentum=0.7),
            keras.layers.Dense(1),
        ]
    )
    model.compile(ok.optimizers.Adam(), loss="mse", metrics=["mae"])
    model.fit(DATA, DATA[:, :1], verbose=0)
    norm = model.layers[2]
    moving = {id(norm.moving_mean), id(norm.moving_variance)}
    others = [v for v in [*model.variables, *model.optimizer.variables] if id(v) not in moving]
    before, names = values(others), [v.path for v in model.variables]
    held = dict(vars(norm))
    ok.recalibrate_batch_norm(model, DATA, verbose=0)
    same(values(others), before)
    assert [v.path for v in model.variables] == names
    assert norm.momentum == 0.7
    assert vars(norm).keys() == held.keys()
    # training goes on: the step is as compiled as it was
    model.fit(DATA, DATA[:, :1], verbose=0)


def test_recalibration_forgets_the_old_statistics():
    model, fresh = two_norms(), two_norms()
    for value in (1e30, np.nan, np.inf):
        for name in ("one", "two"):
            model.get_layer(name).moving_mean.assign(np.full_like(model.get_layer(name).moving_mean, value))
            model.get_layer(name).moving_variance.assign(np.full_like(model.get_layer(name).moving_mean, value))
        for which in (model, fresh):
            ok.recalibrate_batch_norm(which, DATA, verbose=0)
        same(statistics(model), statistics(fresh))


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()], ids=["error", "^C"])
def test_recalibration_that_fails_leaves_the_model_as_it_was(error):
    class Broken(Batches):
        def __getitem__(self, index):
            if index == 2:
                raise error
            return super().__getitem__(index)

    model = two_norms()
    model.layers[0].moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    before = values(model.variables)
    with pytest.raises(tf.errors.UnknownError, match=type(error).__name__):  # what TensorFlow makes of it
        ok.recalibrate_batch_norm(model, Broken(), verbose=0)
    same(values(model.variables), before)
    assert model.layers[0].momentum == 0.99
    assert "call" not in vars(model.layers[0])


def test_recalibration_at_any_depth_and_of_ghost_batches():
    ghost = ok.layers.GhostBatchNormalization(ghost_batch_size=8, momentum=0.9)
    block = keras.Sequential([keras.layers.Dense(5), ghost])
    wrapped = keras.layers.TimeDistributed(keras.layers.BatchNormalization())
    inputs = keras.Input((3, 4))
    model = keras.Model(inputs, block(keras.layers.Flatten()(wrapped(inputs))))
    x = np.random.default_rng(0).normal(size=(48, 3, 4)).astype("float32")
    assert ok.recalibrate_batch_norm(model, x, batch_size=24, verbose=0) == 2
    hidden = keras.Model(inputs, model.layers[2].output)
    trained = np.concatenate([hidden(x[i : i + 24], training=True).numpy() for i in (0, 24)])
    dense = trained @ block.layers[0].kernel.numpy() + block.layers[0].bias.numpy()
    mean, variance = mean_of_batches(dense, 8)
    np.testing.assert_allclose(ghost.moving_mean, mean, atol=1e-5)
    np.testing.assert_allclose(ghost.moving_variance, variance, rtol=1e-4)


def test_recalibration_counts_values_not_masked_and_calls_of_shared_layers():
    norm = keras.layers.BatchNormalization()
    inputs, mask = keras.Input((3, 2)), keras.Input((3,), dtype="bool")
    model = keras.Model([inputs, mask], norm(inputs, mask=mask))
    x = np.random.default_rng(0).normal(size=(8, 3, 2)).astype("float32")
    m = np.random.default_rng(1).random((8, 3)) < 0.6
    m[4:6, 1:] = False
    ok.recalibrate_batch_norm(model, [x, m], batch_size=4, verbose=0)
    kept = [x[i : i + 4][m[i : i + 4]] for i in (0, 4)]
    share = np.array([len(k) for k in kept]) / m.sum()
    expected = sum(s * k.mean(0) for s, k in zip(share, kept, strict=True))
    np.testing.assert_allclose(norm.moving_mean, expected, rtol=1e-4, atol=1e-6)

    shared = keras.layers.BatchNormalization()
    a, b = keras.Input((2,)), keras.Input((3, 2))
    model = keras.Model([a, b], [shared(a), keras.layers.TimeDistributed(shared)(b)])
    flat = x[:, 0]
    ok.recalibrate_batch_norm(model, [flat, x], batch_size=8, verbose=0)
    np.testing.assert_allclose(shared.moving_mean, (flat.sum(0) + x.sum((0, 1))) / (8 + 24), rtol=1e-4, atol=1e-6)


def test_recalibration_leaves_layers_that_training_would_leave():
    model = two_norms()
    model.layers[0].trainable = False
    before = values(model.layers[0].variables)
    assert ok.recalibrate_batch_norm(model, DATA, verbose=0) == 1
    same(values(model.layers[0].variables), before)
    assert np.abs(model.layers[2].moving_mean.numpy()).max() > 1e-3

    class Tuned(keras.Model):
        def __init__(self):
            super().__init__()
            self.body = two_norms()

        def call(self, x, training=False):
            return self.body(x, training=False)

    tuned = Tuned()
    tuned(DATA)
    before = values(tuned.variables)
    assert ok.recalibrate_batch_norm(tuned, DATA, verbose=0) == 0
    same(values(tuned.variables), before)


def test_recalibration_of_renormalisation_goes_on_from_the_new_statistics():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(renorm=True, momentum=0.9)])
    layer = model.layers[0]
    before = values([layer.renorm_mean, layer.renorm_stddev])
    ok.recalibrate_batch_norm(model, DATA[:64], batch_size=32, verbose=0)
    same(values([layer.renorm_mean, layer.renorm_stddev]), before)
    variance = layer.moving_variance.numpy()
    np.testing.assert_allclose(variance, mean_of_batches(DATA[:64], 32)[1], rtol=1e-4)
    np.testing.assert_allclose(layer.moving_stddev, np.sqrt(variance + layer.epsilon), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ok.recalibrate_batch_norm("model", DATA), TypeError, "model must be a keras.Model, got 'model'"),
        (
            lambda: ok.recalibrate_batch_norm(keras.Sequential([keras.layers.BatchNormalization()]), DATA),
            ValueError,
            "model must be built",
        ),
        (lambda: ok.recalibrate_batch_norm(two_norms(), DATA[:0], verbose=0), ValueError, "at least one batch"),
        (lambda: ok.recalibrate_batch_norm(two_norms(), DATA * np.nan, verbose=0), ValueError, "one' that are not"),
        (lambda: ok.recalibrate_batch_norm(two_norms(), DATA, batch_size=0), ValueError, "batch_size"),
        (lambda: ok.recalibrate_batch_norm(two_norms(), DATA, steps=0.5), TypeError, "steps"),
    ],
)
def test_recalibration_says_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_recalibration_without_batch_normalisation_does_nothing():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    assert ok.recalibrate_batch_norm(model, generator(), verbose=0) == 0


def test_recalibration_shows_its_progress(capsys):
    ok.recalibrate_batch_norm(two_norms(), DATA)
    assert "3/3" in capsys.readouterr().out
    ok.recalibrate_batch_norm(two_norms(), DATA, verbose=0)
    assert capsys.readouterr().out == ""
