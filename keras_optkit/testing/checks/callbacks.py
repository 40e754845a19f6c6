"""Checks for callbacks.

A card of kind "callback" builds a `keras.callbacks.Callback`. The checks train a small regression model with it for two
epochs, in an empty working directory, so that a case may name relative paths. The tag "passive" claims that training is
not changed by the callback; "averages" says that it needs an optimizer that averages weights, and "resumes" that it has
runs resume by itself.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_optkit.callbacks import Resume
from keras_optkit.callbacks.state import TrainingState
from keras_optkit.data import Shuffled
from keras_optkit.private import op_determinism
from keras_optkit.registry import Card
from keras_optkit.testing.conformance import check
from keras_optkit.testing.problems import begun
from keras_optkit.testing.roundtrip import through_json


@contextlib.contextmanager
def _each_case(card: Card) -> Iterator[Iterator[tuple[Mapping[str, Any], Any]]]:
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        yield ((case, card.make(**case)) for case in card.cases)


class _Boom(keras.callbacks.Callback):
    """Raises at the end of the given batch, counted from 1 over all epochs."""

    stateless = True

    def __init__(self, batches: int):
        super().__init__()
        self._left = batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        self._left -= 1
        if not self._left:
            raise RuntimeError("boom")


def _model(card: Card) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dropout(0.2), keras.layers.Dense(1)]
    )
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9, use_ema="averages" in card.tags)
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    return begun(model)


def _fit(model: keras.Model, *callbacks: Any, **arguments: Any) -> Any:
    x, y = _data()
    arguments = {"epochs": 2, "validation_data": (x[16:], y[16:])} | arguments
    data = Shuffled(x[:16], y[:16], batch_size=4, shuffle=False)
    return model.fit(data, callbacks=list(callbacks), verbose=0, **arguments)


def _data() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
    return x, x @ np.array([[1.0], [-2.0], [0.5]], "float32")


@check("callback", unless={"resumes"})  # one that is finished is not to be done again
def check_fits_twice(card: Card) -> None:
    """It takes part in two calls of `fit` in a row, and the losses stay finite."""
    with _each_case(card) as cases:
        for case, callback in cases:
            assert isinstance(callback, keras.callbacks.Callback), f"{card.name}({case})"
            model = _model(card)
            for _ in range(2):
                history = _fit(model, callback)
                assert np.all(np.isfinite(history.history["val_loss"])), f"{card.name}({case})"


@check("callback")
def check_config_round_trip(card: Card) -> None:
    """Its config is JSON, and what is built from it has the same config."""
    with _each_case(card) as cases:
        for case, callback in cases:
            through_json(callback, case)


@check("callback")
def check_leaves_no_trace(card: Card) -> None:
    """After a `fit` with it the optimizer's config is JSON, and training continues as if it had never been there."""
    with _each_case(card) as cases:
        for case, callback in cases:
            model = _model(card)
            _fit(model, callback)
            plain = _copy(card, model)
            after, expected = (_fit(m, epochs=1).history["loss"][0] for m in (model, plain))
            np.testing.assert_allclose(after, expected, rtol=1e-6, err_msg=f"{card.name}({case})")


def _copy(card: Card, model: keras.Model) -> keras.Model:
    """A model with equal weights, seeds and optimizer that has not been touched by any callback."""
    copy = _model(card)
    copy.compile(optimizer=through_json(model.optimizer, {}), loss="mse", metrics=["mae"])
    begun(copy)
    own, other = ([*m.trainable_variables, *m.non_trainable_variables, *m.optimizer.variables] for m in (copy, model))
    for variable, value in zip(own, other, strict=True):
        variable.assign(value.numpy())
    return copy


@check("callback")
def check_survives_failure(card: Card) -> None:
    """When another callback raises, that exception comes out of `fit`, and a later `fit` works."""
    with _each_case(card) as cases:
        for case, callback in cases:
            model = _model(card)
            try:
                _fit(model, callback, _Boom(2))
            except RuntimeError as error:
                assert "boom" in str(error), f"{card.name}({case})"
            else:
                raise AssertionError(f"{card.name}({case}) swallowed an exception.")
            _fit(model, callback)


@check("callback", requires={"passive"})
def check_is_passive(card: Card) -> None:
    """The weights after training, and its losses, are bitwise those without it."""
    with _each_case(card) as cases:
        for case, callback in cases:
            model, plain = _model(card), _model(card)
            losses, expected = (_fit(m, *more).history["loss"] for m, more in ((model, [callback]), (plain, [])))
            assert losses == expected, f"{card.name}({case}): {losses} and not {expected}"
            for mine, other in zip(model.get_weights(), plain.get_weights(), strict=True):
                np.testing.assert_array_equal(mine, other, err_msg=f"{card.name}({case})")


@check("callback")
def check_goes_on(card: Card) -> None:
    """Left in the middle of an epoch, twice, and gone on with by `Resume`, training ends as without an interruption.

    That is: all state of the model, the optimizer, the metrics and the random generators, bitwise, the history, and
    what the callback says of itself, but for what it calls "seconds".
    """
    for case in card.cases:
        whole, cut = (_interrupted(card, case, crashes) for crashes in ((), (5, 4)))
        for name, value in whole.items():
            _assert_equal(cut[name], value, f"{card.name}({case}): {name}")


def _interrupted(card: Card, case: Mapping[str, Any], crashes: tuple[int, ...]) -> dict[str, Any]:
    """What there is at the end of a run that raises after so many batches each time but the last."""
    x, y = _data()
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory), op_determinism():
        for crash in (*crashes, 0):
            callback, model = card.make(**case), _model(card)
            resume = [] if "resumes" in card.tags else [Resume("bundles", every=2)]
            boom = [_Boom(crash)] if crash else []
            arguments = {"epochs": 4, "validation_data": (x[:4], y[:4]), "callbacks": [callback, *resume, *boom]}
            try:
                model.fit(Shuffled(x, y, batch_size=4, seed=1), verbose=0, **arguments)
            except RuntimeError as error:
                assert "boom" in str(error), f"{card.name}({case})"
    state = {"its own": callback.state_dict()} if hasattr(callback, "state_dict") else {}
    return vars(TrainingState.of(model)) | {"history": model.history.history} | state


def _assert_equal(mine: Any, expected: Any, where: str) -> None:
    """Two trees of numbers, strings and arrays are the same, bitwise."""
    if isinstance(expected, Mapping):
        assert list(mine) == list(expected), where
        for key, value in ((key, value) for key, value in expected.items() if key != "seconds"):
            _assert_equal(mine[key], value, f"{where}, {key}")
    elif isinstance(expected, list | tuple):
        assert len(mine) == len(expected), where
        for i, value in enumerate(expected):
            _assert_equal(mine[i], value, f"{where}, {i}")
    elif isinstance(expected, np.ndarray):
        assert (mine.dtype, mine.shape, mine.tobytes()) == (expected.dtype, expected.shape, expected.tobytes()), where
    else:
        assert mine == expected or (mine != mine and expected != expected), f"{where}: {mine} is not {expected}"
