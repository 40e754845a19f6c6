"""Training steps that compute the gradient twice, for optimizers that need one at weights that the first has moved.

The model's own `train_step` is run twice on the same batch. In the first run, what it gives to `apply` tells where the
second gradient is wanted, and nothing is updated. In the second run the model holds these weights, until `apply` is
reached: there it has its own again, and makes the update. Around both runs all other state is as if the forward pass
and the metrics had been run once, at the weights themselves; what the second run does after the update is kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_optkit import backend
from keras_optkit.fit.hooks import muted
from keras_optkit.fit.run import Run
from keras_optkit.optimizers.of_model import innermost, optimizers_of, ours_of, unscaled
from keras_optkit.private import sublayers

Tensor = Any

#: The methods whose hooks see the second run. All others see the first, in which these methods are not reached.
UPDATE = ("apply", "stateless_apply")


@contextlib.contextmanager
def computing_second_gradients(run: Run) -> Iterator[None]:
    """The training function of a model is made with a step that computes the gradient twice, if that is needed."""
    model = run.model
    own = vars(model).get("train_step")
    step = with_second_gradient(model, model.train_step)
    if step is model.train_step or step is own:
        yield
        return
    vars(model)["train_step"] = step
    try:
        yield
    finally:
        if own is None:
            del vars(model)["train_step"]
        else:
            vars(model)["train_step"] = own


def with_second_gradient(model: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """The training step that computes the gradient twice, if the model's optimizer needs that; else `step` itself.

    Raises:
        ValueError: If the model is trained by several optimizers, one of which needs it.
    """
    needing = [optimizer for optimizer in ours_of(model) if optimizer.needs_second_gradient]
    if not needing or getattr(step, "computes_two_gradients", False):
        return step
    outer = optimizers_of(model)
    inside = [inner for optimizer in outer for inner in innermost(optimizer)]
    if len(inside) != 1:
        raise ValueError(
            f"{needing[0].name} computes the gradient twice, for which it must be the only optimizer of the model, got "
            f"{', '.join(f'{optimizer.name} ({type(optimizer).__name__})' for optimizer in inside)}."
        )
    two = (_TwoOnJAX if keras.config.backend() == "jax" else _TwoOnTensorFlow)(model, outer[0], step)
    two.computes_two_gradients = True
    return two


class _Two:
    """A training step that runs another one twice.

    The replicas of a strategy are traced in turns, in threads of their own: what is put in place of the optimizer's
    method is there while any of them is inside, and asks its thread what to do.
    """

    computes_two_gradients = False
    method = ""

    def __init__(self, model: Any, outer: Any, step: Callable[..., Any]):
        self._model, self._outer, self._optimizer, self._step = model, outer, unscaled(outer), step
        self._inside = 0
        self._thread = threading.local()

    @contextlib.contextmanager
    def _with_updates(self, update: Callable[..., Any]) -> Iterator[None]:
        """The updates of this thread go to a function, which is called with what the optimizer does and is given."""
        own = vars(self._outer)
        if not self._inside:
            self._replaced = own.get(self.method)
            previous = getattr(self._outer, self.method)

            def instead(*args: Any, **kwargs: Any) -> Any:
                mine = getattr(self._thread, "update", None)
                return previous(*args, **kwargs) if mine is None else mine(previous, *args, **kwargs)

            own[self.method] = instead
        self._inside += 1
        self._thread.update = update
        try:
            yield
        except BaseException:
            self._inside = 1  # other replicas stay where they are
            raise
        finally:
            self._thread.update = None
            self._inside -= 1
            if not self._inside:
                if self._replaced is None:
                    del own[self.method]
                else:
                    own[self.method] = self._replaced

    def _once(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which raises if it is called a second time."""
        called: list[bool] = []

        def once(*args: Any, **kwargs: Any) -> Any:
            if called:
                raise ValueError(
                    f"{self._optimizer.name} computes the gradient twice, for which {type(self._model).__name__}."
                    "train_step must make one update, and it makes several."
                )
            called.append(True)
            return update(*args, **kwargs)

        return once

    def _unscaled(self, grads: Sequence[Any], scale: Any, shapes: Sequence[Any]) -> list[Any]:
        """The gradients of the loss itself."""
        if scale is None:
            return list(grads)
        return [None if g is None else backend.dense(g, s) / scale for g, s in zip(grads, shapes, strict=True)]


class _TwoOnJAX(_Two):
    """The same where the step is a function of the state."""

    method = "stateless_apply"

    def __call__(self, state: Any, data: Any) -> tuple[Any, Any]:
        weights, others, optimizer_state, metrics = state
        moved: list[Tensor] = []

        def probe(_: Any, optimizer_state: Any, grads: Any, weights: Any) -> tuple[Any, Any]:
            moved.extend(self._perturbed(optimizer_state, grads, weights))
            return list(weights), optimizer_state

        def update(stateless_apply: Any, optimizer_state: Any, grads: Any, _: Any) -> Any:
            return stateless_apply(optimizer_state, grads, weights)

        with self._with_updates(self._once(probe)):
            logs, (_, others_after, _, metrics_after) = self._step(state, data)
        if not moved:
            moved = weights
        with self._with_updates(self._once(update)), muted(but=UPDATE):
            _, (weights, _, optimizer_state, _) = self._step((moved, others, optimizer_state, metrics), data)
        return logs, (weights, others_after, optimizer_state, metrics_after)

    def _perturbed(self, optimizer_state: Any, grads: Any, weights: Any) -> list[Tensor]:
        variables = self._model.trainable_variables
        mapping = [*zip(self._outer.variables, optimizer_state, strict=True), *zip(variables, weights, strict=True)]
        with keras.StatelessScope(mapping):
            scale = getattr(self._outer, "dynamic_scale", None)
            scale = None if scale is None else ops.convert_to_tensor(scale)
            shapes = [tuple(v.shape) for v in variables]
            return list(self._optimizer.perturbed_values(self._unscaled(grads, scale, shapes), variables))


class _TwoOnTensorFlow(_Two):
    """The same where the step assigns variables."""

    method = "apply"

    def __call__(self, data: Any) -> Any:
        self._build(data)
        model = self._model
        metrics = model.metrics_variables
        state = list({backend.key(v): v for v in [*model.variables, *metrics]}.values())
        before = _read(state)
        seen: dict[str, Any] = {}

        def probe(_: Any, grads: Any, trainable_variables: Any = None) -> None:
            variables = list(trainable_variables or self._optimizer._in_model_order())
            shapes = [tuple(v.shape) for v in variables]
            scale = getattr(self._outer, "dynamic_scale", None)
            grads = self._unscaled(grads, None if scale is None else backend.tensor(scale), shapes)
            seen["variables"], seen["weights"] = variables, _read(variables)
            seen["moved"] = self._optimizer.perturbed_values(grads, variables)
            seen["state"] = _read(state)

        def update(apply: Any, grads: Any, trainable_variables: Any = None) -> None:
            self._restore(state, seen["state"])
            self._restore(seen["variables"], seen["weights"])
            apply(grads, trainable_variables)

        with self._with_updates(self._once(probe)):
            logs = self._step(data)
        if "moved" not in seen:  # a frozen model
            return logs
        metrics_after = _read(metrics)
        backend.assign(state, before)
        backend.assign(seen["variables"], seen["moved"])
        with self._with_updates(self._once(update)), muted(but=UPDATE):
            self._step(data)
        backend.assign(metrics, metrics_after)
        return logs

    def _restore(self, variables: Sequence[Any], values: Sequence[Tensor]) -> None:
        """Gives variables the values that they had at the end of the first forward pass."""
        backend.assign(variables, values)

    def _build(self, data: Any) -> None:
        """Has all variables made that the step makes, by tracing it for nothing: their first values must be known."""
        import tensorflow as tf

        model = self._model
        built = all(layer.built for layer in sublayers(model)) and self._outer.built and _metrics_are_built(model)
        if built or tf.distribute.get_strategy().num_replicas_in_sync > 1:
            return

        def no_update(_: Any, grads: Any, trainable_variables: Any = None) -> None:  # noqa: ARG001
            if not self._outer.built:
                with backend.outside_graph():
                    self._outer.build(list(trainable_variables or model.trainable_variables))

        with self._with_updates(no_update), muted():
            spec = keras.tree.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype) if tf.is_tensor(x) else x, data)
            tf.function(self._step, autograph=False).get_concrete_function(spec)


def _metrics_are_built(model: Any) -> bool:
    return all(getattr(metric, "built", True) for metric in model.metrics)


def _read(variables: Sequence[Any]) -> list[Tensor]:
    import tensorflow as tf

    return [tf.identity(backend.tensor(v)) for v in variables]
