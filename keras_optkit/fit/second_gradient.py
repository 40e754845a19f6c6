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
    given, own = model.train_step, vars(model).get("train_step")
    step = with_second_gradient(model, given)
    if step is given:
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
    method is there while any of them is inside, and asks its thread what to do. A `tf.function` that the step calls is
    part of its trace meanwhile: one that was traced before would not ask.
    """

    computes_two_gradients = False
    method = ""

    def __init__(self, model: Any, outer: Any, step: Callable[..., Any]):
        self._model, self._outer, self._optimizer, self._step = model, outer, unscaled(outer), step
        self._inside = 0
        self._functions = False
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
            self._functions = backend.functions_inlined(True)
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
                backend.functions_inlined(self._functions)
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

    def _perturbed(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Tensor]:
        """The weights to compute the second gradient at, from the gradients of the loss as it may be scaled."""
        scale = getattr(self._outer, "dynamic_scale", None)
        if scale is not None:
            pairs = zip(grads, variables, strict=True)
            grads = [None if g is None else backend.dense(g, tuple(v.shape)) / backend.tensor(scale) for g, v in pairs]
        return list(self._optimizer.perturbed_values(grads, variables))


class _TwoOnJAX(_Two):
    """The same where the step is a function of the state."""

    method = "stateless_apply"

    def __call__(self, state: Any, data: Any) -> tuple[Any, Any]:
        weights, others, optimizer_state, metrics = state
        moved: list[Tensor] = []

        def probe(_: Any, optimizer_state: Any, grads: Any, weights: Any) -> tuple[Any, Any]:
            held = self._outer.variables, self._model.trainable_variables
            values = zip([*held[0], *held[1]], [*optimizer_state, *weights], strict=True)
            with keras.StatelessScope(list(values)):
                moved.extend(self._perturbed(grads, held[1]))
            return list(weights), optimizer_state

        def update(stateless_apply: Any, optimizer_state: Any, grads: Any, _: Any) -> Any:
            with self._optimizer.given_second_gradient():
                return stateless_apply(optimizer_state, grads, weights)

        with self._with_updates(self._once(probe)):
            logs, (_, others_after, _, metrics_after) = self._step(state, data)
        if not moved:
            moved = weights
        with self._with_updates(self._once(update)), muted(but=UPDATE):
            _, (weights, _, optimizer_state, _) = self._step((moved, others, optimizer_state, metrics), data)
        return logs, (weights, others_after, optimizer_state, metrics_after)


class _TwoOnTensorFlow(_Two):
    """The same where the step assigns variables."""

    method = "apply"

    def __call__(self, data: Any) -> Any:
        self._build(data)
        model = self._model
        state = list({backend.key(v): v for v in [*model.variables, *model.metrics_variables]}.values())
        before = _read(state)
        seen: dict[str, Any] = {}

        def probe(_: Any, grads: Any, trainable_variables: Any = None) -> None:
            self._refuse_elsewhere(before)
            variables = list(trainable_variables or self._optimizer._in_model_order())
            seen["variables"], seen["weights"] = variables, _read(variables)
            seen["moved"] = self._perturbed(grads, variables)
            seen["state"] = _read(state)

        def update(apply: Any, grads: Any, trainable_variables: Any = None) -> None:
            self._refuse_elsewhere(before)
            self._restore(state, seen["state"])
            self._restore(seen["variables"], seen["weights"])
            alone = not backend.is_one_of_several_replicas()
            inlined = backend.functions_inlined(not alone)  # the compiled update is a function of its own
            try:
                with self._optimizer.given_second_gradient():
                    apply(grads, trainable_variables)
            finally:
                backend.functions_inlined(inlined)

        with self._with_updates(self._once(probe)):
            logs = self._step(data)
        if "moved" not in seen:  # a frozen model, or a step that only collects gradients
            return logs
        metrics = model.metrics_variables
        metrics_after = _read(metrics)
        backend.assign(state, before)
        backend.assign(seen["variables"], seen["moved"])
        with self._with_updates(self._once(update)), muted(but=UPDATE):
            self._step(data)
        backend.assign(metrics, metrics_after)
        return logs

    def _refuse_elsewhere(self, before: Sequence[Tensor]) -> None:
        """Raises if an update is in a part of the step that may not be executed."""
        if before and not backend.is_here(before[0]):
            raise ValueError(
                f"{self._optimizer.name} computes the gradient twice, for which {type(self._model).__name__}."
                "train_step must make its update in every step, and makes it inside tf.cond or a loop. Call `apply` "
                "unconditionally; `skip_nonfinite` leaves out updates with non-finite gradients."
            )

    def _restore(self, variables: Sequence[Any], values: Sequence[Tensor]) -> None:
        """Gives variables the values that they had at the end of the first forward pass."""
        backend.assign(variables, values)

    def _build(self, data: Any) -> None:
        """Has all weights made that the step makes, by tracing it for nothing: their first values must be known."""
        import tensorflow as tf

        model = self._model
        if all(layer.built for layer in sublayers(model)):
            if not self._outer.built and model.trainable_variables:
                with backend.outside_graph():
                    self._outer.build(model.trainable_variables)
            return
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            return

        def no_update(_: Any, grads: Any, trainable_variables: Any = None) -> None:  # noqa: ARG001
            if not self._outer.built:
                with backend.outside_graph():
                    self._outer.build(list(trainable_variables or model.trainable_variables))

        spec = keras.tree.map_structure(lambda x: tf.type_spec_from_value(x) if tf.is_tensor(x) else x, data)
        with self._with_updates(no_update), muted():
            try:
                tf.function(self._step, autograph=False).get_concrete_function(spec)
            except Exception as error:
                if not tf.executing_eagerly():  # Keras's own trace would fail, too
                    raise
                raise RuntimeError(
                    f"{self._optimizer.name} has to know a model's weights before its first step, and tracing "
                    f"{type(model).__name__}.train_step to make them failed. Build the model first, for instance by "
                    "calling it on a batch."
                ) from error


def _read(variables: Sequence[Any]) -> list[Tensor]:
    import tensorflow as tf

    return [tf.identity(backend.tensor(v)) for v in variables]
