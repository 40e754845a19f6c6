"""One forward and one backward pass of a model, whose state is thrown away."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_optkit import backend
from keras_optkit.callbacks.owned import own_variables
from keras_optkit.inspection.watching import Watch
from keras_optkit.precision import at_least_float32
from keras_optkit.private import compile_arguments, compiled_loss, global_seed, losses_inside, set_global_seed

Tensor = Any

#: How often the loss scale is halved until the gradients are finite; that of Keras begins at 2^15.
_HALVINGS = 24


def array(x: Any) -> np.ndarray:
    """A tensor or a variable in float64."""
    return np.asarray(ops.convert_to_numpy(ops.cast(x, at_least_float32(x.dtype))), "float64")


def as_tensors(data: Any) -> Any:
    """Arrays as tensors. JAX without `jax_enable_x64` has no 64 bits, and says so with a warning for each array."""

    def converted(x: Any) -> Any:
        x = x if ops.is_tensor(x) else np.asarray(x)
        if keras.config.backend() == "jax" and str(x.dtype) in ("int64", "uint64", "float64"):
            import jax

            if not jax.config.jax_enable_x64:
                x = np.asarray(x).astype(str(x.dtype).replace("64", "32"))
        return ops.convert_to_tensor(x)

    return tree.map_structure(converted, data)


@contextlib.contextmanager
def as_before(model: Any) -> Iterator[None]:
    """Afterwards, the variables that layers hold and the generators of Keras, Python and NumPy are as before."""
    held = [(v, ops.copy(backend.tensor(v))) for v in own_variables(model)]
    keras_state, python_state, numpy_state = global_seed(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        for variable, value in held:
            variable.assign(value)
        set_global_seed(keras_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@dataclass
class Passed:
    """What the passes have found.

    Attributes:
        outputs: What the model has returned.
        losses: Where the output of each loss is, the loss, and its name.
        value: The loss with penalties; None without labels.
        problem: Why there is no loss although there are labels.
        gradients: By the id of a trained variable, its gradient, or None.
        penalties: The same of the penalties on weights alone, of those that have one.
        scale: The loss scale at which the gradients are finite.
    """

    outputs: Any
    losses: list[tuple[Any, Any, str]] = field(default_factory=list)
    value: float | None = None
    problem: str | None = None
    gradients: dict[int, Any] = field(default_factory=dict)
    penalties: dict[int, np.ndarray] = field(default_factory=dict)
    scale: float = 1.0


class Passes:
    """The forward pass of a model and its loss, as functions of its trained weights.

    Args:
        model: A built model.
        x: Inputs, as tensors.
        y: Labels, as tensors, or None.
        loss: A loss instead of that of the model.
    """

    def __init__(self, model: Any, x: Any, y: Any, loss: Any):
        self.model, self.x, self.y = model, x, y
        given = compile_arguments(model) if loss is None and getattr(model, "compiled", False) else {}
        names = getattr(model, "output_names", None)
        self._compiled = compiled_loss(given.get("loss", loss), given.get("loss_weights"), names)
        self._custom = loss is None and type(model).compute_loss is not keras.Model.compute_loss
        held = [*model.non_trainable_variables, *model.metrics_variables]
        self._others = list({id(v): v for v in held}.values())

    def forward(self, values: list[Tensor] | None = None) -> tuple[Any, Tensor]:
        """Outputs, and all of the loss but what compares them with labels, which a custom `compute_loss` has done."""
        model = self.model
        values = [backend.tensor(v) for v in model.trainable_variables] if values is None else values
        mapping = list(zip(model.trainable_variables, values, strict=True))
        mapping += [(v, backend.tensor(v)) for v in self._others]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True):
            outputs = model(self.x, training=True)
            if self._custom and self.y is not None:
                return outputs, model.compute_loss(x=self.x, y=self.y, y_pred=outputs)
            return outputs, sum((ops.cast(ops.sum(part), "float32") for part in model.losses), ops.zeros(()))

    def loss(self, outputs: Any, rest: Tensor) -> Tensor:
        """The loss, in float32 at least."""
        return rest if self._custom else rest + self._compiled(self.y, outputs)

    def loss_now(self) -> float:
        """The loss at the weights that the model holds, with the same random numbers as before."""
        return float(array(self.loss(*self.forward())))

    def run(self, watch: Watch, scale: float) -> Passed:
        """Both passes, or without labels the forward pass, the first of which is watched."""
        if self.y is None:
            with watch.on():
                return Passed(self.forward()[0])
        values = [backend.tensor(v) for v in self.model.trainable_variables]
        recorded = _recorded if backend.TENSORFLOW else _twice
        found = recorded(self, values, watch, scale)
        if found.problem is None:
            found.losses = losses_inside(self._compiled)
            for _ in range(_HALVINGS):
                if scale <= 1 or _is_finite(found.gradients) or not math.isfinite(found.value or 0.0):
                    break
                scale /= 2
                found.gradients = self.gradients(values, scale)
            found.scale = scale
            found.penalties = self._penalties(values)
        return found

    def gradients(self, values: list[Tensor], scale: float) -> dict[int, Any]:
        """By the id of a trained variable, the gradient of the loss, or None; computed with the loss scaled."""

        def scaled(at: list[Tensor]) -> Tensor:
            return self.loss(*self.forward(at)) * scale

        return _by_id(self.model.trainable_variables, differentiated(scaled, values), scale)

    def _penalties(self, values: list[Tensor]) -> dict[int, np.ndarray]:
        pairs = zip(self.model.trainable_variables, values, strict=True)
        found = [(v, value) for v, value in pairs if getattr(v, "regularizer", None) is not None]
        if not found:
            return {}

        def penalty(at: list[Tensor]) -> Tensor:
            each = [v.regularizer(value) for (v, _), value in zip(found, at, strict=True)]
            return sum((ops.cast(part, "float32") for part in each), ops.zeros(()))

        gradients = differentiated(penalty, [value for _, value in found])
        return {id(v): array(g) for (v, _), g in zip(found, gradients, strict=True) if g is not None}


def differentiated(function: Callable[[list[Tensor]], Tensor], values: list[Tensor]) -> list[Any]:
    """The gradient of a function of a list of tensors, None where it does not depend on one."""
    if not backend.TENSORFLOW:
        import jax

        return list(jax.grad(function)(values))
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        result = function(values)
    return list(tape.gradient(result, values))


def _recorded(passes: Passes, values: list[Tensor], watch: Watch, scale: float) -> Passed:
    """On TensorFlow the forward pass is recorded while it is watched."""
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        with watch.on():
            outputs, rest = passes.forward(values)
        try:
            total = passes.loss(outputs, rest)
        except (ValueError, TypeError, KeyError, tf.errors.OpError) as error:
            return Passed(outputs, problem=_first_line(error))
        scaled = total * scale
    gradients = _by_id(passes.model.trainable_variables, tape.gradient(scaled, values), scale)
    return Passed(outputs, value=float(array(total)), gradients=gradients)


def _twice(passes: Passes, values: list[Tensor], watch: Watch, scale: float) -> Passed:
    """On JAX nothing can be read inside the function that is differentiated, so the forward pass runs twice."""
    with watch.on():
        outputs, rest = passes.forward(values)
    try:
        total = float(array(passes.loss(outputs, rest)))
        with keras.StatelessScope():  # metrics of the loss
            gradients = passes.gradients(values, scale)
    except (ValueError, TypeError, KeyError) as error:
        return Passed(outputs, problem=_first_line(error))
    return Passed(outputs, value=total, gradients=gradients)


def _by_id(variables: list[Any], gradients: list[Any], scale: float) -> dict[int, Any]:
    found = {}
    for variable, gradient in zip(variables, gradients, strict=True):
        if gradient is not None:
            wide = ops.cast(backend.dense(gradient, tuple(variable.shape)), at_least_float32(variable.dtype))
            gradient = wide / scale if scale != 1 else wide
        found[id(variable)] = gradient
    return found


def _is_finite(gradients: dict[int, Any]) -> bool:
    return all(g is None or bool(np.all(np.isfinite(array(g)))) for g in gradients.values())


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
