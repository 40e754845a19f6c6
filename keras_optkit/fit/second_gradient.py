"""Training steps that compute the gradient twice, for optimizers that need one at perturbed weights.

The model's own `train_step` runs twice on the same batch. In the first run, the gradients given to `apply` determine
the perturbed weights, and nothing is updated. In the second run the model holds these weights until `apply` is called,
which restores the original weights and makes the update. All other state is as if the forward pass and the metrics had
run once, at the original weights. What the second run does after the update is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_optkit import backend
from keras_optkit.fit.hooks import muted
from keras_optkit.fit.redirecting import Redirecting
from keras_optkit.private import sublayers

Tensor = Any

#: The methods whose hooks see the second run. All other hooks see the first, which does not reach these methods.
UPDATE = ("apply", "stateless_apply")


class _Two(Redirecting):
    why = "computes the gradient twice"

    def _perturbed(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Tensor]:
        """The weights to compute the second gradient at, from the first gradients, unscaled if necessary."""
        return list(self._optimizer.perturbed_values(self._unscaled(grads, variables), variables))


class TwoOnJAX(_Two):
    """For JAX, where the step is a function of the state."""

    method = "stateless_apply"

    def __call__(self, state: Any, data: Any) -> tuple[Any, Any]:
        """One training step."""
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


class TwoOnTensorFlow(_Two):
    """For TensorFlow, where the step assigns variables."""

    method = "apply"

    def __call__(self, data: Any) -> Any:
        """One training step."""
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
            with self._optimizer.given_second_gradient():
                self._apply(apply, grads, trainable_variables)

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
