"""Dynamic loss scaling within limits, for training in float16."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit import arguments, backend
from keras_optkit.registry import PACKAGE

Tensor = Any

_STATE = ("step_counter", "dynamic_scale", "skipped", "skipped_in_a_row")
_LIMITED = _STATE[1:]  # Keras's scale, and what is counted here


@keras.saving.register_keras_serializable(package=PACKAGE)
class LossScale(keras.optimizers.LossScaleOptimizer):
    """Keras's `LossScaleOptimizer` with limits, one decision for all replicas, and counts of what failed.

    ```text
    all gradients finite:   inner update with g / s;  after k of these in a row  s ← min(2 s, maximum_scale)
    otherwise:              no update;                                           s ← max(s / 2, minimum_scale)
    ```

    Gradients of float16 activations below 6e-8 are 0; multiplying the loss by s keeps them. Keras's class has no
    limits: in a model that overflows whatever the scale is, s is halved until it is 0, and then all gradients are 0 /
    0, and in a model that never overflows s grows to infinity. Its decision whether to update is that of the first
    replica alone, so that an infinite gradient of another one goes into the weights. Everything else is as in Keras, so
    an instance can be compiled with a model, whose `mixed_float16` policy then adds no second one.

    At the floor, s stays where it is, and updates with non-finite gradients are still left out: `skipped` counts them
    all and `skipped_in_a_row` those without an update in between. `TrainingMonitor` writes the scale of every update as
    `train/loss_scale`.

    When not to use it: with bfloat16 or float32, whose range makes scaling unnecessary; there, `skip_nonfinite` of
    every optimizer of this package leaves out bad updates.

    Args:
        inner_optimizer: The optimizer that updates the weights, of this package or of Keras.
        initial_scale: s at the start, within the limits.
        dynamic_growth_steps: k >= 1, finite updates in a row after which s is doubled.
        minimum_scale: Floor of s, > 0.
        maximum_scale: Ceiling of s, at least the floor.
        name: Name of the optimizer.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range, or an inner optimizer that scales the loss already.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, dtype="mixed_float16")])
    optimizer = ok.optimizers.LossScale(ok.optimizers.AdamW(1e-3), maximum_scale=2.0**16)
    model.compile(optimizer, loss="mse")
    x = keras.random.normal((64, 4), seed=0)
    model.fit(x, x[:, :1], verbose=0)
    print(optimizer.loss_scale, optimizer.skipped)
    ```
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        minimum_scale: float = 1.0,
        maximum_scale: float = 2.0**24,
        name: str | None = None,
    ):
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
            raise TypeError(f"inner_optimizer must be a keras.optimizers.Optimizer, got {inner_optimizer!r}.")
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(f"inner_optimizer must not scale the loss itself, got {inner_optimizer!r}.")
        arguments.real("minimum_scale", minimum_scale, 0, closed="neither")
        arguments.real("maximum_scale", maximum_scale, minimum_scale)
        super().__init__(
            inner_optimizer,
            arguments.real("initial_scale", initial_scale, minimum_scale, maximum_scale),
            arguments.integer("dynamic_growth_steps", dynamic_growth_steps, 1),
            name=name,
        )
        self.minimum_scale, self.maximum_scale = minimum_scale, maximum_scale
        self._held = SimpleNamespace(own={}, pending=None)  # where Keras's and TensorFlow's tracking does not look

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {"minimum_scale": self.minimum_scale, "maximum_scale": self.maximum_scale}

    @property
    def loss_scale(self) -> float:
        """The present scale s."""
        return float(ops.convert_to_numpy(self.dynamic_scale)) if self.built else float(self.initial_scale)

    @property
    def skipped(self) -> int:
        """How many updates were skipped."""
        return int(ops.convert_to_numpy(self._own["skipped"])) if self.built else 0

    @property
    def skipped_in_a_row(self) -> int:
        """How many of them are the last ones."""
        return int(ops.convert_to_numpy(self._own["skipped_in_a_row"])) if self.built else 0

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Assigns a value to each of `variables`, also to those of the inner optimizer, which Keras leaves out."""
        inner = {id(variable) for variable in self.inner_optimizer.variables}
        own = [variable for variable in self.variables if id(variable) not in inner]
        for variable, value in zip(own, weights, strict=False):
            variable.assign(value)
        self.inner_optimizer.set_weights(weights[len(own) :])

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the state for `variables`, here and in the inner optimizer."""
        if self.built:
            self.inner_optimizer.build(variables)
            return
        counts = {name: self.add_variable((), "zeros", "int", aggregation="none", name=name) for name in _STATE[2:]}
        super().build(variables)
        self._held.own = {"step_counter": self.step_counter, "dynamic_scale": self.dynamic_scale, **counts}
        if self._held.pending is not None:
            pending, self._held.pending = self._held.pending, None
            with backend.outside_graph():
                self.load_own_variables(pending)

    @property
    def _own(self) -> dict[str, Any]:
        return self._held.own

    @backend.untraced
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Updates the weights with the unscaled gradients, or lowers the scale if they are not finite."""
        if not self.built:
            with backend.outside_graph():
                self.build(list(trainable_variables or ()))
        if trainable_variables is not None and len(trainable_variables) == len(grads) == 0:
            return  # a frozen model
        own = [self._own[name] for name in _LIMITED]
        before = ops.copy(ops.convert_to_tensor(self.dynamic_scale))
        super().apply(grads, trainable_variables)
        for variable, value in zip(own, self._limited(before, own), strict=True):
            variable.assign(value)

    def stateless_apply(
        self, optimizer_variables: list[Tensor], grads: list[Tensor], trainable_variables: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`apply` as a pure function of the values of all variables."""
        place_of = {id(variable): place for place, variable in enumerate(self.variables)}
        places = [place_of[id(variable)] for variable in (self._own[name] for name in _LIMITED)]
        before = optimizer_variables[place_of[id(self.dynamic_scale)]]
        weights, after = super().stateless_apply(optimizer_variables, grads, trainable_variables)
        after = list(after)
        for place, value in zip(places, self._limited(before, [after[i] for i in places]), strict=True):
            after[place] = value
        return weights, after

    def _limited(self, before: Tensor, own: Sequence[Any]) -> tuple[Tensor, ...]:
        """Scale and counts after a step, from the scale before it and what Keras has made of them."""
        scale, skipped, in_a_row = map(ops.convert_to_tensor, own)
        failed = ops.cast(scale < before, skipped.dtype)  # Keras has halved it
        limited = ops.clip(scale, self.minimum_scale, self.maximum_scale)
        return limited, skipped + failed, (in_a_row + failed) * failed

    def check_finite(self, grads: Sequence[Any]) -> Tensor:
        """Whether the gradients of all replicas are finite."""
        return backend.in_all_replicas(super().check_finite([getattr(g, "values", g) for g in grads]))

    def save_own_variables(self, store: Any) -> None:
        """Writes the own state; Keras writes that of the inner optimizer beside it."""
        for name, value in (self._held.pending or self._own).items():
            store[name] = ops.convert_to_numpy(value)

    def load_own_variables(self, store: Any) -> None:
        """Restores the own state; if it is loaded before the optimizer is built, it is kept until then.

        Raises:
            ValueError: If the state is not that of a `LossScale`.
        """
        saved = {name: np.array(store[name]) for name in list(store.keys())}
        if not saved:
            return
        if set(saved) != set(_STATE):
            raise ValueError(
                f"The saved optimizer state does not belong to LossScale: it has {sorted(saved)}, expected {_STATE}."
            )
        if not self.built:
            self._held.pending = saved
        for name, variable in self._own.items():
            variable.assign(saved[name])
