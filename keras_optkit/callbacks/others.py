"""What else takes part in a `fit`: models and callbacks that are neither Keras's own nor ours, and what they may do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from keras_optkit.fit.run import Run, running_fit

_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")


def may_log(model: Any, fit: Run) -> bool:
    """Whether somebody may add names to the logs of an epoch that those of the first one do not have.

    Callbacks may, in `on_epoch_end`; and so may a model with an `evaluate`, a `fit` or an uncompiled step of its own.
    """
    compiles = not model.run_eagerly or logs_metrics(model)
    return _have(fit, "on_epoch_end") or not (compiles and _is_keras(model, "fit", "evaluate"))


def logs_metrics(model: Any) -> bool:
    """Whether the logs are made of the metrics of a model, which Keras's steps do."""
    return _is_keras(model, "train_step", "test_step", "compute_metrics", "get_metrics_result")


def updates_at_most_once_a_batch(model: Any) -> bool:
    """Whether that is sure, in the `fit` that is running: a step, or a callback, may update more often."""
    fit = running_fit(model)
    return fit is not None and _is_keras(model, "train_step", "make_train_function") and not _have(fit, *_BATCH_HOOKS)


def _is_keras(model: Any, *methods: str) -> bool:
    return all(getattr(type(model), name) is getattr(keras.Model, name) for name in methods)


def hooks_of_batches(callback: Any) -> bool:
    """Whether a callback has something to do at each batch of training."""
    return _has(callback, _BATCH_HOOKS)


def _have(fit: Run, *hooks: str) -> bool:
    """Whether a callback that is neither Keras's own nor ours has one of these hooks."""
    return any(_has(callback, hooks) for callback in fit.listed() if not _is_known(callback))


def _has(callback: Any, hooks: Iterable[str]) -> bool:
    base = keras.callbacks.Callback
    return any(h in vars(callback) or getattr(type(callback), h, None) is not getattr(base, h) for h in hooks)


def _is_known(callback: Any) -> bool:
    package = type(callback).__module__.partition(".")[0]
    return package in ("keras", "keras_optkit") and type(callback) is not keras.callbacks.LambdaCallback
