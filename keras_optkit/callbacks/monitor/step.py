"""What `TrainingMonitor` computes, inside of the training steps that it looks at."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_optkit.callbacks.callback import number
from keras_optkit.callbacks.instrument import around, shared
from keras_optkit.callbacks.monitor import on_tensorflow
from keras_optkit.optimizers import Optimizer, distribute
from keras_optkit.precision import at_least_float32
from keras_optkit.private import sublayers

Tensor = Any

#: The numbers that a step computes once, and how the replicas of a strategy make one of theirs.
_SCALARS = {
    "learning_rate": "only_first_replica",
    "loss": "sum",  # each replica has its part of the global batch's mean
    "loss_scale": "only_first_replica",
    "clipped": "only_first_replica",
    "examples": "sum",
    "half_examples": "sum",
    "half_squares": "only_first_replica",
}

_LIMITS = ("clipnorm", "clipvalue", "global_clipnorm")

#: The rows of "layers"; the first three are sums of squares.
GRADIENT, WEIGHT, CHANGE, NONFINITE = range(4)

#: The rows of "activations".
ACTIVATION = ("mean", "std", "zeros", "dead")


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that updates the weights, without the one that scales the loss."""
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    return optimizer.inner_optimizer if scaled else optimizer


def clips(optimizer: Any) -> bool:
    """Whether an optimizer clips, and what it clips can be seen: not where that is the mean of several gradients."""
    inner = inner_optimizer(optimizer)
    limits = (getattr(inner, name, None) for name in _LIMITS)
    return any(limit is not None for limit in limits) and not getattr(inner, "gradient_accumulation_steps", None)


def short(path: str, model: Any) -> str:
    """A path without the name of the model, which comes and goes when a model is saved and loaded."""
    return path.removeprefix(f"{model.name}/")


def layer_of(variable: Any, model: Any) -> str:
    """The path of the layer that a variable belongs to."""
    layer, _, _ = short(getattr(variable, "path", variable.name), model).rpartition("/")
    return layer or model.name


class Probe:
    """Around one model while it trains: computes in the steps that are wanted, and hands the numbers to the host.

    Attributes:
        layers: The layers with weights that are trained, in the model's order: the columns of "layers".
        watched: Those whose activations are measured: the columns of "activations".
    """

    def __init__(self, model: Any, activations: str | None, noise_scale: bool):
        self._model, self._optimizer = model, model.optimizer
        self._inner = inner_optimizer(model.optimizer)
        self.layers = list(dict.fromkeys(layer_of(v, model) for v in model.trainable_variables))
        found = {} if activations is None else matching_layers(model, activations)
        self.watched = list(found)
        self._units = {name: _unit_axis(layer) for name, layer in found.items()}
        self._held: set[str] = set()
        self._flushed: np.ndarray | None = None
        self._thread = threading.local()  # the replicas of a strategy are traced in threads of their own
        shapes = {"layers": (4, len(self.layers)), "activations": (len(ACTIVATION), len(found))}
        aggregations = _SCALARS | dict.fromkeys(shapes, "only_first_replica")
        self._values = shared(model, aggregations, "float32", shapes=shapes, on_demand=True)
        self._detach = [
            self._values.close,
            *(around(metric, "update_state", self._see_metric) for metric in model.metrics if metric.name == "loss"),
            *(around(layer, "call", self._see_call(name)) for name, layer in found.items()),
            *self._around_update(),
        ]
        if noise_scale:
            self._detach.append(around(model, "train_step", self._see_step))

    def _around_update(self) -> list[Callable[[], None]]:
        hooks = [around(self._inner, "flush", self._see_flush)] if isinstance(self._inner, Optimizer) else []
        if keras.config.backend() == "tensorflow":
            loss = around(self._optimizer, "scale_loss", self._see_loss)
            return [*hooks, loss, around(self._optimizer, "apply", self._see_apply)]
        # On JAX `scale_loss` is called inside of what is differentiated and `apply`, with loss scaling, inside of a
        # condition. No value can come out of either; it can from around them.
        return [*hooks, around(self._optimizer, "stateless_apply", self._see_stateless_apply)]

    def close(self) -> None:
        """Leaves the model as it was; the step has to be compiled anew then."""
        for detach in self._detach:
            detach()

    # -- for the host -------------------------------------------------------------------------------------------------

    def want(self, wanted: bool) -> None:
        """Says whether the steps that begin from now on compute."""
        self._values.wanted = wanted
        self._flushed = None

    def read(self) -> dict[str, np.ndarray]:
        """What the last step that was wanted has computed, by name; waits for it."""
        values = {name: np.array(ops.convert_to_numpy(self._values[name]), "float64") for name in self._held}
        if self._flushed is not None and "layers" in values:
            values["layers"][[WEIGHT, CHANGE]] = self._flushed
        return values

    # -- inside the step ----------------------------------------------------------------------------------------------

    @property
    def _looking(self) -> bool:
        return self._values.in_step and not getattr(self._thread, "aside", False)

    def _hold(self, name: str, value: Tensor) -> None:
        self._values[name] = value
        self._held.add(name)

    @contextlib.contextmanager
    def _see_loss(self, loss: Tensor, *_: Any, **__: Any) -> Iterator[None]:
        if self._looking:
            self._hold("loss", loss)
        yield

    @contextlib.contextmanager
    def _see_metric(self, loss: Tensor, sample_weight: Any = None) -> Iterator[None]:
        """Keras's own "loss" is told of the batch's loss, and of its size as the weight."""
        if self._looking:
            if keras.config.backend() == "jax":
                self._hold("loss", loss)
            if sample_weight is not None:
                self._hold("examples", ops.cast(sample_weight, "float32"))
        yield

    @contextlib.contextmanager
    def _see_apply(
        self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None
    ) -> Iterator[None]:
        if not self._looking:
            yield
            return
        variables = list(trainable_variables or self._model.trainable_variables)
        before = [ops.copy(v) for v in variables]
        scale = self._see_scalars()
        yield
        self._see_update(grads, variables, before, [ops.convert_to_tensor(v) for v in variables], scale)
        self._see_activations()

    @contextlib.contextmanager
    def _see_stateless_apply(
        self, state: Sequence[Tensor], grads: Sequence[Tensor | None], weights: Sequence[Tensor]
    ) -> Iterator[Callable[[Any], None] | None]:
        if not self._looking:
            yield None
            return

        def holding(values: Sequence[Tensor]) -> Any:
            return keras.StatelessScope(list(zip(self._optimizer.variables, values, strict=True)))

        def see_result(result: tuple[Sequence[Tensor], Sequence[Tensor]]) -> None:
            after, new_state = result
            with holding(new_state):
                if isinstance(self._rate(), keras.Variable):  # ScheduleHyperparameters sets it in there
                    self._hold("learning_rate", self._rate())
            self._see_update(grads, self._model.trainable_variables, weights, after, scale)

        with holding(state):
            scale = self._see_scalars()
        yield see_result

    def _rate(self) -> Any:
        return getattr(self._optimizer, "learning_rate", None)  # Keras's MultiOptimizer has none

    def _see_scalars(self) -> Tensor:
        """Holds what the optimizer is about to use, and returns the scale of the loss."""
        if self._rate() is not None:
            self._hold("learning_rate", self._rate())
        scale = self._scaled(ops.ones((), "float32"))
        if isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer):
            self._hold("loss_scale", scale)
        return scale

    def _scaled(self, loss: Tensor) -> Tensor:
        return type(self._optimizer).scale_loss(self._optimizer, loss)  # the class's own, which nobody watches

    def _see_update(
        self,
        grads: Sequence[Any],
        variables: Sequence[Any],
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        scale: Tensor,
    ) -> None:
        own = _dense(grads, variables)
        whole = distribute.sum_over_replicas(own)
        squares = [_squares(g) / ops.square(scale) for g in whole]
        rows = [
            squares,
            [_squares(w) for w in before],
            [_squares(ops.subtract(_wide(a), _wide(b))) for a, b in zip(after, before, strict=True)],
            [_nonfinite(g) for g in whole],
        ]
        self._hold("layers", ops.stack([self._by_layer(row, variables) for row in rows]))
        if clips(self._optimizer):
            self._hold("clipped", self._clipped(own, whole, squares, scale))
        half = getattr(self._thread, "half", None)
        if half is not None:
            self._thread.half = None
            half = distribute.sum_over_replicas(_dense(half, self._model.trainable_variables))
            self._hold("half_squares", sum(_squares(g) for g in half) / ops.square(scale))

    def _by_layer(self, values: Sequence[Tensor], variables: Sequence[Any]) -> Tensor:
        sums = dict.fromkeys(self.layers, ops.zeros((), "float32"))
        for value, variable in zip(values, variables, strict=True):
            layer = layer_of(variable, self._model)
            if layer in sums:  # and not in a model that the step trains beside this one
                sums[layer] = sums[layer] + value
        return ops.stack(list(sums.values()))

    def _clipped(
        self, own: Sequence[Tensor | None], whole: Sequence[Tensor | None], squares: Sequence[Tensor], scale: Tensor
    ) -> Tensor:
        """Whether clipping changes the gradient, in any replica."""
        inner = self._inner
        if not isinstance(inner, Optimizer):  # Keras's clip in each replica, before the sum
            whole, squares = own, [_squares(g) / ops.square(scale) for g in own]
        if inner.global_clipnorm is not None:
            size, limit = ops.sqrt(sum(squares)), inner.global_clipnorm
        elif inner.clipnorm is not None:
            size, limit = ops.sqrt(ops.max(ops.stack(squares))), inner.clipnorm
        else:
            largest = [ops.cast(ops.max(ops.abs(g)), "float32") for g in whole if g is not None]
            size, limit = ops.max(ops.stack(largest)) / scale, inner.clipvalue
        unchanged = distribute.in_all_replicas(ops.less_equal(size, ops.cast(limit, "float32")))
        return ops.cast(ops.logical_not(unchanged), "float32")

    @contextlib.contextmanager
    def _see_flush(self) -> Iterator[Callable[[Any], None]]:
        """An update at the end of an epoch from the micro-batches that are left, outside of any compiled step."""
        variables, begun_at = self._model.trainable_variables, number(self._inner.iterations)
        before = [ops.copy(v) for v in variables] if self._values.wanted else []

        def see_result(_: Any) -> None:
            if before and number(self._inner.iterations) > begun_at:
                changes = [_squares(ops.subtract(_wide(v), _wide(b))) for v, b in zip(variables, before, strict=True)]
                rows = [self._by_layer(row, variables) for row in ([_squares(b) for b in before], changes)]
                self._flushed = np.array(ops.convert_to_numpy(ops.stack(rows)))

        yield see_result

    # -- on request, on TensorFlow ------------------------------------------------------------------------------------

    def _see_call(self, name: str) -> Callable[..., contextlib.AbstractContextManager[Any]]:
        @contextlib.contextmanager
        def see_call(*_: Any, **__: Any) -> Iterator[Callable[[Any], None]]:
            yield see_result

        def see_result(outputs: Any) -> None:
            if self._looking:
                self._calls.setdefault(name, []).append(tree.flatten(outputs)[0])

        return see_call

    @property
    def _calls(self) -> dict[str, list[Tensor]]:
        """What the watched layers have returned in this step, in this replica."""
        if not hasattr(self._thread, "calls"):
            self._thread.calls = {}
        return self._thread.calls

    def _see_activations(self) -> None:
        if not self.watched:
            return
        calls, self._thread.calls = self._calls, {}
        columns = []
        for name in self.watched:
            outputs = calls.get(name, [])
            if not outputs or not all(map(on_tensorflow.is_here, outputs)):
                raise ValueError(
                    f"activations: the layer {name!r} is not called in the training step itself, but "
                    f"{'inside of a loop or a function in it' if outputs else 'nowhere'}. Choose other layers."
                )
            columns.append(on_tensorflow.moments(outputs, self._units[name]))
        self._hold("activations", ops.transpose(ops.stack(columns)))

    @contextlib.contextmanager
    def _see_step(self, data: Any) -> Iterator[None]:
        if self._looking:
            self._thread.aside = True
            try:
                self._thread.half, examples = on_tensorflow.half_gradient(self._model, self._scaled, data)
            finally:
                self._thread.aside = False
            self._hold("half_examples", ops.cast(examples, "float32"))
        yield


def _dense(grads: Sequence[Any], variables: Sequence[Any]) -> list[Tensor | None]:
    return [None if g is None else distribute.dense(g, v.shape) for g, v in zip(grads, variables, strict=True)]


def _wide(tensor: Any) -> Tensor:
    return ops.cast(tensor, at_least_float32(tensor.dtype))


def _squares(tensor: Tensor | None) -> Tensor:
    """The sum of the squares, as float32; 0 for no tensor."""
    return ops.zeros((), "float32") if tensor is None else ops.cast(ops.sum(ops.square(_wide(tensor))), "float32")


def _nonfinite(tensor: Tensor | None) -> Tensor:
    """How many of the numbers are not finite."""
    if tensor is None:
        return ops.zeros((), "float32")
    return ops.sum(ops.cast(ops.logical_not(ops.isfinite(tensor)), "float32"))


def _unit_axis(layer: Any) -> int:
    """The axis of a layer's output along which its units or channels lie."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else -1


def matching_layers(model: Any, pattern: str) -> dict[str, Any]:
    """The layers, at any depth, whose path matches, by that path.

    Raises:
        ValueError: If there are none.
    """
    called = [layer for layer in sublayers(model) if not isinstance(layer, keras.layers.InputLayer)]
    layers = {short(layer.path or layer.name, model): layer for layer in called}
    found = {name: layer for name, layer in layers.items() if re.search(pattern, name)}
    if not found:
        raise ValueError(
            f"activations must match the path of a layer, got {pattern!r}. The layers are {', '.join(layers)}."
        )
    return found
