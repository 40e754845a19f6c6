"""ValidateEvery: the values of a loop by hand, training as it is without, and callbacks that go by the validations."""

import keras
import numpy as np
import pytest
from keras import ops
from small import fit, interrupted, linear_model, regression

import keras_optkit as ok
from keras_optkit.callbacks import AveragedWeights, Checkpoint, EarlyStopping, ReduceLROnPlateau, Resume, ValidateEvery

X, Y = regression(dtype="float32")
VX, VY = regression(10, seed=1, dtype="float32")


def model_with(optimizer=None, **arguments):
    return linear_model(optimizer or ok.optimizers.SGD(0.05), dtype="float32", metrics=["mae"], **arguments)


def by_hand(every, epochs=2, batch_size=4, optimizer=None):
    """Updates, and what `evaluate` gives after them."""
    model, found = model_with(optimizer), []
    for update, i in enumerate(list(range(0, len(X), batch_size)) * epochs, 1):
        model.train_on_batch(X[i : i + batch_size], Y[i : i + batch_size])
        if update % every == 0:
            found.append((update, *model.evaluate(VX, VY, verbose=0)))
    return found


class Seen(keras.callbacks.Callback):
    """What a callback is told."""

    stateless = True

    def __init__(self):
        super().__init__()
        self.begun, self.ended = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.begun.append(epoch)

    def on_epoch_end(self, epoch, logs=None):
        self.ended.append((epoch, dict(logs)))


@pytest.mark.few(1)
@pytest.mark.parametrize("every", [4, 6])
def test_the_values_are_those_of_a_loop_by_hand_and_training_is_as_without(every):
    """Every 4 of 6 batches, in the middle of an epoch and at its end; every 6, at the end of each."""
    seen = Seen()
    validate = ValidateEvery(every, (VX, VY), callbacks=[seen])
    model, plain = model_with(), model_with()
    history = fit(model, X, Y, validate).history
    updates, losses, errors = zip(*by_hand(every), strict=True)
    assert validate.history["updates"] == list(updates)
    np.testing.assert_allclose(validate.history["val_loss"], losses, rtol=1e-6)
    np.testing.assert_allclose(validate.history["val_mae"], errors, rtol=1e-6)
    assert [logs["val_loss"] for _, logs in seen.ended] == validate.history["val_loss"]
    assert [number for number, _ in seen.ended] == list(range(len(updates)))
    assert seen.begun == list(range(len(updates) + 1))
    expected = fit(plain, X, Y).history
    assert (history["loss"], history["mae"]) == (expected["loss"], expected["mae"])
    np.testing.assert_array_equal(model.get_weights()[0], plain.get_weights()[0])


def test_the_logs_of_an_epoch_have_its_last_validation_unless_fit_validates_itself():
    validate = ValidateEvery(4, (VX, VY))  # after 4, 8 and 12 updates, of which an epoch makes 6
    rare = ValidateEvery(12, (X, Y), prefix="train_")
    history = fit(model_with(), X, Y, validate, rare).history
    assert history["val_loss"] == [validate.history["val_loss"][0], validate.history["val_loss"][2]]
    assert history["train_mae"] == rare.history["train_mae"]  # none in the first epoch
    own = fit(model_with(), X, Y, validate, validation_data=(X, Y)).history["val_loss"]
    assert own == fit(model_with(), X, Y, validation_data=(X, Y)).history["val_loss"]
    assert own != history["val_loss"]


@pytest.mark.once
def test_training_stops_in_the_middle_of_an_epoch_with_the_best_weights():
    stopping = EarlyStopping("val_loss", patience=2, min_delta=1e9, restore_best_weights=True)
    short = ValidateEvery(1, (VX, VY), callbacks=[stopping])
    fit(model_with(), X, Y, short, epochs=5)
    assert short.history["updates"] == [1, 2, 3]  # and not once more at the end of the epoch
    validate = ValidateEvery(2, (VX, VY), callbacks=[stopping])
    model = model_with()
    history = fit(model, X, Y, validate, epochs=5)
    assert len(history.epoch) == 1
    assert validate.history["updates"] == [2, 4, 6]  # the first is the best, and two are not better by so much
    assert stopping.stop_reason.startswith("val_loss was")
    assert (stopping.best_epoch, stopping.wait) == (0, 2)
    np.testing.assert_allclose(model.evaluate(VX, VY, verbose=0)[0], validate.history["val_loss"][0], rtol=1e-6)


@pytest.mark.once
def test_rates_and_files_go_by_validations(tmp_path):
    plateau = ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=1e9)
    stock = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True)
    checkpoint = Checkpoint(tmp_path / "best", "val_loss", top_k=1, last_n=2, every=6)
    model = model_with()
    validate = ValidateEvery(3, (VX, VY), callbacks=[plateau, checkpoint, stock])
    fit(model, X, Y, validate)
    assert validate.history["updates"] == [3, 6, 9, 12]
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.05 / 8)
    best = int(np.argmin(validate.history["val_loss"]))
    assert checkpoint.best.name.startswith(f"epoch={best + 1:04d}-update={3 * (best + 1):06d}-val_loss=")
    assert {path.name[:24] for path in (tmp_path / "best").glob("*.keras")} >= {
        "epoch=0002-update=000006",
        "epoch=0004-update=000012",
    }
    assert sorted(path.name for path in tmp_path.glob("*.weights.h5")) == [f"{i}.weights.h5" for i in (1, 2, 3, 4)]


def test_what_goes_by_the_losses_of_batches_does_not_see_it():
    rates = []
    for more in ([], [ValidateEvery(1, (VX, VY))]):
        plateau = ReduceLROnPlateau("loss", unit="update", factor=0.5, patience=2, min_delta=0.2, smoothing=0.5)
        model = model_with()
        fit(model, X, Y, plateau, *more)
        rates.append((plateau.best, float(ops.convert_to_numpy(model.optimizer.learning_rate))))
    assert rates[0] == rates[1]
    assert rates[0][1] < 0.05


def test_updates_count_and_not_micro_batches():
    validate = ValidateEvery(2, (VX, VY))
    fit(model_with(ok.optimizers.SGD(0.05, gradient_accumulation_steps=2)), X, Y, validate)
    assert validate.history["updates"] == [2, 4, 6]
    several = ValidateEvery(2, (VX, VY))
    fit(model_with(steps_per_execution=3), X, Y, several)
    assert several.history["updates"] == [3, 6, 9, 12]


def test_averaged_weights_are_what_is_evaluated_and_seen():
    def model():
        return model_with(ok.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5))

    by_hand = model()
    for i in range(0, 20, 4):
        by_hand.train_on_batch(X[i : i + 4], Y[i : i + 4])
    training = by_hand.evaluate(VX, VY, verbose=0)[0]
    by_hand.optimizer.finalize_variable_values(by_hand.trainable_weights)
    stopping = EarlyStopping("val_loss", patience=9, restore_best_weights=True)
    validate, fitted = ValidateEvery(5, (VX, VY), callbacks=[stopping]), model()
    fit(fitted, X, Y, validate, AveragedWeights(), epochs=1)
    (found,) = validate.history["val_loss"]
    assert found == pytest.approx(by_hand.evaluate(VX, VY, verbose=0)[0], rel=1e-6)
    assert found != pytest.approx(training, rel=1e-3)
    np.testing.assert_allclose(fitted.get_weights()[0], by_hand.get_weights()[0], rtol=1e-6)


def test_it_goes_on_after_an_interruption_with_the_callbacks_in_it(tmp_path):
    def run(*others):
        keras.utils.set_random_seed(0)
        model = model_with(ok.optimizers.SGD(0.1, momentum=0.5))
        stopping = EarlyStopping("val_loss", patience=3, min_delta=0.05, restore_best_weights=True, smoothing=0.5)
        plateau = ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.1)
        validate = ValidateEvery(4, (VX, VY), callbacks=[stopping, plateau])
        data = ok.data.Shuffled(X, Y, batch_size=4, seed=1)
        model.fit(data, epochs=6, verbose=0, callbacks=[validate, *others])
        return validate.history, stopping.state_dict(), plateau.state_dict(), model.get_weights()

    expected, found = run(), interrupted(run, tmp_path, after=1, batch=3, every=2)
    assert found[:1] == expected[:1]
    assert len(found[0]["updates"]) > 4
    keras.tree.map_structure(np.testing.assert_array_equal, found[1:], expected[1:])


def test_resume_asks_for_the_state_of_the_callbacks_in_it(tmp_path):
    class Mine(keras.callbacks.Callback):
        pass

    validate = ValidateEvery(4, (VX, VY), callbacks=[Mine()])
    with pytest.raises(ValueError, match=r"callbacks must have state_dict and load_state_dict.* Mine has not"):
        model_with().fit(
            ok.data.Shuffled(X, Y, batch_size=4), verbose=0, callbacks=[validate, Resume(tmp_path, strict=True)]
        )


class Rows(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return VX[5 * i : 5 * i + 5], VY[5 * i : 5 * i + 5]


@pytest.mark.long
def test_data_may_have_weights_or_come_in_batches():
    weights = np.arange(10, dtype="float32")
    losses = [by_hand(6, epochs=1)[0][1]]
    for data, more in ((Rows(), {}), ([VX, VY], {"batch_size": 3}), ((VX, VY, weights), {})):
        validate = ValidateEvery(6, data, **more)
        fit(model_with(), X, Y, validate, epochs=1)
        losses.append(validate.history["val_loss"][0])
    np.testing.assert_allclose(losses[1:3], losses[0], rtol=1e-6)
    assert losses[3] != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.only_on("tensorflow", because="tf.data")
def test_data_without_an_end_are_refused():
    import tensorflow as tf

    with pytest.raises(ValueError, match="data must end, got a dataset without an end"):
        ValidateEvery(4, tf.data.Dataset.from_tensor_slices((VX, VY)).batch(5).repeat())


@pytest.mark.only_on("tensorflow", because="a strategy of TensorFlow")
def test_two_replicas_keep_their_metrics():
    found = []
    for more in ([], [ValidateEvery(2, (VX, VY), batch_size=10)]):
        with ok.testing.problems.two_replicas().scope():
            model = model_with(keras.optimizers.SGD(0.05))
        found.append(fit(model, X, Y, *more, epochs=1).history["loss"])
    assert found[0] == found[1]
    np.testing.assert_allclose(more[0].history["val_loss"], [row[1] for row in by_hand(2, epochs=1)], rtol=1e-5)


@pytest.mark.once
def test_it_prints_the_values(capsys):
    validate = ValidateEvery(6, (VX, VY), verbose=1)
    fit(model_with(), X, Y, validate, epochs=1)
    loss, error = validate.history["val_loss"][0], validate.history["val_mae"][0]
    assert capsys.readouterr().out == f"ValidateEvery: update 6, val_loss {loss:.4g}, val_mae {error:.4g}\n"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be"),
        ({"every": 2.5}, TypeError, "every must be"),
        ({"data": None}, TypeError, "data must be"),
        ({"data": iter([(VX, VY)])}, TypeError, "data must be .* read again"),
        ({"data": {"x": VX}}, TypeError, "data must be .* got a dict"),
        ({"data": (VX, VY, VY, VY)}, ValueError, "data must have 1 to 3 parts"),
        ({"data": Rows(), "batch_size": 4}, ValueError, "batch_size must be None"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"prefix": ""}, ValueError, "prefix must be"),
        ({"verbose": 2}, ValueError, "verbose must be"),
        ({"callbacks": EarlyStopping()}, TypeError, "callbacks must be a list"),
        ({"callbacks": [1]}, TypeError, "callbacks must be a list of callbacks, got 1"),
        ({"callbacks": [AveragedWeights()]}, ValueError, "AveragedWeights: put it into the list of fit"),
        ({"callbacks": [ReduceLROnPlateau("loss", unit="update")]}, ValueError, "ReduceLROnPlateau: put it"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ValidateEvery(**({"every": 4, "data": (VX, VY)} | arguments))


def test_what_fit_has_too_is_refused(tmp_path):
    for callback in (Resume(tmp_path), ok.callbacks.TrainingMonitor(tmp_path)):
        with pytest.raises(ValueError, match=f"{type(callback).__name__}: put it into the list of fit"):
            ValidateEvery(4, (VX, VY), callbacks=[callback])
    stopping = EarlyStopping("val_loss")
    with pytest.raises(ValueError, match="callbacks must not be in the list of fit as well, got EarlyStopping"):
        fit(model_with(), X, Y, ValidateEvery(4, (VX, VY), callbacks=[stopping]), stopping)
    with pytest.raises(
        ValueError, match="prefix must be another one for each ValidateEvery of a fit, got 'val_' twice"
    ):
        fit(model_with(), X, Y, ValidateEvery(4, (VX, VY)), ValidateEvery(2, (X, Y)))
    with pytest.raises(ValueError, match=r"monitor must be one of the names in the logs, 'val_loss', 'val_mae', got"):
        fit(model_with(), X, Y, ValidateEvery(4, (VX, VY), callbacks=[EarlyStopping("val_los", mode="min")]))
