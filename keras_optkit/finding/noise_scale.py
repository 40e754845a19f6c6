"""The noise of the gradient, by which a batch size is judged."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.callbacks.callback import number
from keras_optkit.data import Shuffled
from keras_optkit.finding.trial import run, state_as_found
from keras_optkit.fit.optimizers import build_optimizer
from keras_optkit.fit.steps import compile_anew
from keras_optkit.optimizers import Optimizer, Rule
from keras_optkit.optimizers.rule import Weight

Tensor = Any


class Timer(keras.callbacks.Callback):
    """Times the training steps, and ends the run after so many."""

    def __init__(self, steps: int):
        super().__init__()
        self.seconds: list[float] = []
        self._steps = steps

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002, D102
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        for value in (logs or {}).values():
            ops.convert_to_numpy(value)  # which waits for the device
        self.seconds.append(time.perf_counter() - self._begun)
        if len(self.seconds) == self._steps:
            self.model.stop_training = True


@dataclass(frozen=True)
class KeepGradient(Rule):
    """Keeps the gradient, and leaves the weights as they are."""

    def slots(self, w: Weight) -> Mapping[str, float]:  # noqa: ARG002
        """The gradient of the last batch."""
        return {"gradient": 0.0}

    def update(self, u: Tensor, slots: Any, p: Tensor, h: Any) -> tuple[Tensor, Any]:  # noqa: ARG002
        """A step of 0."""
        return ops.zeros_like(p), {"gradient": u}


class Gradients(keras.callbacks.Callback):
    """Adds up the gradients of so many batches and their squared norms."""

    def __init__(self, optimizer: Optimizer, count: int):
        super().__init__()
        self.total: np.ndarray = np.zeros(())
        self.squares: list[float] = []
        self._optimizer, self._count = optimizer, count
        self._batches = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002, D102
        self._batches += 1
        assert self.model.optimizer.built  # asking for the model has Keras fill its variables on JAX
        if number(self._optimizer.iterations) > len(self.squares):  # loss scaling did not skip it
            state: dict[str, Any] = {}
            self._optimizer.save_own_variables(state)
            parts = [np.ravel(state[name]) for name in sorted(state) if name.startswith("slot.gradient.")]
            gradient = np.concatenate(parts).astype("float64")
            self.total = self.total + gradient
            self.squares.append(float(gradient @ gradient))
        if len(self.squares) == self._count or self._batches >= 10 * self._count:
            self.model.stop_training = True


def noise_scales(model: Any, data: Shuffled, count: int, training_data: Shuffled, updates: int) -> list[float | None]:
    """The noise scale in the middle and at the end of so many updates; without any, at the weights as they are."""
    with state_as_found(model):
        found = []
        for more in [updates // 2, updates - updates // 2] if updates > 1 else [updates]:
            if more:
                compile_anew(model)
                run(model, [Timer(more)], x=training_data)
            found.append(_of_weights(model, data, count))
        return found


def _of_weights(model: Any, data: Shuffled, count: int) -> float | None:
    data.epoch = 0  # the same batches every time
    with state_as_found(model), _keeping_gradients(model) as optimizer:
        gradients = Gradients(optimizer, count)
        run(model, [gradients], x=data)
    return noise_scale(gradients.total, gradients.squares, data.batch_size)


@contextlib.contextmanager
def _keeping_gradients(model: Any) -> Iterator[Optimizer]:
    """Gives the model an optimizer that keeps gradients instead of its own, with loss scaling if that has it."""
    found = model.optimizer
    strategy = getattr(model, "distribute_strategy", None)  # on TensorFlow
    with strategy.scope() if strategy else contextlib.nullcontext():
        keeping = Optimizer(0.0, KeepGradient(), sparse="dense", fuse=False, name="gradients")
        scaled = isinstance(found, keras.optimizers.LossScaleOptimizer)
        model.optimizer = keras.optimizers.LossScaleOptimizer(keeping) if scaled else keeping
    try:
        build_optimizer(model)
        compile_anew(model)
        yield keeping
    finally:
        model.optimizer = found


def noise_scale(total: np.ndarray, squares: Sequence[float], size: int) -> float | None:
    """tr(Σ) / |G|², from the sum of K gradients of batches of `size` examples, and their squared norms; see above.

    None for fewer than two gradients, or if they are not finite.
    """
    count = len(squares)
    if count < 2 or not np.all(np.isfinite(squares)):
        return None
    small, large = float(np.mean(squares)), float(total @ total) / count**2
    signal = (count * large - small) / (count - 1)
    noise = size * (small - large) * count / (count - 1)
    return noise / signal if signal > 0 else math.inf
