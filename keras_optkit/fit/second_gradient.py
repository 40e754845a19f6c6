"""Training steps that compute the gradient twice, for optimizers that need one at perturbed weights.

The model's own `train_step` runs twice on the same batch. In the first run, the gradients given to `apply` determine
the perturbed weights, and nothing is updated. In the second run the model holds these weights until `apply` is called,
which restores the original weights and makes the update. All other state is as if the forward pass and the metrics had
run once, at the original weights. What the second run does after the update is kept.
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

#: The methods whose hooks see the second run. All other hooks see the first, which does not reach these methods.
UPDATE = ("apply", "stateless_apply")


@contextlib.contextmanager
def computing_second_gradients(run: Run) -> Iterator[None]:
    """Makes the training function with a step that computes the gradient twice, if that is needed."""
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
    """A training step that computes the gradient twice, if the model's optimizer needs that; else `step` itself.

    Raises:
        ValueError: If the model has several optimizers, and one of them needs it.
    """
    needing = [optimizer for optimizer in ours_of(model) if optimizer.needs_second_gradient]
    if not needing or getattr(step, "computes_two_gradients", False):
        return step
    outer = optimizers_of(model)
    inside = [inner for optimizer in outer for inner in innermost(optimizer)]
    if len(inside) != 1:
        raise ValueError(
            f"{needing[0].name} computes the gradient twice, so it must be the only optimizer of the model, got "
            f"{', '.join(f'{optimizer.name} ({type(optimizer).__name__})' for optimizer in inside)}."
        )
    two = (_TwoOnJAX if keras.config.backend() == "jax" else _TwoOnTensorFlow)(model, outer[0], step)
    two.computes_two_gradients = True
    return two


class _Two:
    """A training step that runs another one twice.

    The replicas of a strategy are traced in turns, each in its own thread. The optimizer's method is replaced while any
    of them is inside, and the replacement looks up in its thread what to do. Meanwhile, a `tf.function` that the step
    calls is traced as part of the step, since an earlier trace would not look it up.
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
        """Redirects this thread's updates to `update`, which gets the optimizer's own method and its arguments."""
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
            self._inside = 1  # the other replicas do not finish
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
        """The same function, which raises if it is called a second time."""
        called: list[bool] = []

        def once(*args: Any, **kwargs: Any) -> Any:
            if called:
                raise ValueError(
                    f"{self._optimizer.name} computes the gradient twice, so {type(self._model).__name__}.train_step "
                    "must make one update, but it makes several."
                )
            called.append(True)
            return update(*args, **kwargs)

        return once

    def _perturbed(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Tensor]:
        """The weights to compute the second gradient at, from the first gradients, unscaled if necessary."""
        scale = getattr(self._outer, "dynamic_scale", None)
        if scale is not None:
            pairs = zip(grads, variables, strict=True)
            grads = [None if g is None else backend.dense(g, tuple(v.shape)) / backend.tensor(scale) for g, v in pairs]
        return list(self._optimizer.perturbed_values(grads, variables))


class _TwoOnJAX(_Two):
    """For JAX, where the step is a function of the state."""

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
    """For TensorFlow, where the step assigns variables."""

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
            inlined = backend.functions_inlined(not alone)  # the compiled update is a separate function
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
        """Raises if an update is in a conditional part of the step."""
        if before and not backend.is_here(before[0]):
            raise ValueError(
                f"{self._optimizer.name} computes the gradient twice, so {type(self._model).__name__}.train_step must "
                "make its update in every step, but it makes it inside tf.cond or a loop. Call `apply` "
                "unconditionally; `skip_nonfinite` skips updates with non-finite gradients."
            )

    def _restore(self, variables: Sequence[Any], values: Sequence[Tensor]) -> None:
        """Assigns the values that the variables had at the end of the first forward pass."""
        backend.assign(variables, values)

    def _build(self, data: Any) -> None:
        """Builds all weights that the step creates, by tracing it once: their initial values must be known."""
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
                    f"{self._optimizer.name} must know the model's weights before its first step, but tracing "
                    f"{type(model).__name__}.train_step to build them failed. Build the model first, for instance by "
                    "calling it on a batch."
                ) from error


def _read(variables: Sequence[Any]) -> list[Tensor]:
    import tensorflow as tf

    return [tf.identity(backend.tensor(v)) for v in variables]
