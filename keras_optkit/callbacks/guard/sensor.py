"""What NonFiniteGuard computes inside the training step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_optkit import backend
from keras_optkit.fit.hooks import Hook, around
from keras_optkit.fit.instrument import Instrument
from keras_optkit.fit.steps import build_as_the_first_step
from keras_optkit.optimizers.of_model import optimizers_of
from keras_optkit.private import known_variables

Tensor = Any


#: What step and host share, and how replicas make one number of it: each has its part of the global batch's mean loss.
SCALARS = {
    "limit": "only_first_replica",  # set by the host: a larger loss is a spike
    "loss": "sum",
    "gradient": "only_first_replica",  # place of the last gradient that is not finite, from 1; 0: there is none
    "weight": "only_first_replica",  # the same of the weights after the update
    "bad": "only_first_replica",  # whether there was a bad step since the host looked; the first one is kept:
    "bad_loss": "only_first_replica",
    "bad_gradient": "only_first_replica",
    "bad_weight": "only_first_replica",
    "behind": "only_first_replica",  # how many steps came after it
    "seen": "only_first_replica",  # the loss, or NaN if "bad": the one number that the host reads after each batch
}


class _Remembering:
    """An iterator that tells a sensor what it has given."""

    def __init__(self, iterator: Iterator[Any], sensor: Sensor):
        self._iterator, self._sensor = iterator, sensor

    def __next__(self) -> Any:
        self._sensor.batch = next(self._iterator)
        return self._sensor.batch


class Sensor(Instrument):
    """Judges every step, after it: whether its loss, gradients and weights are finite, and the loss is not a spike.

    Attributes:
        variables: Those of which gradients or weights were seen; the values "gradient" and "weight" are places here,
            counted from 1.
        sees: Whether the step that was traced has shown anything.
        sees_loss: Whether it has shown its loss.
        batch: The batch that the last step has worked on, if it is to be held.
    """

    def __init__(self, model: Any):
        super().__init__(model, SCALARS)
        self.variables: list[Any] = []
        self._places: dict[int, int] = {}
        self.sees = self.sees_loss = self.holds = False
        self.batch: Any = None
        self._when_built: Callable[[], None] | None = None

    def begin_fit(self, holds: bool, when_built: Callable[[], None] | None) -> None:
        """Says whether batches are held, and what to call when a model that is not built will be."""
        self.holds, self._when_built = holds, when_built

    def release(self) -> None:
        """Lets go of the batch and of the callback."""
        self.batch = self._when_built = None

    def hooks(self) -> list[Callable[[], None]]:
        """Around the same methods as those of `TrainingMonitor`, for the same reasons."""
        hooks = []
        on_tensorflow = keras.config.backend() == "tensorflow"
        if not on_tensorflow:
            losses = [metric for metric in self.model.metrics if metric.name == "loss"]
            hooks += [around(metric, "update_state", self._see_loss) for metric in losses]
        for optimizer in optimizers_of(self.model):
            if on_tensorflow:
                hooks.append(around(optimizer, "scale_loss", self._see_loss))
                hooks.append(around(optimizer, "apply", self._see_apply(optimizer)))
            else:
                hooks.append(around(optimizer, "stateless_apply", self._see_stateless_apply(optimizer)))
        return hooks

    def feed(self, iterator: Any) -> Any:
        """Keeps a reference to the batch, where it is at hand; has a model that is not built be, on TensorFlow."""
        if keras.config.backend() == "jax":
            return _Remembering(iterator, self) if self.holds else iterator
        import tensorflow as tf

        if self._when_built is not None:
            when_built, self._when_built = self._when_built, None
            with contextlib.suppress(Exception) if self.model.run_eagerly else contextlib.nullcontext():
                build_as_the_first_step(self.model, iterator)
                when_built()
        if not self.holds or self.model.steps_per_execution > 1 or not isinstance(iterator, tf.data.Iterator):
            return iterator  # it is taken inside the graph, or is one of several replicas
        self.batch = next(iterator)
        return [self.batch]  # as `train_on_batch` hands it over

    # -- inside the step ----------------------------------------------------------------------------------------------

    def begin(self, *_: Any) -> None:
        """Nothing bad has been seen in this step."""
        for name in ("loss", "gradient", "weight"):
            self[name] = ops.zeros((), "float32")
        self._thread.losses = []

    @contextlib.contextmanager
    def _see_loss(self, loss: Tensor, *_: Any, **__: Any) -> Iterator[None]:
        if self.in_step:  # and not in a validation
            self._thread.losses.append(ops.cast(loss, "float32"))
        yield

    def _see_apply(self, optimizer: Any) -> Hook:
        @contextlib.contextmanager
        def see_apply(
            grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None
        ) -> Iterator[None]:
            variables = list(trainable_variables or known_variables(optimizer) or self.model.trainable_variables)
            self._see_gradients(optimizer, grads, variables)
            yield
            self._see_weights([ops.convert_to_tensor(variable) for variable in variables], variables)

        return see_apply

    def _see_stateless_apply(self, optimizer: Any) -> Hook:
        @contextlib.contextmanager
        def see_stateless_apply(
            _: Sequence[Tensor], grads: Sequence[Tensor], *__: Any, **___: Any
        ) -> Iterator[Callable[[Any], None]]:
            variables = list(known_variables(optimizer) or self.model.trainable_variables)
            self._see_gradients(optimizer, grads, variables)
            yield lambda result: self._see_weights(result[0], variables)

        return see_stateless_apply

    def _see_gradients(self, optimizer: Any, grads: Sequence[Tensor | None], variables: Sequence[Any]) -> None:
        self.sees = True
        if not leaves_bad_updates_out(optimizer):
            present = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
            values = [g.values if backend.is_sparse(g) else g for g, _ in present]
            self._hold("gradient", _over_replicas(_bad(values)), [v for _, v in present])

    def _see_weights(self, values: Sequence[Tensor], variables: Sequence[Any]) -> None:
        self._hold("weight", _bad(values), variables)

    def _hold(self, name: str, bad: Tensor, variables: Sequence[Any]) -> None:
        """The place of the last bad one, if there is any."""
        place = _last_bad(bad, [self._place(variable) for variable in variables])
        self[name] = ops.where(place > 0, place, self[name])

    def _place(self, variable: Any) -> int:
        key = backend.key(variable)
        if key not in self._places:
            self.variables.append(variable)
            self._places[key] = len(self.variables)
        return self._places[key]

    def end(self) -> None:
        """Keeps what the first bad step since the host has looked was like."""
        losses = [loss for loss in self._thread.losses if backend.is_here(loss)]
        self._thread.losses = []
        self.sees_loss |= bool(losses)
        self.sees |= bool(losses)
        if losses:
            self["loss"] = sum(losses[1:], losses[0])
        loss, failed = self["loss"], self["bad"] > 0
        fine = ops.logical_and(ops.isfinite(loss), loss <= self["limit"])
        fine = ops.logical_and(fine, self["gradient"] + self["weight"] == 0)
        first = ops.logical_not(ops.logical_or(fine, failed))
        for name in ("loss", "gradient", "weight"):
            self[f"bad_{name}"] = ops.where(first, self[name], self[f"bad_{name}"])
        self["behind"] = ops.where(failed, self["behind"] + 1, 0.0)
        self["bad"] = ops.where(fine, self["bad"], 1.0)
        self["seen"] = ops.where(ops.logical_or(first, failed), math.nan, loss)


def _bad(tensors: Sequence[Tensor]) -> Tensor:
    """For each tensor 1 if an element of it is not finite, else 0."""
    return ops.stack([ops.cast(ops.logical_not(ops.all(ops.isfinite(t))), "float32") for t in tensors])


def _last_bad(bad: Tensor, places: Sequence[int]) -> Tensor:
    """The last of the places whose tensor is bad; 0 if none is."""
    return ops.max(ops.where(bad > 0, ops.convert_to_tensor(list(places), "float32"), 0.0))


def _over_replicas(flags: Tensor) -> Tensor:
    """The flags of the gradients of all replicas."""
    if keras.config.backend() != "tensorflow":
        return flags
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return flags
    return context.all_reduce(tf.distribute.ReduceOp.SUM, flags)


def leaves_bad_updates_out(optimizer: Any) -> bool:
    """Whether an optimizer makes no update of a gradient that is not finite."""
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or bool(
        getattr(optimizer, "skip_nonfinite", None)
    )
